"""Turns URLs that builds fetched into a rule by URL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.egress.policy.explain import rule_toml
from offload_builder.egress.policy.model import Action, Place, Protocol, Rule
from offload_builder.egress.policy.weburl import AmbiguousUrlError, UrlTarget, normal_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.egress.policy.model import Attempt


def url_rule(attempts: Iterable[Attempt]) -> tuple[list[str], list[Attempt]]:
    """Return lines of a policy file that allow URLs, and the attempts that are left.

    What is known of a server by host only belongs to its URLs.
    """
    kept = list(attempts)
    urls = {below for item in kept if (below := _below(item)) is not None}
    if not urls:
        return [], kept
    servers = {(url.name, url.port) for url in urls}
    left = [
        item for item in kept if (item.host or "", item.port) not in servers or _is_no_url(item)
    ]
    rule = Rule("learned-urls", Action.ALLOW, tuple(sorted(urls)), place=Place("learned"))
    head = ["# URLs are seen behind BuildKit's proxy only.", "proxied = true", ""]
    return [*head, rule_toml(rule)], left


def _below(attempt: Attempt) -> UrlTarget | None:
    """Return what is allowed for a URL: all below the first part of its path, or `/` itself."""
    url = attempt.url
    if url is None or attempt.host is None:
        return None
    try:
        path = normal_path(url.path)
    except AmbiguousUrlError:
        return None
    first, slash, _ = path[1:].partition("/")
    return UrlTarget(url.scheme, url.host, False, url.port, f"/{first}/" if slash else path)


def _is_no_url(attempt: Attempt) -> bool:
    """Return whether an attempt is known to be nothing that a rule by URL can allow."""
    return attempt.protocol is not Protocol.TCP or (
        attempt.url is not None and _below(attempt) is None
    )
