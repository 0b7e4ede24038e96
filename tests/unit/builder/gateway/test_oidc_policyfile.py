"""What `identity.toml` may say, and in which line a mistake is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from offload_builder.gateway.oidc.policyfile import read_policy
from offload_builder.tomllines import TomlLines
from offload_core.errors import ConfigError
from offload_proto.v1 import identity_service_pb2 as identity_pb

HEAD = """audience = "offload.test"

[issuer.github]
preset = "github"

[issuer.corp]
url = "https://login.example"
client_id = "offload-cli"
"""
RULE = """
[[rule]]
name = "{name}"
issuer = "{issuer}"
when = {when}
role = "{role}"
projects = ["app"]
"""


def rule(name="r", issuer="github", when='{ repository = "acme/app" }', role="ci"):
    return RULE.format(name=name, issuer=issuer, when=when, role=role)


@pytest.fixture
def read(tmp_path):
    def read_text(text):
        path = tmp_path / "identity.toml"
        path.write_text(text)
        return read_policy(path)

    return read_text


@pytest.fixture
def complaint(read):
    def of(text):
        with pytest.raises(ConfigError) as caught:
            read(text)
        return caught.value.message

    return of


def test_presets_fill_in_what_is_not_said(read):
    policy = read(HEAD + rule())
    github = policy.issuers["github"]
    assert github.url == "https://token.actions.githubusercontent.com"
    assert (github.audiences, github.replay) == (("offload.test",), "once")
    assert github.certificate_lifetime == 3600.0
    assert policy.person is policy.issuers["corp"]
    assert policy.person.audiences == ("offload-cli",)
    assert policy.rules[0].role == identity_pb.ROLE_CI
    assert policy.rules[0].line == 10


def test_circleci_tokens_are_for_the_organisation(read):
    text = '[issuer.circle]\npreset = "circleci"\nurl = "https://oidc.circleci.com/org/1234-abcd"\n'
    assert read(text).issuers["circle"].audiences == ("1234-abcd",)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("colour = 1\n", 1, "unknown key"),
        ('[issuer.a]\nurl = "https://a.example"\naudience = "x"\nalgorithms = ["none"]\n', 4,
         "not allowed"),
        ('[issuer.a]\nurl = "https://a.example"\naudience = "x"\nalgorithms = ["HS256"]\n', 4,
         "not allowed"),
        ('[issuer.a]\nurl = "http://a.example"\naudience = "x"\n', 2, "https"),
        ('[issuer.a]\nurl = "https://u@a.example"\naudience = "x"\n', 2, "neither a user"),
        ('[issuer.a]\nurl = "https://a.example"\n', 1, "needs an audience"),
        ('[issuer.a]\nurl = "https://a.example"\naudience = ""\n', 1, "needs an audience"),
        ('[issuer.a]\naudience = "x"\n', 1, "needs the url"),
        ('[issuer.A]\nurl = "https://a.example"\n', 1, "cannot name an issuer"),
        ('[issuer.a]\npreset = "hub"\n', 2, "no preset"),
        ('[issuer.a]\npreset = "github"\naudience = "x"\nclock_skew = "1h"\n', 4, "5 minutes"),
        ('[issuer.a]\npreset = "github"\naudience = "x"\ncertificate_lifetime = "2d"\n', 4, "most"),
        ('[issuer.a]\npreset = "github"\naudience = "x"\nreplay = "always"\n', 4, "replay is one"),
        ('[issuer.a]\npreset = "github"\naudience = "x"\nclient_id = "c"\n', 1, "is for people"),
        (('[issuer.a]\npreset = "github"\naudience = "x"\n[issuer.b]\npreset = "github"\n'
         'audience = "x"\n'), 4, "has the url"),
        ('[issuer.a]\nurl = "https://a.example"\naudience = "x"\n[issuer.a.claims]\nbranch = "ref"\n',  # noqa: E501
         5, "same for every token"),
        ('[issuer.a]\nurl = "https://a.example"\naudience = "x"\n[issuer.a.claims]\nbranch = "{ref"\n',  # noqa: E501
         5, "braces"),
        ('[issuer.a]\nurl = "https://a.example"\naudience = "x"\nca_file = "no.pem"\n', 4,
         "certificates"),
    ],
)  # fmt: skip
def test_mistake_of_an_issuer_is_named_with_its_line(complaint, text, line, words):
    sentence = complaint(text)
    assert f"identity.toml, line {line}: " in sentence
    assert words in sentence


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (rule(issuer="gitlab"), 12, "there is no issuer"),
        (rule(role="root"), 14, "there is no role"),
        (rule(role="node"), 14, "there is no role"),
        (rule(role="admin"), 14, "only people"),
        (rule(when="{ }"), 10, "no condition"),
        (rule(when="{ repository = [] }"), 13, "empty list"),
        (rule(when="{ repository = 1.5 }"), 13, "must be a text"),
        (rule() + rule(), 18, "two rules"),
        (rule() + "colour = 1\n", 16, "unknown key"),
        (rule().replace('["app"]', '["App!"]'), 15, "name of a project"),
        (rule().replace('["app"]', '["*", "app"]'), 15, "name of a project"),
        (rule().replace('["app"]', '"app"'), 15, "must be"),
    ],
)
def test_mistake_of_a_rule_is_named_with_its_line(complaint, text, line, words):
    sentence = complaint(HEAD + text)
    assert f"identity.toml, line {line}: " in sentence
    assert words in sentence


@pytest.mark.parametrize(
    "when",
    [
        '{ ref = "refs/heads/main" }',
        '{ repository = "*/app" }',
        '{ repository = "**" }',
        '{ repository = "*" }',
        '{ repository = "acme*" }',
        '{ repository = "acme*/app" }',
        '{ repository = ["acme/app", "*/app"] }',
        '{ repository_owner = "acme*" }',
        '{ sub = "repo:*" }',
        '{ sub = "repo:*/app:ref:refs/heads/main" }',
        '{ sub = "repo:acme*/app:ref:refs/heads/main" }',
        '{ sub = "**:ref:refs/heads/main" }',
        '{ job_workflow_ref = "acme/flows/.github/workflows/a.yml@refs/heads/main" }',
        '{ actor = "alice" }',
    ],
)
def test_rule_that_would_let_strangers_in_is_refused(complaint, when):
    sentence = complaint(HEAD + rule(when=when))
    assert "whose runs it means" in sentence or "matches whatever" in sentence


@pytest.mark.parametrize(
    "when",
    [
        '{ repository = "acme/*" }',
        '{ repository_owner = "acme", ref = "refs/heads/**" }',
        "{ repository_id = 1234 }",
        '{ sub = "repo:acme/app:*" }',
    ],
)
def test_rule_with_an_owner_is_taken(read, when):
    assert len(read(HEAD + rule(when=when)).rules) == 1


def test_lines_of_inline_and_nested_tables_and_long_texts():
    text = 'a = """\n[[rule]]\n"""\n[[rule]]\nx = 1\n[rule.when]\ny = 2\n[[rule]]\nwhen.z = 3\n'
    lines = TomlLines(text)
    assert lines.of("rule", 0) == 4
    assert lines.of("rule", 0, "x") == 5
    assert lines.of("rule", 0, "when", "y") == 7
    assert lines.of("rule", 1, "when", "z") == 9
    assert lines.of("rule", 1, "missing") == 8


def test_file_that_is_not_toml_is_named_with_its_line(complaint):
    assert "line 2" in complaint('a = "x"\nb = \n')


def test_examples_in_the_documentation_can_be_used(read):
    page = (Path(__file__).parents[4] / "docs" / "identity.md").read_text("utf-8")
    examples = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert [len(read(text).rules) for text in examples] == [3, 0]
