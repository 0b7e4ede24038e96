"""Policies by network, and attempts that they may mean, for tests by drawn examples."""

from __future__ import annotations

import ipaddress

from hypothesis import strategies as st

from offload_builder.egress.policy.model import (
    Action,
    Attempt,
    NetworkTarget,
    Place,
    Policy,
    PortRange,
    Posture,
    Protocol,
    Rule,
)

NETWORKS = [
    "0.0.0.0/0", "8.0.0.0/5", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "100.64.0.0/10",
    "100.100.100.200/32", "127.0.0.0/8", "169.254.0.0/16", "169.254.169.254/32", "192.0.2.0/24",
    "192.0.2.7/32", "192.0.2.128/25", "::/0", "fc00::/7", "fd00:ec2::254/128", "fec0::/10",
    "2001:db8::/32", "2001:db8::1/128",
]  # fmt: skip
ADDRESSES = [
    "192.0.2.7", "192.0.2.200", "10.1.2.3", "10.9.9.9", "11.0.0.1", "100.64.0.9", "100.100.100.200",
    "127.0.0.1", "169.254.0.5", "169.254.169.254", "8.8.8.8", "2001:db8::1", "2001:db8::2",
    "fd00:ec2::254", "fd12::1", "fec0::1", "fe80::1", "::ffff:8.8.8.8",
]  # fmt: skip

rules = st.builds(
    Rule,
    id=st.uuids().map(str),
    action=st.sampled_from(Action),
    targets=st.lists(
        st.sampled_from(NETWORKS).map(lambda text: NetworkTarget(ipaddress.ip_network(text))),
        min_size=1,
        max_size=3,
    ).map(tuple),
    ports=st.lists(
        st.sampled_from([PortRange(443, 443), PortRange(80, 90), PortRange(85, 500)]), max_size=2
    ).map(tuple),
    protocol=st.sampled_from(Protocol),
    place=st.integers(1, 99).map(lambda line: Place("p", line)),
).filter(lambda rule: not (rule.ports and rule.protocol is Protocol.ICMP))
policies = st.builds(
    Policy, posture=st.sampled_from(Posture), rules=st.lists(rules, max_size=5).map(tuple)
)
attempts = st.builds(
    Attempt,
    host=st.none(),
    address=st.sampled_from(ADDRESSES).map(ipaddress.ip_address),
    port=st.sampled_from([22, 82, 88, 443, 500]),
    protocol=st.sampled_from([Protocol.TCP, Protocol.UDP]),
) | st.builds(
    Attempt,
    host=st.none(),
    address=st.sampled_from(ADDRESSES).map(ipaddress.ip_address),
    port=st.none(),
    protocol=st.sampled_from([Protocol.ICMP, Protocol.ANY]),
)
