"""Identities of others: tokens of OpenID Connect providers become members of this gateway."""
