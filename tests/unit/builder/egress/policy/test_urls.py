"""Rules by URL: how they are written, what they match, and what cannot get around them."""

from __future__ import annotations

import posixpath
import re
import time
from datetime import UTC, datetime
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offload_builder.egress.policy.differences import differences
from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.explain import explain
from offload_builder.egress.policy.kubernetes import export
from offload_builder.egress.policy.learn import learn
from offload_builder.egress.policy.merging import NO_NETWORK, merge, narrow
from offload_builder.egress.policy.model import Layer
from offload_builder.egress.policy.reading import read_text
from offload_builder.egress.policy.targets import parse_attempt, parse_target, parse_web_url
from offload_builder.egress.policy.urlrules import UrlEvaluator
from offload_builder.egress.policy.weburl import AmbiguousUrlError, folded, normal_path
from offload_core.errors import InvalidValueError
from tests.unit.builder.egress.policy.texts import NOW, attempt, findings, read

TOP = 'posture = "allowlist"\nproxied = true\npool = "eu-1"\n'
GITHUB = """
[[rule]]
id = "our-code"
allow = ["https://github.com/our-org/*", "https://repo.example.com:8443/one.tar"]
"""
NO_SECRETS = """
[[rule]]
id = "no-secrets"
deny = ["https://github.com/our-org/secret/"]
"""
HOSTS = """
[[rule]]
id = "hosts"
allow = ["github.com", "*.example.com"]
"""


def verdict(text: str, url: str):
    return UrlEvaluator(read(text)).verdict(parse_attempt(url), NOW)


def allows(text: str, url: str) -> bool:
    return verdict(text, url).allowed


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://GitHub.com/our-org/*", "https://github.com/our-org/"),
        ("https://github.com:443/our-org/", "https://github.com/our-org/"),
        ("HTTP://github.com:443/x", "http://github.com:443/x"),
        ("https://*.example.com", "https://*.example.com/"),
        ("https://example.com./%7ejoe/%c3%bc", "https://example.com/~joe/%C3%BC"),
        ("https://bücher.example/x", "https://xn--bcher-kva.example/x"),
    ],
)
def test_a_url_is_read_in_one_form(written: str, meant: str) -> None:
    assert str(parse_target(written)) == meant


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("ftp://example.com/", "no URL of http or https"),
        ("https://joe:x@example.com/", "has a login"),
        ("https://example.com/?a=1", "query or fragment"),
        ("https://example.com/#a", "query or fragment"),
        ("https://10.0.0.1/x/", "judged by name"),
        ("https://[::1]/x/", "judged by name"),
        ("https://example.com/*/x", "* where none can be"),
        ("https://ex*.com/", "* where none can be"),
        ("https://*/", "every name"),
        ("https://localhost/", "the step itself"),
        ("https://example.com/a/../b/", "segment of dots"),
        ("https://example.com/a%2fb/", "escaped slash"),
        ("https://example.com//b/", "two slashes"),
        ("https://example.com:0/", "not between"),
        ("https://faß.example/", "xn--"),
        ("example.com/x", 'write "https://example.com/x"'),
    ],
)
def test_what_could_be_misunderstood_is_no_target(written: str, why: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        parse_target(written)
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("rule", "layer", "said"),
    [
        ('allow = ["https://a.example/"]', Layer.POOL, "needs proxied = true at its top"),
        ('deny = ["https://a.example/"]', Layer.PROJECT, "needs proxied = true at its top"),
        ('allow = ["https://a.example/"]', Layer.BUILD, "no place in the policy of a build"),
    ],
)
def test_urls_need_the_proxy(rule: str, layer: Layer, said: str) -> None:
    top = 'posture = "allowlist"\n' if layer is Layer.POOL else ""
    [found] = findings(f'{top}[[rule]]\nid = "x"\n{rule}\n', layer)
    assert found.startswith(f"p:{4 if top else 3}: https://a.example/")
    assert said in found


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("ports = [443]", "p:7: a URL has its port in it; leave ports out"),
        ('protocol = "udp"', "p:7: a URL has its port in it; leave protocol out"),
    ],
)
def test_urls_have_no_further_keys(more: str, said: str) -> None:
    text = f'{TOP}[[rule]]\nid = "x"\nallow = ["https://a.example/"]\n{more}\n'
    assert said in findings(text)


