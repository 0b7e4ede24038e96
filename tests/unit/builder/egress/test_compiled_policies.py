"""The rules for the kernel come to the same as the policy, for addresses that no name led to."""

from __future__ import annotations

import ipaddress
import re

from hypothesis import given
from hypothesis import strategies as st

from offload_builder.egress.firewall.addresses import project_addresses
from offload_builder.egress.firewall.ruleset import Stage, base_table, policy_name, prepare_policy
from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.model import Attempt, EffectivePolicy, Protocol
from tests.unit.builder.egress.drawnpolicies import attempts, policies

PROJECT = project_addresses(0)
_NUMBERS = {Protocol.TCP: "tcp", Protocol.UDP: "udp", Protocol.ANY: "sctp"}
_ELEMENTS = re.compile(r"add element inet offload_build (\S+) \{ (.*) \}")
_CHAINS = re.compile(r"^  chain (\w+) \{\n(.*?)^  \}", re.MULTILINE | re.DOTALL)
_SETS = re.compile(r"set (\w+) \{[^}]*elements = \{([^}]*)\}")


class Kernel:
    """Goes through the chains of a text for nft as the kernel does."""

    def __init__(self, text: str) -> None:
        self.sets: dict[str, list[str]] = {}
        for name, elements in (*_ELEMENTS.findall(text), *_SETS.findall(text)):
            self.sets.setdefault(name, []).extend(part.strip() for part in elements.split(","))
        self.chains: dict[str, list[str]] = {}
        for name, body in re.findall(
            r"^  chain (\w+) \{\n(.*?)^  \}", text, re.MULTILINE | re.DOTALL
        ):
            self.chains[name] = [line.strip() for line in body.splitlines()]

    def ends(self, chain: str, attempt: Attempt) -> str:
        for line in self.chains[chain]:
            target = re.search(r"goto (\w+)$", line)
            if target is None or line.startswith("ct state established"):
                continue
            found = re.search(r"@(\w+) ", line)
            if found is None or self.holds(found[1], attempt, line):
                goes_on = target[1] in self.chains
                return self.ends(target[1], attempt) if goes_on else target[1]
        raise AssertionError(f"{chain} has no end")

    def holds(self, name: str, attempt: Attempt, line: str) -> bool:
        if "proto-dst" in line and attempt.port is None:
            return False
        return any(_is(element.split(" . "), attempt) for element in self.sets.get(name, ()))


def _is(element: list[str], attempt: Attempt) -> bool:
    network = ipaddress.ip_network(element[0])
    if attempt.address not in network:
        return False
    if attempt.protocol is Protocol.ICMP:
        name = "icmp" if network.version == 4 else "ipv6-icmp"
    else:
        name = _NUMBERS[attempt.protocol]
    if len(element) > 1 and element[1] not in (name, "0-255"):
        return False
    first, _, last = element[2].partition("-") if len(element) > 2 else ("0", "", "65535")
    return int(first) <= (attempt.port or 0) <= int(last or first)


@given(policies, st.none() | policies, attempts)
def test_the_kernel_decides_as_the_policy_does(base, build, attempt):
    policy = EffectivePolicy(base, () if build is None else (build,))
    text = base_table(node_addresses=()) + prepare_policy(PROJECT, policy, 1)
    ended = Kernel(text).ends(f"{policy_name(PROJECT, 1)}_l0", attempt)
    assert ended.removeprefix(f"{PROJECT.device}_") in {stage.value for stage in Stage}
    allowed = ended == f"{PROJECT.device}_{Stage.ALLOWED.value}"
    assert allowed is Evaluator(policy).verdict(attempt).allowed, ended
