"""What a node counts for Prometheus: connections of builds, policies, BuildKits.

Labels are projects, never hosts: there are as many series as a node has projects.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.metricsport import policy_versions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from prometheus_client.core import Metric

_Counts = dict[Stage, int]


class EgressCounts(Collector):
    """New connections of builds by project and stage, as the kernel counts them: none is left out.

    Args:
        read: returns the counters of all places that are open now, by place.
    """

    def __init__(self, read: Callable[[], Awaitable[Mapping[str, _Counts]]]) -> None:
        self._read = read
        self._projects: dict[str, str] = {}
        self._open: dict[str, _Counts] = {}
        self._closed: defaultdict[str, _Counts] = defaultdict(dict)

    def opened(self, place: str, project_id: str) -> None:
        """Count a place for its project from now on."""
        self._projects[place] = project_id

    async def closing(self, place: str) -> None:
        """Keep what a place has counted; its counters are removed next.

        Raises:
            OffloadError: what was counted since the last look is lost.
        """
        try:
            await self.refresh()
        finally:
            project_id = self._projects.pop(place, None)
            if project_id is not None:
                _add(self._closed[project_id], self._open.pop(place, {}))

    async def refresh(self) -> None:
        """Read the kernel's counters.

        Raises:
            OffloadError: they cannot be read.
        """
        found = await self._read()
        self._open = {place: found[place] for place in self._projects if place in found}

    def by_project(self) -> dict[str, _Counts]:
        """Return the counts as they were read last."""
        total: defaultdict[str, _Counts] = defaultdict(dict)
        for project_id, counts in self._closed.items():
            _add(total[project_id], counts)
        for place, counts in self._open.items():
            _add(total[self._projects[place]], counts)
        return dict(total)

    def collect(self) -> Iterator[Metric]:
        """Yield the counters (prometheus_client's Collector)."""
        reached = CounterMetricFamily(
            "offload_egress_allowed",
            "New connections of builds that were allowed.",
            labels=["project"],
        )
        refused = CounterMetricFamily(
            "offload_egress_refused",
            "New connections of builds that were refused, by what decided.",
            labels=["project", "stage"],
        )
        for project_id, counts in sorted(self.by_project().items()):
            for stage, count in counts.items():
                if stage is Stage.ALLOWED:
                    reached.add_metric([project_id], count)
                else:
                    refused.add_metric([project_id, stage.value], count)
        yield reached
        yield refused


class NodeGauges(Collector):
    """What a node is now.

    Args:
        versions: returns the versions of the policies in force, that of the pool under "".
        daemons: returns how many BuildKits run.
        builds: returns how many builds run.
        enforced: returns whether the newest policies are in force.
    """

    def __init__(
        self,
        *,
        versions: Callable[[], Mapping[str, int]],
        daemons: Callable[[], int],
        builds: Callable[[], int],
        enforced: Callable[[], bool],
    ) -> None:
        self._versions = versions
        self._daemons = daemons
        self._builds = builds
        self._enforced = enforced

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges (prometheus_client's Collector)."""
        yield policy_versions(self._versions())
        for name, about, value in (
            ("offload_egress_in_force", "1 while the newest policies are in force.",
             int(self._enforced())),
            ("offload_buildkit_daemons", "BuildKits that run.", self._daemons()),
            ("offload_builds_running", "Builds that run.", self._builds()),
        ):  # fmt: skip
            yield GaugeMetricFamily(name, about, value=value)


def _add(total: _Counts, counts: Mapping[Stage, int]) -> None:
    for stage, count in counts.items():
        total[stage] = total.get(stage, 0) + count