def test_urls_stand_alone_in_a_rule() -> None:
    text = f'{TOP}[[rule]]\nid = "x"\nallow = [\n"a.example",\n"https://b.example/"]\n'
    assert findings(text) == ["p:8: URLs need a rule of their own, without other targets"]


def test_a_prefix_and_an_exact_path_are_allowed() -> None:
    text = TOP + GITHUB
    assert allows(text, "https://github.com/our-org/app.git/info/refs?service=x#y")
    assert allows(text, "https://u:p@GitHub.com.:443/our-org/")
    assert allows(text, "https://github.com/%6Fur-org/x")
    assert allows(text, "https://repo.example.com:8443/one.tar")
    for url in (
        "https://github.com/", "https://github.com/our-org", "https://github.com/our-organ/x",
        "https://github.com/OUR-ORG/x", "http://github.com/our-org/x",
        "http://github.com:443/our-org/x", "https://github.com:8443/our-org/x",
        "https://repo.example.com/one.tar", "https://repo.example.com:8443/one.tar/x",
        "https://a.github.com/our-org/x",
    ):  # fmt: skip
        assert not allows(text, url), url


def test_a_server_is_reachable_below_urls_but_not_by_other_means() -> None:
    policy = read(TOP + GITHUB)
    connections = Evaluator(policy)
    assert connections.name("github.com", NOW).allowed
    assert connections.verdict(attempt("github.com", port=443), NOW).allowed
    assert not connections.verdict(attempt("github.com", port=22), NOW).allowed
    assert connections.verdict(attempt("repo.example.com", port=8443), NOW).allowed
    # Something else than HTTP on the port of the URL, such as git over ssh.
    assert not UrlEvaluator(policy).verdict(attempt("github.com", port=443), NOW).allowed


def test_a_denied_url_wins_over_an_allowed_host_and_leaves_the_rest() -> None:
    text = TOP + HOSTS + NO_SECRETS
    assert allows(text, "https://github.com/our-org/app")
    assert Evaluator(read(text)).name("github.com", NOW).allowed
    for path in ("secret/x", "SECRET/x", "secret", "secret;v=1/x", "%73ecret/x", "secret%20/x"):
        found = verdict(text, f"https://github.com/our-org/{path}")
        assert not found.allowed, path
        assert (found.rule_id, str(found.place)) == ("no-secrets", "policy.toml:9")
    assert not allows(TOP + GITHUB + NO_SECRETS, "https://github.com/our-org/secret/x")


@pytest.mark.parametrize(
    "path",
    [
        "our-org/../evil", "our-org/%2e%2e/evil", "our-org/.%2E/evil", "our-org/..%2fevil",
        "our-org%2f..%2fevil", "our-org//evil", "/our-org/x", "our-org/..;/evil",
        "our-org/;x/../evil", "our-org/%252e%252e/evil", "our-org/%25252e%25252e%25252fevil",
        "our-org/..%5cevil", "our-org/..\\evil", "our-org/x%00/..", "our-org/%c0%ae%c0%ae/evil",
        "our-org/%ef%bc%8e%ef%bc%8e/evil", "our-org/.. /evil", "our-org/%2e%2e%20/evil",
        "our-org/x%0d%0aHost:evil", "our-org/%zz", "our-org/%u002e", "our-org/ä", "our-org/a b",
        "our-org/./x", "our-org/...", "our-org/" + "x" * 5000,
    ],
)  # fmt: skip
def test_a_path_that_servers_may_read_differently_is_refused(path: str) -> None:
    for text in (TOP + GITHUB, TOP + HOSTS + NO_SECRETS, TOP + GITHUB + HOSTS):
        found = verdict(text, f"https://github.com/{path}")
        assert not found.allowed
        assert found.rule_id == "ambiguous-url"
        assert found.place.line
    # Nobody looks at paths where no rule names a URL of the server.
    assert allows(TOP + HOSTS + NO_SECRETS, f"https://a.example.com/{path}")


def readings(path: str) -> set[str]:
    """What servers may make of a path."""
    found = {path}
    for _ in range(4):
        for text in list(found):
            decoded = unquote(text, errors="ignore")
            found |= {decoded, decoded.replace("\\", "/"), re.sub(";[^/]*", "", decoded)}
            found.add(re.sub("/+", "/", decoded))
            found.add(posixpath.normpath("/" + text.lstrip("/")))
    return found


