"""What the resolver counts."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0, 5.0)


class ResolverMetrics:
    """Counters of the resolver of one node; there is one for all projects.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        queries = Counter(
            "offload_dns_queries",
            "Queries for names by what became of them.",
            ["result"],
            registry=registry,
        )
        self.answered = queries.labels("answered")
        self.refused = queries.labels("refused")
        self.names_refused = Counter(
            "offload_egress_names_refused",
            "Names, or addresses behind names, that builds asked for and did not get.",
            ["project"],
            registry=registry,
        )
        self.failed = queries.labels("failed")
        self.malformed = queries.labels("malformed")
        self.dropped = queries.labels("dropped")
        self.seconds = Histogram(
            "offload_dns_query_seconds",
            "From a query to its answer, the entry in the firewall included.",
            buckets=_BUCKETS,
            registry=registry,
        )
        cached = Counter(
            "offload_dns_cache_requests",
            "Allowed names by whether their answer was at hand.",
            ["result"],
            registry=registry,
        )
        self.hits = cached.labels("hit")
        self.misses = cached.labels("miss")
        self.joined = cached.labels("joined")
        self.upstream_failures = Counter(
            "offload_dns_upstream_failures",
            "Questions that a DNS server of the node did not answer well.",
            registry=registry,
        )
        self.stripped = Counter(
            "offload_dns_stripped_addresses",
            "Addresses in protected ranges that were left out of answers.",
            registry=registry,
        )
        self.admit_seconds = Histogram(
            "offload_dns_admit_seconds",
            "Until the firewall had the addresses of an answer.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.unreported = Counter(
            "offload_dns_unreported_refusals",
            "Refusals that were not told, because there were too many.",
            registry=registry,
        )
