"""Plans read without buildx, and next to those of the real buildx."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_client.bake.planning import list_text, make_plan
from offload_client.bake.request import BakeRequest
from offload_client.invocation import Invocation
from offload_core.errors import OffloadError

BUILDX = Path(__file__).resolve().parents[4] / ".tools/bin/buildx"
FILE = """
variable "TAG" {
  default = "latest"
  description = "of all images"
}
variable "COUNT" { default = 3 }
variable "FAST" { default = false }
variable "REF" { default = "reg/${TAG}" }
PREFIX = "acme"
group "default" { targets = ["app", "web"] }
group "all" { targets = ["default", "tool"] }
target "common" {
  args = { BASE = "alpine", N = COUNT, FAST = FAST, NOTHING = null }
  labels = { team = "a" }
  platforms = ["linux/amd64"]
  no-cache-filter = ["one"]
}
target "base" { dockerfile = "base.Dockerfile" }
target "app" {
  inherits = ["common"]
  context = "src"
  contexts = { base = "target:base", docs = "./docs" }
  args = { BASE = "debian", "x.y" = "1" }
  tags = ["${PREFIX}/app:${TAG}", REF]
  output = ["type=local,dest=out", "other"]
  cache-from = ["type=registry,ref=a/b"]
  cache-to = ["type=inline"]
  no-cache-filter = ["two"]
}
target "web" {
  name = "web-${os}-${item.tag}"
  matrix = {
    os = ["linux", "bsd"]
    item = [{ tag = "a", v = 1 }, { tag = "b", v = 2 }]
  }
  args = { V = item.v }
  dockerfile-inline = <<-EOT
    FROM scratch
      LABEL x=$${KEPT} os=${os}
  EOT
}
target "tool" {
  context = target.app.context
  target = FAST ? "fast" : "slow"
  pull = true
  network = "none"
}
"""
COMPOSE = """
services:
  web:
    image: web:${V:-1}
    build:
      context: ./w
      dockerfile: D
      args: {A: "1", B: "${V}"}
      target: t
      labels: ["a=b"]
      additional_contexts: {base: "service:db", docs: ./docs}
      platforms: [linux/amd64]
      x-bake:
        tags: ["x:1"]
        no-cache: true
  db:
    build: ./db
    image: db
  plain:
    image: alpine
