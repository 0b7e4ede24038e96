"""Collection of the shared store: what nothing needs any more is removed, beside running builds.

The protocol and the reasons why it is safe are in docs/cache.md, "Collection".
"""
