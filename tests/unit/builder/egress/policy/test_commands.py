"""`offload-builder policy` on files: output, exit codes, and files that nobody would write."""

from __future__ import annotations

import json

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.cli.entry import main
from offload_builder.egress.policy.reading import read_text
from offload_core.errors import ConfigError

GOOD = 'posture = "allowlist"\npresets = ["pypi"]\n'
BAD = 'posture = "allowlist"\n[[rule]]\nid = "a"\nallow = ["a.example"]\nports = [0]\n'


def run(*arguments: str, code: int = 0, text: str | None = None) -> tuple[str, str]:
    done = CliRunner().invoke(main, ["policy", *arguments], input=text)
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    return path


def test_check_tells_mistakes_with_their_lines_and_ends_with_3(file):
    assert run("check", str(file))[0] == f"{file} is valid: 1 rules, posture allowlist\n"
    file.write_text(BAD)
    out, err = run("check", str(file), code=3)
    assert out == ""
    assert err == f"{file}:5: the port 0 is not between 1 and 65535\n"
    told = json.loads(run("check", str(file), "--format", "json", code=3)[0])
    assert told["ok"] is False
    assert told["findings"][0]["line"] == 5


def test_check_knows_whose_policy_it_is(file):
    file.write_text('presets = ["pypi"]\n')
    assert "needs a posture" in run("check", str(file), code=3)[1]
    assert "posture the pool's" in run("check", str(file), "--for", "project")[0]
    assert "posture allowlist" in run("check", str(file), "--for", "build")[0]


def test_explain_ends_with_4_for_what_is_refused(file):
    out, _ = run("explain", "pypi.org:443", "--file", str(file))
    assert out.startswith("Allowed    pypi.org:443\nRule       preset-pypi: allow pypi.org")
    out, _ = run("explain", "[2001:db8::1]:22", "--file", str(file), code=4)
    assert 'allow = ["2001:db8::1"]' in out
    out, _ = run("explain", "pypi.org:22", "--file", str(file), "--format", "json", code=4)
    told = json.loads(out)
    assert (told["rule"], told["allowed"]) == ("default-deny", False)
    assert told["notes"] == [f'the rule "preset-pypi" allows 443 (tcp) only ({file}:2)']
    arguments = ("pypi.org:443", "--address", "10.0.0.1", "--file", str(file))
    assert "protected-private" in run("explain", *arguments, code=4)[0]
    assert "icmp" in run("explain", "8.8.8.8", "--protocol", "icmp", "--file", str(file), code=4)[0]


def test_explain_knows_the_policy_of_a_build(file, tmp_path):
    build = tmp_path / "build.toml"
    build.write_text('[[rule]]\nid = "own"\nallow = ["npm.example"]\n')
    arguments = ("pypi.org:443", "--file", str(file), "--network-policy")
    out, _ = run("explain", *arguments, str(build), code=4)
    assert "no rule of the build allows pypi.org:443" in out
    assert f"the build itself asked for this: see {build}" in out
    out, _ = run("explain", *arguments, "none", code=4)
    assert "--network-policy none" in out


@pytest.mark.parametrize("target", ["pypi.org", "pypi.org:x", "a b:1", ":443", "pypi.org:70000"])
def test_a_target_that_is_none_is_told(file, target):
    _, err = run("explain", target, "--file", str(file), code=1)
    assert err.startswith("ERROR: ")


def test_export_prints_yaml_and_tells_its_gaps(file):
    out, err = run("export", str(file), "--kubernetes", "--label", "app=builder")
    plain, cilium = yaml.safe_load_all(out)
    assert plain["spec"]["podSelector"]["matchLabels"] == {"app": "builder"}
    assert cilium["spec"]["egress"][1]["toFQDNs"][0] == {"matchName": "pypi.org"}
    assert "not expressed: NetworkPolicy: pypi.org" in err
    run("export", str(file), "--kubernetes", "--label", "app", code=125)


def test_learn_reads_reports_and_refuses_other_lines(tmp_path):
    report = '{"host": "x.example", "address": "203.0.113.1", "port": 443, "protocol": "tcp"}\n\n'
    out, _ = run("learn", "-", text=report)
    assert 'allow = ["x.example"]' in out
    assert "line 3 is not a connection" in run("learn", "-", text=report + "{}", code=125)[1]
    assert "line 1" in run("learn", "-", text="[1]", code=125)[1]


pieces = st.sampled_from([
    'posture = "open"', 'posture = "allowlist"', "[[rule]]", "[rule]", "[[rule.x]]", 'id = "a"',
    'allow = ["a.example"]', "allow = [[1]]", 'deny = ["*.b"]', "ports = [443]", 'ports = ["1-"]',
    "expires = 2031-01-01", "expires = 12:00:00", 'protocol = "udp"', "private = 1", 'x = """', "'",
    "presets = [\n", "]", '"pypi"', 'contact = "\\u0000"', "rule = 1", 'projects_may_allow = ["*"]',
])  # fmt: skip


@given(st.lists(pieces | st.text(max_size=20), max_size=8))
def test_whatever_a_file_holds_is_told_in_sentences(lines):
    reading = read_text("\n".join(lines), file="p")
    assert all(item.place.line >= 1 and item.sentence for item in reading.findings)
    assert all("\n" not in str(item) for item in reading.findings)
    if reading.policy is None:
        with pytest.raises(ConfigError):
            reading.require()


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "9" * 5000])
def test_a_value_too_deep_or_too_long_is_told(text):
    (found,) = read_text(text, file="p").findings
    assert "too long or too deep" in found.sentence


def test_urls_are_explained_and_learned(file):
    lines = [
        {"host": "h.example", "address": "203.0.113.1", "port": 443, "protocol": "tcp"},
        {"url": "https://h.example/our/app.git", "protocol": "tcp", "host": None},
        {"url": "docker.io/library/alpine:3", "protocol": "tcp"},
    ]
    report = "\n".join(json.dumps(line) for line in lines)
    plain, _ = run("learn", "-", text=report)
    assert 'allow = ["h.example"]' in plain
    learned, _ = run("learn", "--urls", "-", text=report)
    assert 'allow = ["https://h.example/our/"]' in learned
    file.write_text(learned)
    out, _ = run("explain", "https://h.example/our/x", "--file", str(file))
    assert out.startswith("Allowed    https://h.example/our/x\nRule       learned-urls: ")
    out, _ = run("explain", "https://h.example/x", "--file", str(file), code=4)
    assert "is about other URLs of this server" in out
    _, err = run("explain", "https://h.example\\x/", "--file", str(file), code=1)
    assert "cannot be explained" in err