PIECES = st.sampled_from(
    ["/", "//", ".", "..", "%2e", "%2E", "%2f", "%5c", "\\", "%25", "2e", "2f", ";", "x", "our-org",
     "evil", "%", "%00", "~", "%7e", "%c3%bc", "%c0%ae", "ü", "\uff0e", " ", "%20", "?", "#", "a",
     "*"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=14).map("".join))
@example("%2e%2e%2f%2e%2e")
@example("..;/..;/evil")
def test_no_reading_of_an_allowed_path_is_outside_of_its_prefix(rest: str) -> None:
    rule = parse_target("https://h.example/our-org/")
    try:
        path = normal_path(parse_web_url(f"https://h.example/our-org/{rest}").path)
    except (AmbiguousUrlError, InvalidValueError):
        return
    assert rule.allows(path)
    for reading in readings(path):
        assert f"{reading}/".startswith("/our-org/"), reading


@given(st.lists(PIECES, max_size=10).map("".join), st.lists(PIECES, max_size=6).map("".join))
def test_a_denied_path_is_denied_however_it_is_written(before: str, after: str) -> None:
    rule = parse_target("https://h.example/our-org/evil/")
    try:
        path = normal_path(parse_web_url(f"https://h.example/{before}our-org/evil/{after}").path)
    except (AmbiguousUrlError, InvalidValueError):
        return
    if any(reading.startswith("/our-org/evil/") for reading in readings(path)):
        assert rule.denies(folded(path))


@given(st.lists(PIECES, max_size=14).map("".join))
def test_a_normal_path_stays_as_it_is(rest: str) -> None:
    try:
        path = normal_path(f"/{rest}")
    except AmbiguousUrlError:
        return
    assert normal_path(path) == path


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        found = parse_web_url(f"https://{text}")
    except InvalidValueError:
        return
    assert re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", found.host)
    assert 0 < found.port < 65536


@pytest.mark.parametrize(
    "url",
    ["https://a@b@c.example/", "https://c.example\\@d.example/", "https://127.1/",
     "https://2130706433/", "https://0x7f000001/", "https://[fe80::1%25eth0]/", "https://b%C3%BC/",
     "https://a b/", "https:///x", "https:x", "https://ü.example/", "https://a:b:c/"],
)  # fmt: skip
def test_a_server_that_programs_may_read_differently_is_refused(url: str) -> None:
    with pytest.raises(InvalidValueError):
        parse_web_url(url)


def test_a_project_may_allow_urls_of_what_its_pool_lets_it() -> None:
    pool = read(
        f'{TOP}projects_may_allow = ["https://github.com/our-org/", "a.example"]\n'
        '[[rule]]\nid = "no"\ndeny = ["https://a.example/no/"]\n'
    )
    project = read(
        'proxied = true\n[[rule]]\nid = "x"\nallow = ["https://github.com/our-org/a/", '
        '"https://github.com/x/", "https://a.example/yes/", "https://a.example/no/x"]\n',
        Layer.PROJECT,
    )
    merged = merge(pool, project)
    assert [str(rule) for rule in merged.policy.rules[1:]] == [
        "allow https://github.com/our-org/a/, https://a.example/yes/"
    ]
    assert len(merged.refused) == 2


def test_rules_that_contradict_are_found_by_url_too() -> None:
    assert any("can never allow" in item for item in findings(
        f'{TOP}[[rule]]\nid = "d"\ndeny = ["github.com"]\n{GITHUB.replace(", ", " ] # ")}'
    ))  # fmt: skip
    assert any("adds nothing" in item for item in findings(
        TOP + HOSTS + '[[rule]]\nid = "x"\nallow = ["https://github.com/a/"]\n'
    ))  # fmt: skip


def test_differences_know_urls() -> None:
    old = read(TOP + GITHUB)
    wider = read(TOP + GITHUB.replace("/our-org/*", ""))
    (change,) = differences(old, wider)
    assert change.effect.value == "wider"
    (change,) = differences(wider, old)
    assert change.effect.value == "narrower"
    (change,) = differences(old, read(TOP + GITHUB + NO_SECRETS))
    assert change.effect.value == "narrower"
    other = GITHUB.replace("https://github.com/our-org/*", "https://github.com/other/")
    (change,) = differences(old, read(TOP + other))
    assert change.effect.value == "wider and narrower"


