"""Differences, manifests for clusters, and proposals: other forms of a policy."""

from __future__ import annotations

import yaml

from offload_builder.egress.policy.differences import differences
from offload_builder.egress.policy.kubernetes import export
from offload_builder.egress.policy.learn import learn
from offload_builder.egress.policy.model import Protocol
from tests.unit.builder.egress.policy.texts import NOW, attempt, judged, read

LIST = """posture = "allowlist"
presets = ["debian"]
[[rule]]
id = "net"
allow = ["203.0.113.0/24", "*.cdn.example", "10.1.2.3"]
ports = [443, "8000-8010"]
[[rule]]
id = "bad"
deny = ["203.0.113.64/26", "x.cdn.example"]
"""
BASE = 'posture = "open"\n[[rule]]\nid = "a"\nallow = ["10.0.0.0/16"]\nports = [443]\n'


def changes(old: str, new: str) -> list[str]:
    return [str(item) for item in differences(read(old), read(new))]


def test_no_change_is_no_difference():
    assert changes(LIST, LIST) == []
    assert changes(LIST, "# a comment\n\n" + LIST) == []


def test_changes_say_whether_builds_reach_more():
    assert changes(BASE, BASE.replace("open", "allowlist")) == [
        "~ posture: open -> allowlist  [narrower]"
    ]
    (line,) = changes(BASE, BASE.replace("443", "443, 80"))
    assert line.startswith("~ rule a: allow 10.0.0.0/16 port 443 tcp -> ")
    assert line.endswith("[wider]")
    (line,) = changes(BASE, BASE.replace("10.0.0.0/16", "10.0.1.0/24"))
    assert line.endswith("[narrower]")
    (line,) = changes(BASE, BASE.replace("10.0.0.0/16", "10.1.0.0/16"))
    assert line.endswith("[wider and narrower]")
    (line,) = changes(BASE, BASE + 'owner = "eve"')
    assert line.endswith("[no effect]")
    (line,) = changes(BASE, BASE + '[[rule]]\nid = "b"\ndeny = ["b.example"]')
    assert line == "+ rule b: deny b.example  [narrower]"
    (line,) = changes(LIST.replace('["debian"]', "[]"), LIST)
    assert line.startswith("+ rule preset-debian: allow deb.debian.org")


def test_of_a_rule_with_many_targets_only_what_changes_is_shown():
    many = ", ".join(f'"203.0.113.{number}"' for number in range(100))
    (line,) = changes(BASE.replace('"10.0.0.0/16"', many), BASE.replace('"10.0.0.0/16"', many[15:]))
    assert line == "~ rule a: -203.0.113.0  [narrower]"


def test_the_network_policy_has_networks_and_says_what_it_cannot():
    made = export(read(LIST), kinds=("networkpolicy",), namespace="builds", now=NOW)
    document = yaml.safe_load(made.text)
    assert document["kind"] == "NetworkPolicy"
    assert document["metadata"] == {"name": "offload-egress", "namespace": "builds"}
    assert document["spec"]["policyTypes"] == ["Egress"]
    dns, rule = document["spec"]["egress"]
    assert dns["ports"][0] == {"protocol": "UDP", "port": 53}
    assert rule["to"] == [
        {"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.64/26"]}},
        {"ipBlock": {"cidr": "10.1.2.3/32"}},
    ]
    assert rule["ports"] == [
        {"protocol": "TCP", "port": 443},
        {"protocol": "TCP", "port": 8000, "endPort": 8010},
    ]
    assert len(made.gaps) == 4
    assert all(f"# Not in it: {gap.partition(': ')[2]}" in made.text for gap in made.gaps)


def test_the_cilium_policy_has_names():
    document = yaml.safe_load(export(read(LIST), kinds=("cilium",), now=NOW).text)
    assert document["apiVersion"] == "cilium.io/v2"
    dns, debian, names, networks = document["spec"]["egress"]
    assert {"matchName": "deb.debian.org"} in dns["toPorts"][0]["rules"]["dns"]
    assert {"port": "80", "protocol": "TCP"} in debian["toPorts"][0]["ports"]
    assert names["toFQDNs"][0] == {"matchPattern": "*.cdn.example"}
    assert networks["toCIDRSet"][0]["except"] == ["203.0.113.64/26"]
    hard, bad = document["spec"]["egressDeny"]
    ten = next(item for item in hard["toCIDRSet"] if item["cidr"] == "10.0.0.0/8")
    assert ten["except"] == ["10.1.2.3/32"]
    assert bad["toCIDR"] == ["203.0.113.64/26"]


def test_an_open_policy_leaves_protected_ranges_out():
    text = export(read(BASE), now=NOW).text
    plain, cilium = yaml.safe_load_all(text)
    block = plain["spec"]["egress"][1]["to"][0]["ipBlock"]
    assert block["cidr"] == "0.0.0.0/0"
    assert {"10.0.0.0/8", "169.254.0.0/16", "168.63.129.16/32"} <= set(block["except"])
    assert cilium["spec"]["egress"][0]["toPorts"][0]["rules"]["dns"] == [{"matchPattern": "*"}]


def test_nothing_allowed_is_nothing_and_not_everything_in_a_cluster():
    plain, cilium = yaml.safe_load_all(export(read('posture = "allowlist"'), now=NOW).text)
    assert [list(item) for item in plain["spec"]["egress"]] == [["to", "ports"]]
    assert cilium["spec"]["egress"] == [{}]
    closed = 'posture = "open"\n[[rule]]\nid = "all"\ndeny = ["0.0.0.0/0", "::/0"]'
    plain, cilium = yaml.safe_load_all(export(read(closed), now=NOW).text)
    assert all(item["to"] for item in plain["spec"]["egress"])
    assert "toCIDRSet" not in str(cilium["spec"]["egress"])


def test_many_ports_are_several_lists_for_cilium():
    ports = ", ".join(str(number) for number in range(1000, 1180, 2))
    text = f'posture = "allowlist"\n[[rule]]\nid = "a"\nallow = ["a.b"]\nports = [{ports}]'
    document = yaml.safe_load(export(read(text), kinds=("cilium",), now=NOW).text)
    lists = document["spec"]["egress"][1]["toPorts"]
    assert [len(item["ports"]) for item in lists] == [40, 40, 10]


def test_a_policy_is_learned_from_what_was_reached():
    seen = [
        attempt("deb.debian.org", "151.101.2.132", 80),
        *[attempt(f"{name}.cdn.example", "203.0.113.9") for name in "abc"],
        attempt("time.example", "203.0.113.10", 123, protocol=Protocol.UDP),
        attempt(None, "203.0.113.11", 8443),
        attempt("db.corp.example", "10.1.2.3", 5432),
    ]
    text = learn(seen)
    policy = read(text)
    for what in seen[:-1]:
        assert judged(policy, what.host, str(what.address), what.port, what.protocol).allowed
    assert not judged(policy, "db.corp.example", "10.1.2.3", 5432).allowed
    assert "# db.corp.example:5432: 10.1.2.3 is private network" in text
    assert '# "*.cdn.example" would stand for 3 of these.' in text
    assert 'presets = ["debian"]' in text
    assert not judged(policy, "other.example").allowed


def test_nothing_reached_is_an_empty_list():
    assert read(learn([])).rules == ()