"""


@pytest.fixture
def invoke(tmp_path: Path):
    """Return how a command is started in a folder of its own."""
    null = os.open(os.devnull, os.O_RDWR)
    stream = Path(os.devnull).open("w")  # noqa: SIM115 - closed below
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OFFLOAD_BUILDX": "none"}

    def make(**more: str) -> Invocation:
        return Invocation([], tmp_path, {**environment, **more}, null, stream, stream)

    yield make
    stream.close()
    os.close(null)


def plan_of(
    invocation: Invocation, request: BakeRequest, text: str, name: str = "docker-bake.hcl"
) -> dict[str, Any]:
    (invocation.cwd / name).write_text(text)
    shown: dict[str, Any] = json.loads(make_plan(invocation, request).document())
    return shown


SAME = [
    ({}, {}),
    ({"targets": ["all"]}, {"TAG": "v2", "COUNT": "7", "FAST": "true"}),
    ({"targets": ["tool", "b*"]}, {}),
    ({"targets": ["web-linux-a"], "push": True}, {}),
    ({"targets": ["base"], "load": True, "no_cache": True, "pull": False}, {}),
    ({"targets": ["app"], "load": True, "push": True}, {}),
    (
        {
            "targets": ["app"],
            "overrides": [
                "*.args.Z=1", "app.platform=linux/arm64", "app.args.FROM_ENV", "app.tags=t:1",
                "app.tags=t:2", "*.contexts.extra=./e", "*.target=x",
            ],
        },
        {"FROM_ENV": "yes"},
    ),
    ({"targets": ["app"], "provenance": "false", "sbom": "true"}, {}),
    # Not both together: buildx takes them in an order of chance.
    ({"targets": ["tool"], "overrides": ["tool.output=type=image,push=true"]}, {}),
    ({"targets": ["tool"], "overrides": ["*.push=false"]}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "environment"), SAME)
def test_plan_is_that_of_buildx(invoke, asked: dict[str, Any], environment: dict[str, str]):
    request = BakeRequest(**asked)
    own = plan_of(invoke(**environment), request, FILE)
    theirs = plan_of(invoke(**environment, OFFLOAD_BUILDX=str(BUILDX)), request, FILE)
    assert _sorted(own) == _sorted(theirs)


def test_push_is_decided_after_the_outputs_that_it_is_about(invoke):
    overrides = ["*.push=false", "tool.output=type=image,push=true"]
    for words in (overrides, overrides[::-1]):
        plan = plan_of(invoke(), BakeRequest(targets=["tool"], overrides=words), FILE)
        assert plan["target"]["tool"]["output"] == [{"push": "false", "type": "image"}]


@pytest.mark.parametrize("environment", [{}, {"V": "2"}])
def test_compose_plan_is_that_of_buildx(invoke, environment: dict[str, str]):
    own = plan_of(invoke(**environment), BakeRequest(), COMPOSE, "compose.yaml")
    theirs = plan_of(
        invoke(**environment, OFFLOAD_BUILDX=str(BUILDX)), BakeRequest(), COMPOSE, "compose.yaml"
    )
    assert _sorted(own) == _sorted(theirs)


def _sorted(plan: dict[str, Any]) -> dict[str, Any]:
    for group in plan["group"].values():
        group["targets"].sort()
    return plan


def test_json_file_means_the_same(invoke):
    document = {
        "variable": {"TAG": {"default": "1"}},
        "group": {"default": {"targets": ["a"]}},
        "target": {"a": {"tags": ["a:${TAG}"], "args": {"X": "${TAG}${TAG}"}}},
    }
    plan = plan_of(invoke(), BakeRequest(), json.dumps(document), "docker-bake.json")
    assert plan["target"]["a"]["tags"] == ["a:1"]
    assert plan["target"]["a"]["args"] == {"X": "11"}


def test_later_file_changes_targets_of_an_earlier_one(invoke):
    invocation = invoke()
    (invocation.cwd / "docker-bake.override.hcl").write_text('target "a" {\n tags = ["b"]\n}\n')
    plan = plan_of(
        invocation,
        BakeRequest(targets=["a"]),
        'target "a" {\n tags = ["a"]\n target = "x"\n}\n',
    )
    assert plan["target"]["a"] == {
        "context": ".", "dockerfile": "Dockerfile", "tags": ["b"], "target": "x",
    }  # fmt: skip


def test_compose_on_standard_input(invoke, tmp_path: Path):
    (tmp_path / "in").write_text(COMPOSE)
    file = os.open(tmp_path / "in", os.O_RDONLY)
    try:
        invocation = replace(invoke(), stdin=file)
        plan = make_plan(invocation, BakeRequest(files=["-"]))
    finally:
        os.close(file)
    assert set(plan.targets) == {"web", "db"}
    assert plan.needs("web") == {"base": "db"}


WRONG = [
    ('target "a" {\n tags = [upper("x")]\n}\n', {"targets": ["a"]}, "the function upper()"),
    ('function "f" {\n params=[]\n result=1\n}\n', {}, 'the function "f"'),
    ('target "a" {\n colour = "red"\n}\n', {"targets": ["a"]}, 'no field "colour"'),
    ('target "a" {\n tags = "x"\n}\n', {"targets": ["a"]}, "target a: tags is not a list"),
    ('target "a" {\n', {"targets": ["a"]}, "docker-bake.hcl:2: this is not HCL"),
    ('target "a" {\n tags = [NO]\n}\n', {"targets": ["a"]}, 'no variable named "NO"'),
    ('A = B\nB = A\ntarget "a" {\n tags = [A]\n}\n', {"targets": ["a"]}, "depends on itself"),
    ('target "a" {}\n', {"targets": ["b"]}, "failed to find target b"),
    ('target "a" {}\n', {"targets": ["x*"]}, "could not find any target matching 'x*'"),
    ('target "a" {}\n', {"targets": ["a"], "overrides": ["a=1"]}, "expected target.name"),
    ('target "a" {}\n', {"targets": ["a"], "overrides": ["a.x=1"]}, "unknown key: x"),
    ('target "a" {}\n', {"targets": ["a"], "overrides": ["b.args.x=1"]}, "matching 'b'"),
    ('target "a" {\n contexts = { x = "target:a" }\n}\n', {"targets": ["a"]}, "link to itself"),
    (('target "a" {\n contexts = { x = "target:b" }\n}\ntarget "b" {\n'
     ' contexts = { x = "target:a" }\n}\n'), {"targets": ["a"]}, "infinite loop"),
    ('target "a" {\n matrix = { x = ["1"] }\n}\n', {"targets": ["a"]}, 'no "name"'),
    ('target "a" {\n args = "x"\n}\n', {"targets": ["a"]}, "target a: args is not an object"),
    ('target "a" {\n inherits = 1\n}\n', {"targets": ["a"]}, "inherits is not a list"),
    ('target "a" {\n tags = [target.a.tags]\n}\n', {"targets": ["a"]}, "depends on itself"),
    ('target "a" {\n output = ["a\\rb"]\n}\n', {"targets": ["a"]}, "entry of output"),
]  # fmt: skip
WRONG_COMPOSE = [
    ("ulimits: {nofile: {soft: 1}}", '"nofile" of "ulimits"'),
    ("ulimits: [1]", '"ulimits" is not a mapping'),
    ("args: 1", '"args" is neither a mapping nor a list'),
    ("labels: x", '"labels" is neither'),
    ("secrets: x", '"secrets" of "build" is not a list'),
    ("secrets: [s]", '"secrets" is not a mapping'),
    ("x-bake: [a]", '"x-bake" is not a mapping'),
]


@pytest.mark.parametrize(("text", "asked", "words"), WRONG)
def test_wrong_files_are_one_sentence(invoke, text: str, asked: dict[str, Any], words: str):
    with pytest.raises(OffloadError) as caught:
        plan_of(invoke(), BakeRequest(**asked), text)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("line", "words"), WRONG_COMPOSE)
def test_compose_fields_of_another_kind_are_one_sentence(invoke, line: str, words: str):
    text = f"services:\n  a:\n    build:\n      {line}\nsecrets: [s]\n"
    with pytest.raises(OffloadError) as caught:
        plan_of(invoke(), BakeRequest(), text, "compose.yaml")
    assert words in caught.value.message
    assert caught.value.message.startswith("compose.yaml: a: ")


def test_dotenv_matters_to_compose_files_only(invoke, tmp_path: Path):
    (tmp_path / ".env").write_bytes(b"A=\xff")
    assert plan_of(invoke(), BakeRequest(targets=["tool"]), FILE)["target"]
    with pytest.raises(OffloadError, match=r"cannot read .*\.env"):
        plan_of(invoke(), BakeRequest(), "services: {a: {build: .}}\n", "compose.yaml")


def test_refusal_of_buildx_is_told_in_its_words(invoke):
    with pytest.raises(OffloadError) as caught:
        plan_of(invoke(OFFLOAD_BUILDX=str(BUILDX)), BakeRequest(targets=["nosuch"]), FILE)
    assert caught.value.message == "failed to find target nosuch"
    assert caught.value.exit_code == 1


def test_no_file_is_said(invoke):
    with pytest.raises(OffloadError, match="couldn't find a bake definition"):
        make_plan(invoke(), BakeRequest())


def test_compose_extends_needs_buildx(invoke):
    text = "services:\n  a:\n    extends: {service: b}\n    build: .\n"
    with pytest.raises(OffloadError, match='"extends" of service a'):
        plan_of(invoke(), BakeRequest(), text, "compose.yaml")


def test_lists_show_targets_and_variables(invoke):
    invocation = invoke(TAG="v9")
    (invocation.cwd / "docker-bake.hcl").write_text(FILE)
    targets = list_text(invocation, BakeRequest(listed="targets")).splitlines()
    assert targets[0].split() == ["TARGET", "DESCRIPTION"]
    assert "default   app, web" in " ".join(targets).replace("       ", "   ")
    variables = json.loads(list_text(invocation, BakeRequest(listed="type=variables,format=json")))
    assert {"name": "TAG", "value": "v9", "description": "of all images"} in variables
    with pytest.raises(OffloadError, match="invalid --list"):
        list_text(invocation, BakeRequest(listed="colours"))