def test_urls_are_explained() -> None:
    policy = read(TOP + GITHUB)
    told = explain(policy, parse_attempt("https://github.com/our-org/x"), now=NOW)
    assert told.verdict.allowed
    assert told.verdict.reason == 'the rule "our-code" allows https://github.com/our-org/x'
    told = explain(policy, parse_attempt("https://github.com/x/y"), now=NOW)
    assert told.verdict.reason == (
        'no rule of pool eu-1 allows https://github.com/x/y; the rule "our-code" (policy.toml:5) '
        "is about other URLs of this server"
    )
    assert told.proposal.endswith('allow = ["https://github.com/x/y"]')
    assert any("our-code" in note for note in told.notes)
    told = explain(policy, parse_attempt("github.com:443"), now=NOW)
    assert any("of this server https://github.com/our-org/" in note for note in told.notes)
    host = read(f'posture = "allowlist"\n{HOSTS}')
    told = explain(host, parse_attempt("https://github.com/x"), now=NOW)
    assert told.verdict.allowed
    assert "proxied = true" in told.notes[0]


def test_clusters_do_not_get_urls() -> None:
    made = export(read(TOP + GITHUB + NO_SECRETS))
    assert "github.com" not in re.sub("(?m)^#.*$", "", made.text)
    assert any("allow https://github.com/our-org/" in gap for gap in made.gaps)
    assert any("deny https://github.com/our-org/secret/" in gap for gap in made.gaps)


def test_urls_are_learned_below_their_first_part() -> None:
    urls = ["https://h.example/a/b", "https://h.example/a/c", "https://h.example/d",
            "http://h.example:81//x"]  # fmt: skip
    attempts = [parse_attempt(url) for url in urls]
    attempts += [attempt("h.example"), attempt("ssh.example", port=22)]
    policy = read(learn(attempts, by_url=True))
    assert policy.proxied
    assert [str(rule) for rule in policy.rules] == [
        "allow https://h.example/a/, https://h.example/d",
        "allow h.example port 81 tcp",
        "allow ssh.example port 22 tcp",
    ]
    assert "https" not in learn(attempts)


def test_what_is_shown_of_a_url_is_short_and_does_nothing_to_a_terminal() -> None:
    shown = str(parse_web_url(f"https://joe:pw@a.example/\x1b[31m\n{'x' * 9000}?token=y"))
    assert shown.startswith("https://a.example/?[31m?xx")
    assert len(shown) < 600
    assert "pw" not in shown


def test_thousands_of_urls_of_one_server_are_judged_in_a_moment() -> None:
    urls = ", ".join(f'"https://h.example/p{number}/"' for number in range(5000))
    rules = f'{TOP}[[rule]]\nid = "d"\ndeny = [{urls}]\n[[rule]]\nid = "h"\nallow = ["h.example"]'
    evaluator = UrlEvaluator(read(rules))
    wanted = parse_attempt("https://h.example/else/x")
    assert evaluator.verdict(wanted, NOW).allowed
    began = time.thread_time()
    for _ in range(10):
        evaluator.verdict(wanted, NOW)
    assert time.thread_time() - began < 2


def test_a_build_narrows_urls_by_host() -> None:
    build = read('posture = "allowlist"\n[[rule]]\nid = "b"\nallow = ["github.com"]', Layer.BUILD)
    evaluator = UrlEvaluator(narrow(read(TOP + GITHUB), build))
    assert evaluator.verdict(parse_attempt("https://github.com/our-org/x"), NOW).allowed
    assert not evaluator.verdict(parse_attempt("https://github.com/x"), NOW).allowed
    beyond = evaluator.verdict(parse_attempt("https://repo.example.com:8443/one.tar"), NOW)
    assert (beyond.allowed, beyond.layer) == (False, Layer.BUILD)
    assert (
        not UrlEvaluator(narrow(read(TOP + GITHUB), NO_NETWORK))
        .verdict(parse_attempt("https://github.com/our-org/x"), NOW)
        .allowed
    )


def test_a_rule_that_has_ended_does_not_count_for_urls() -> None:
    text = TOP + GITHUB + "expires = 2030-05-31\n"
    policy = read_text(text, file="p", version=3, now=NOW).require()
    before = datetime(2030, 5, 1, tzinfo=UTC)
    wanted = parse_attempt("https://github.com/our-org/x")
    assert UrlEvaluator(policy).verdict(wanted, before).allowed
    assert not UrlEvaluator(policy).verdict(wanted, NOW).allowed
