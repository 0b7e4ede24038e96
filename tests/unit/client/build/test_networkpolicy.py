"""--network-policy at the client: what is read, and that it is never lost on the way."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from offload_client.build.networkpolicy import PolicyFile, check_taken, with_network_policy
from offload_client.build.options import BuildOptions
from offload_client.cli.build import parse_build
from offload_client.invocation import Invocation
from offload_core.errors import ConfigError, VersionError
from offload_proto.v1.builds_service_pb2 import Assigned, NetworkPolicy, SignedTicket, Ticket

if TYPE_CHECKING:
    from pathlib import Path


def command(folder: Path, *words: str, **environment: str) -> Invocation:
    return Invocation(list(words), folder, environment, 0, io.StringIO(), io.StringIO())


def test_the_flag_counts_before_the_variable(tmp_path):
    flag = ("--network-policy", "a.toml", ".")
    assert parse_build(command(tmp_path, *flag)).network_policy == "a.toml"
    by_both = parse_build(command(tmp_path, *flag, OFFLOAD_NETWORK_POLICY="none"))
    assert by_both.network_policy == "a.toml"
    by_variable = parse_build(command(tmp_path, ".", OFFLOAD_NETWORK_POLICY="none"))
    assert by_variable.network_policy == "none"
    assert parse_build(command(tmp_path, ".")).network_policy == ""


async def test_a_file_is_sent_without_its_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "build.toml").write_text("# nothing\n")
    (tmp_path / "none").write_text("# a file of that name\n")
    for value, expected in (
        ("sub/build.toml", PolicyFile("build.toml", "# nothing\n")),
        (str(tmp_path / "sub/build.toml"), PolicyFile("build.toml", "# nothing\n")),
        ("none", PolicyFile("--network-policy none", "")),
        ("./none", PolicyFile("none", "# a file of that name\n")),
        ("", None),
    ):
        options = BuildOptions(".", network_policy=value)
        assert (await with_network_policy(command(tmp_path), options)).policy_file == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read the network policy p.toml: No such file or directory"),
        (b"#" * 65_537, "p.toml is larger than 64 KiB"),
        (b"\xff", "p.toml is not valid TOML: it is not UTF-8 text"),
    ],
)
async def test_what_cannot_be_sent_is_said_before_anything_else(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "p.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        await with_network_policy(command(tmp_path), BuildOptions(".", network_policy="p.toml"))
    assert caught.value.exit_code == 3


def test_a_build_never_runs_without_the_policy_that_it_brought():
    def assigned(**fields: NetworkPolicy) -> Assigned:
        payload = Ticket(build_id="b", **fields).SerializeToString()
        return Assigned(ticket=SignedTicket(payload=payload))

    none, own = PolicyFile("n", ""), PolicyFile("f", "x")
    check_taken(None, assigned())
    check_taken(none, assigned(network_policy=NetworkPolicy(file="n")))
    check_taken(own, assigned(network_policy=NetworkPolicy(file="f", text="x", pool_version=3)))
    for policy in (none, own):
        for answer in (assigned(), assigned(network_policy=NetworkPolicy(file="f", text="y"))):
            with pytest.raises(VersionError, match="too old for --network-policy"):
                check_taken(policy, answer)
