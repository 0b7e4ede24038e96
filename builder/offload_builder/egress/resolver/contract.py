"""What the resolver asks of the firewall, and what it tells of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from offload_builder.egress.policy import model

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Grant:
    """What an address that a name leads to may be used for.

    Attributes:
        protocol: `ANY` is for every protocol where `ports` is None, else for TCP and UDP.
        ports: None for all.
        private: the address may lie in a protected range that can be opened.
    """

    protocol: model.Protocol
    ports: model.PortRange | None = None
    private: bool = False


@dataclass(frozen=True, slots=True)
class Admission:
    """An address that a project may reach for a while.

    Attributes:
        address: where an allowed name led to.
        grant: for what.
        protected: the address lies in a protected range, which the policy opens for this name;
            the firewall has to let it pass before it looks at these ranges.
        seconds: from now.
        open_only: for connections that are open already, which a change of policy judges again:
            an answer does not have to be good for as long as a download takes.
    """

    address: model.Address
    grant: Grant
    protected: bool
    seconds: int
    open_only: bool = False


class AddressBook(Protocol):
    """The firewall's lists of addresses that names led to."""

    async def admit(self, project: str, admissions: Sequence[Admission]) -> None:
        """Let a project reach addresses; what is admitted again gets the later end.

        The answer that names these addresses leaves after this returns. The calls of one project
        must take effect in the order in which they were made, also among reloads of its policy.

        Raises:
            OffloadError: it cannot be done; the name then fails.
        """
        ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """A name, or addresses behind one, that a build did not get.

    Attributes:
        time: seconds since 1970.
        project: whose build asked.
        source: address that asked: a container, or the project's BuildKit.
        name: lower case, without a dot at its end.
        qtype: such as "A".
        rule_id: of the rule that decided.
        rule_text: the rule in one line.
        place: where the rule is written.
        reason: one sentence for people.
        addresses: those left out of the answer; empty where the name itself is refused.
        layer: whose word the rule is.
    """

    time: float
    project: str
    source: str
    name: str
    qtype: str
    rule_id: str
    rule_text: str
    place: model.Place
    reason: str
    addresses: tuple[str, ...] = ()
    layer: model.Layer = model.Layer.POOL


@dataclass(frozen=True, slots=True)
class Answered:
    """A name that a build asked for and got.

    Attributes:
        time: seconds since 1970.
        project: whose build asked.
        source: address that asked.
        name: lower case, without a dot at its end.
        rule_id: of the rule that allows it.
        addresses: where it leads.
    """

    time: float
    project: str
    source: str
    name: str
    rule_id: str
    addresses: tuple[str, ...]


class NameListener(Protocol):
    """Hears of names; called in the event loop, so nothing may take long or wait."""

    def refused(self, refusal: Refusal) -> None:
        """Hear of a refusal."""
        ...

    def answered(self, answer: Answered) -> None:
        """Hear of an answer with addresses."""
        ...


@dataclass(frozen=True, slots=True)
class ServiceName:
    """A host that the node's own configuration lets a project reach: a registry, or its storage.

    Attributes:
        host: lower case, without a dot at its end.
        ports: where it is reached; none is for all ports.
        about: what configures it, for people, as "registry of the pool".
        private: it may lie in a protected range that can be opened.
    """

    host: str
    ports: tuple[int, ...] = (443,)
    about: str = "registry of the pool"
    private: bool = True
