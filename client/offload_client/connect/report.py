"""What a connector tells the person, or the program, that runs it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from offload_core.units import format_size

if TYPE_CHECKING:
    from offload_client.connect.carrying import Carried
    from offload_client.invocation import Invocation
    from offload_core.errors import OffloadError
    from offload_proto.v1.connector_service_pb2 import ConnectorWelcome, Destination


class ConnectorReport:
    """Lines of text on standard error, or of JSON on standard output.

    Args:
        invocation: the command.
        name: of the connector.
        project: whose builds it serves.
        gateway: HOST:PORT, for pools without a name.
        verbose: connections are told as well.
        as_json: for programs; everything is told then.
    """

    def __init__(
        self,
        invocation: Invocation,
        *,
        name: str,
        project: str,
        gateway: str,
        verbose: bool,
        as_json: bool,
    ) -> None:
        self._invocation = invocation
        self._name = name
        self._project = project
        self._gateway = gateway
        self._verbose = verbose
        self._json = as_json
        self._last: tuple[object, ...] = ()

    def welcome(self, welcome: ConnectorWelcome) -> None:
        """Tell what builds can reach, if that is news."""
        served = [_shown(item.destination) for item in welcome.destinations if item.permitted]
        others = {
            _shown(item.destination): item.reason
            for item in welcome.destinations
            if not item.permitted
        }
        news = (welcome.pool, tuple(served), tuple(others.items()))
        if news == self._last:
            return
        self._last = news
        if self._json:
            self._event("connected", pool=welcome.pool, reachable=served, not_reachable=others)
            return
        pool = welcome.pool or self._gateway
        where = f"connected to {pool} as {self._name}: "
        verb = "is" if len(served) == 1 else "are"
        what = f"{_listed(served)} {verb} reachable by" if served else "nothing is reachable yet by"
        self._invocation.err(f"{where}{what} builds of project {self._project}")
        for target, reason in others.items():
            ask = f"; ask {welcome.contact}" if welcome.contact else ""
            self._invocation.err(f"WARNING: {target} is not reachable: {reason}{ask}")

    def lost(self, error: OffloadError, seconds: float) -> None:
        """Tell that the gateway is away, and when it is tried again."""
        self._last = ()
        if self._json:
            self._event("lost", reason=error.message, retry_seconds=round(seconds, 1))
        else:
            again = f"trying again in {seconds:.1f} seconds"
            self._invocation.err(f"lost the gateway: {error.message}; {again}")

    def opened(self, number: int, target: Destination) -> None:
        """Tell of a connection."""
        if self._json:
            self._event("opened", connection=number, target=_shown(target))
        elif self._verbose:
            self._invocation.err(f"#{number} {_shown(target)} opened")

    def closed(self, number: int, target: Destination, carried: Carried, seconds: float) -> None:
        """Tell of the end of a connection."""
        if self._json:
            self._event(
                "closed",
                connection=number,
                target=_shown(target),
                to_build_bytes=carried.to_build,
                from_build_bytes=carried.from_build,
                seconds=round(seconds, 3),
                whole=carried.whole,
            )
        elif self._verbose:
            how = "closed" if carried.whole else "was cut"
            self._invocation.err(
                f"#{number} {_shown(target)} {how} after {seconds:.1f} seconds, "
                f"{format_size(carried.to_build)} to the build and "
                f"{format_size(carried.from_build)} from it"
            )

    def refused(self, number: int, target: Destination, reason: str) -> None:
        """Tell of a connection that could not be had, whoever is interested in connections."""
        self._problem("refused", number, target, reason)

    def broken(self, number: int, target: Destination, error: OffloadError) -> None:
        """Tell of a connection that a node has ended."""
        self._problem("broken", number, target, error.message)

    def crashed(self, name: str, error: BaseException) -> None:
        """Tell of something that must not happen."""
        if self._json:
            self._event("failed", task=name, reason=repr(error))
        else:
            self._invocation.err(f"WARNING: a {name} failed: {error!r}")

    def _problem(self, event: str, number: int, target: Destination, reason: str) -> None:
        if self._json:
            self._event(event, connection=number, target=_shown(target), reason=reason)
        else:
            self._invocation.err(f"#{number} {_shown(target)} {event}: {reason}")

    def _event(self, event: str, **fields: Any) -> None:
        head = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        head |= {"connector": self._name, "project": self._project}
        self._invocation.out(json.dumps(head | fields))


def _shown(target: Destination) -> str:
    return f"{target.host}:{target.port}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
