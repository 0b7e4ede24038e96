"""The files of deploy/ci build on a real pool, logged in by a real issuer or a token."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.fixtures.contexts import make_context
from tests.fixtures.identityprovider import IdentityProvider
from tests.fixtures.node import NodePool
from tests.fixtures.oidcgateway import ISSUER, RULES
from tests.fixtures.pipelines import (
    GithubJob,
    buildkite_agent,
    buildkite_options,
    dotenv,
    gitlab_jobs,
    jenkins_steps,
    run_gitlab,
    run_script,
)
from tests.fixtures.pool import Member
from tests.fixtures.registry import DockerRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
STEPS = "RUN echo compiled > /out\nRUN echo ::add-mask::x && echo 'a ##[set-output name=b]c'\n"
FAILING = "RUN echo ::error::injected && false\n"


@pytest.fixture
async def provider() -> AsyncIterator[IdentityProvider]:
    async with IdentityProvider() as running:
        yield running


@pytest.fixture
async def pool(provider: IdentityProvider) -> AsyncIterator[NodePool]:
    running = NodePool()
    rules = running.gateway.directory / "identity.toml"
    rules.write_text(ISSUER.format(url=provider.url, further="") + RULES)
    async with running:
        await running.start_node("one")
        yield running


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry"), auth={}) as running:
        yield running


class Repository:
    """A checkout with a Dockerfile, and the files that `offload init` writes for a system."""

    def __init__(self, pool: NodePool, folder: Path, image: str, steps: str = STEPS) -> None:
        self.gateway = f"https://{pool.gateway.address}"
        self.ca = pool.gateway.admin_token.rpartition("_")[2]
        self.token = pool.gateway.admin_token
        self.home = folder / "home"
        self.home.mkdir()
        self.top = make_context(folder / "repository", steps)
        (self.top / ".dockerignore").write_text("*\n!busybox\n")
        self.image = image
        self.environment = Member(self.home, {}).environment

    async def init(self, system: str) -> str:
        """Write the files, with an image of the test's registry."""
        done = await asyncio.to_thread(
            Member(self.home, {}).run, "offload", "init", "--gateway", self.gateway,
            "--ca", self.ca, "--ci", system, cwd=self.top,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for path in self.top.rglob("*"):
            if path.is_file() and b"registry.example" in path.read_bytes():
                path.write_text(path.read_text().replace("registry.example/team/app", self.image))
        return done.stdout

    async def shell(self, text: str, **environment: str) -> str:
        """Run a script in the checkout; return what it printed."""
        done = await asyncio.to_thread(
            run_script, text, {**self.environment, **environment}, self.top, "-eo", "pipefail"
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def check(self, registry: DockerRegistry, tag: str, digest: str) -> None:
        """Check that the registry has the image by this digest."""
        assert DIGEST.fullmatch(digest), digest
        manifests = "/v2/team/app/manifests"
        assert registry.get(f"{manifests}/{tag}") == registry.get(f"{manifests}/{digest}")

    def check_results(self) -> dict[str, str]:
        """Check the files of a build that worked; return the values."""
        results = self.top / "offload-results"
        values = dotenv(results / "build.env")
        metadata = json.loads((results / "metadata.json").read_text())
        assert metadata["containerimage.digest"] == values["OFFLOAD_IMAGE_DIGEST"]
        assert values["OFFLOAD_BUILD_REF"].endswith(values["OFFLOAD_BUILD_ID"])
        check_summary((results / "summary.md").read_text(), values["OFFLOAD_IMAGE_DIGEST"])
        return values


def check_summary(text: str, digest: str) -> None:
    plain = re.sub(r"&#(\d+);", lambda mark: chr(int(mark[1])), text)
    for part in (digest, "steps cached", "| Context |", "Steps: ", "offload logs ", ": built"):
        assert part in plain


def github_job(repository: Repository, provider: IdentityProvider, name: str) -> GithubJob:
    return GithubJob(
        repository.top,
        repository.home / name,
        {
            **repository.environment,
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{provider.url}/job-token?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "job-secret",
        },
    )


async def test_github_workflow_builds_without_a_secret(
    pool: NodePool, provider: IdentityProvider, registry: DockerRegistry, tmp_path: Path
) -> None:
    repository = Repository(pool, tmp_path, f"{registry.address}/team/app")
    await repository.init("github")
    job = github_job(repository, provider, "one")
    done = await asyncio.to_thread(job.run_workflow, ".github/workflows/image.yml", "image")
    assert [ended.returncode for ended in done] == [0, 0, 0], [ended.log for ended in done]
    built = job.steps["image"]
    digest = built.outputs["image-digest"]
    repository.check(registry, "c0ffee", digest)
    assert built.outputs["image-name"] == f"{repository.image}:c0ffee"
    assert json.loads(built.outputs["metadata"])["containerimage.digest"] == digest
    assert f"built {digest} as {built.outputs['build-id']}" in done[-1].log
    check_summary(built.summary, digest)
    orders = [line for line in built.log.splitlines() if "::" in line or "##[" in line]
    assert [line for line in orders if line.startswith("::group::")]
    assert not [line for line in orders if line.startswith("::") and "group::" not in line]
    assert "##\\[set-output name=b]c" in built.log
    assert not list(repository.home.glob(".config/offload/*"))


async def test_github_failure_is_an_annotation_and_another_build_needs_no_login(
    pool: NodePool, provider: IdentityProvider, registry: DockerRegistry, tmp_path: Path
) -> None:
    repository = Repository(pool, tmp_path, f"{registry.address}/team/app", FAILING)
    await repository.init("github")
    job = github_job(repository, provider, "one")
    setup = await asyncio.to_thread(
        job.run_action, ".github/actions/offload-setup",
        gateway=repository.gateway, token=repository.token,
    )  # fmt: skip
    assert setup.returncode == 0, setup.log
    del job.environment["ACTIONS_ID_TOKEN_REQUEST_URL"]
    built = await asyncio.to_thread(
        job.run_action, ".github/actions/offload-build", context=".", tags="a:1\nb:2\n"
    )
    assert built.returncode == 1, built.log
    assert len(re.findall(r"^\s*::error", built.log, re.MULTILINE)) == 1
    line = repository.top.joinpath("Dockerfile").read_text().splitlines().index(FAILING[:-1]) + 1
    assert f"::error file=Dockerfile,line={line},title=Build failed::" in built.log
    assert built.outputs["image-digest"] == built.outputs["metadata"] == ""
    assert built.outputs["build-id"]
    assert ": failed" in built.summary
    assert "<pre>" in built.summary
    (repository.top / "Dockerfile").write_text("FROM scratch\nCOPY busybox /\n")
    again = await asyncio.to_thread(
        job.run_action, ".github/actions/offload-build",
        options="--label=a=b c\n--output=type=cacheonly", summary="false", build_args="A=1\nB=x y",
    )  # fmt: skip
    assert again.returncode == 0, again.log
    assert again.summary == ""


async def test_gitlab_jobs_hand_on_the_digest(
    pool: NodePool, provider: IdentityProvider, registry: DockerRegistry, tmp_path: Path
) -> None:
    repository = Repository(pool, tmp_path, f"{registry.address}/team/app")
    await repository.init("gitlab")
    jobs = gitlab_jobs(repository.top)
    assert jobs["image"]["id_tokens"] == {"OFFLOAD_ID_TOKEN": {"aud": "offload.example"}}
    environment = {
        **repository.environment, "CI_COMMIT_SHA": "abc", "CI_COMMIT_BRANCH": "main",
        "OFFLOAD_ID_TOKEN": provider.token(),
    }  # fmt: skip
    done = await asyncio.to_thread(run_gitlab, jobs["image"], environment, repository.top)
    assert done.returncode == 0, done.stdout
    assert "section_start:" in done.stdout
    values = repository.check_results()
    repository.check(registry, "abc", values["OFFLOAD_IMAGE_DIGEST"])
    report = repository.top / jobs["image"]["artifacts"]["reports"]["dotenv"]
    later = {**repository.environment, **dotenv(report)}
    deployed = await asyncio.to_thread(run_gitlab, jobs["deploy"], later, repository.top)
    assert f"deploying {values['OFFLOAD_IMAGE_DIGEST']}" in deployed.stdout


async def test_buildkite_plugin_keeps_meta_data_and_annotates(
    pool: NodePool, provider: IdentityProvider, registry: DockerRegistry, tmp_path: Path
) -> None:
    repository = Repository(pool, tmp_path, f"{registry.address}/team/app")
    await repository.init("buildkite")
    text = (repository.top / ".buildkite/pipeline.yml").read_text()
    steps = yaml.safe_load(text.replace("${BUILDKITE_COMMIT}", "abc"))["steps"]
    ((plugin, options),) = steps[0]["plugins"][0].items()
    known = yaml.safe_load((repository.top / plugin / "plugin.yml").read_text())
    assert not set(options) - set(known["configuration"]["properties"])
    place = tmp_path / "agent"
    buildkite_agent(tmp_path / "bin", place, provider.url)
    environment = {
        "CI": "true", "BUILDKITE": "true", "BUILDKITE_AGENT_ACCESS_TOKEN": "x",
        "BUILDKITE_BRANCH": "main", "BUILDKITE_JOB_ID": "1", **buildkite_options(options),
        "PATH": f"{tmp_path / 'bin'}:{repository.environment['PATH']}",
    }  # fmt: skip
    log = await repository.shell(f"exec {plugin}/hooks/command", **environment)
    assert "\n--- #" in log
    digest = (place / "offload-image-digest").read_text()
    repository.check(registry, "abc", digest)
    assert json.loads((place / "offload-metadata").read_text())["containerimage.digest"] == digest
    annotation = (place / "annotation").read_text()
    assert annotation.startswith("--context offload-1 --style success\n")
    check_summary(annotation, digest)
    assert steps[1]["command"].replace("$$", "$").startswith('echo "deploying $(buildkite-agent')


async def test_jenkins_and_circleci_build(
    pool: NodePool, provider: IdentityProvider, registry: DockerRegistry, tmp_path: Path
) -> None:
    repository = Repository(pool, tmp_path, f"{registry.address}/team/app")
    await repository.init("jenkins")
    variables, scripts = jenkins_steps((repository.top / "Jenkinsfile").read_text())
    jenkins = {**variables, "JENKINS_URL": "https://ci.example/", "BRANCH_NAME": "main"}
    for number, credential in enumerate((provider.token(), repository.token)):
        await repository.shell(
            scripts[0], **jenkins, OFFLOAD_CREDENTIAL=credential, BUILD_NUMBER=str(number)
        )
        digest = repository.check_results()["OFFLOAD_IMAGE_DIGEST"]
        repository.check(registry, str(number), digest)
        assert f"deploying {digest}" in await repository.shell(scripts[1], **jenkins)

    (repository.top / "offload.toml").unlink()
    await repository.init("circleci")
    config = yaml.safe_load((repository.top / ".circleci/config.yml").read_text())
    job = config["jobs"]["image"]
    command = next(step["run"]["command"] for step in job["steps"] if "run" in step)
    await repository.shell(
        command, **job["environment"], CI="true", CIRCLECI="true", CIRCLE_SHA1="abc",
        CIRCLE_BRANCH="main", CIRCLE_OIDC_TOKEN_V2=provider.token(),
    )  # fmt: skip
    values: dict[str, Any] = repository.check_results()
    repository.check(registry, "abc", values["OFFLOAD_IMAGE_DIGEST"])


async def test_generic_step_builds_with_a_token_and_says_why_without_one(
    pool: NodePool, registry: DockerRegistry, tmp_path: Path
) -> None:
    repository = Repository(pool, tmp_path, f"{registry.address}/team/app")
    assert "Wrote     ci/offload-build.sh" in await repository.init("generic")
    command = f"ci/offload-build.sh -t {repository.image}:generic --push ."
    await repository.shell(command, CI="true", OFFLOAD_TOKEN=repository.token)
    digest = repository.check_results()["OFFLOAD_IMAGE_DIGEST"]
    repository.check(registry, "generic", digest)
    failed = await asyncio.to_thread(
        run_script, command, {**repository.environment, "CI": "true"}, repository.top
    )
    assert failed.returncode == 4
    assert "offload login" in failed.stdout
    assert not (repository.top / "offload-results" / "build.env").exists()
    asked = await asyncio.to_thread(
        Member(repository.home, {"CI": "true"}).offload,
        "login", repository.gateway, "--oidc", "--ca", repository.ca,
    )  # fmt: skip
    assert asked.returncode == 125
    assert "OFFLOAD_ID_TOKEN" in asked.stderr


BAKE = """
group "default" { targets = ["one", "two"] }
target "one" { tags = ["one:1"] }
target "two" { tags = ["two:1"] }
"""


async def test_bake_has_one_summary_and_a_second_build_says_what_it_saved(
    pool: NodePool, tmp_path: Path
) -> None:
    repository = Repository(pool, tmp_path, "app", f"RUN sleep 1.5\n{STEPS}")
    (repository.top / "docker-bake.hcl").write_text(BAKE)
    variables = {
        "CI": "true", "OFFLOAD_TOKEN": repository.token, "OFFLOAD_GATEWAY": repository.gateway,
        "OFFLOAD_SUMMARY_FILE": "summary.md",
    }  # fmt: skip
    await repository.shell("offload-build .", **variables)
    await repository.shell("offload-build bake", **variables)
    text = (repository.top / "summary.md").read_text()
    assert text.startswith("### default: built\n")
    assert re.search(r"\| Image \| one <code>sha256&#58;[0-9a-f]{64}</code> \|", text)
    assert "| Image | two <code>" in text
    assert text.count("offload logs ") == 2
    await repository.shell("offload-build --result-file ids .", **variables)
    again = (repository.top / "summary.md").read_text()
    assert again.startswith("### repository: built\n")
    assert re.search(r"\| Saved \| \d[\d.]*s of steps, 1\.\d+MB not sent \|", again), again
    assert "| cached |" in again
    assert dotenv(repository.top / "ids")["OFFLOAD_IMAGE_DIGEST"].startswith("sha256:")
    (repository.top / "summary.md").unlink()
    await repository.shell("offload-build --summary-file none -q .", **variables)
    assert not (repository.top / "summary.md").exists()
    log = await repository.shell("offload logs $(. ./ids; echo $OFFLOAD_BUILD_ID)", **variables,
                                 GITHUB_ACTIONS="true")  # fmt: skip
    assert "CACHED" in log
    assert "::group::" not in log
