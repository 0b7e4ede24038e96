"""Which rights the builds of a project get, and who is told to permit them."""

from __future__ import annotations

import pytest

from offload_builder.node.config import NodeConfig
from offload_builder.node.entitlements import Permitted, explain_refusal, granted
from offload_core.errors import AccessDeniedError, ConfigError
from offload_proto.v1.build_spec_pb2 import BuildSpec
from offload_proto.v1.builds_service_pb2 import Ticket

CONFIG = NodeConfig(
    gateway="g:1",
    entitlements=["network.host"],
    project_entitlements={
        "images": ["security.insecure"],
        "images*": ["device"],
        "guests-*": [],
    },
)


@pytest.mark.parametrize(
    ("project", "names"),
    [
        ("shop", ("network.host",)),
        ("images", ("security.insecure", "device")),
        ("images-2", ("device",)),
        ("guests-1", ()),
        ("my-guests-1", ("network.host",)),
    ],
)
def test_entries_that_fit_a_project_replace_what_all_have(
    project: str, names: tuple[str, ...]
) -> None:
    permitted = Permitted.of(CONFIG, project)
    assert permitted.names == names
    assert permitted.of_project == (project not in ("shop", "my-guests-1"))


def test_refusal_names_the_option_that_would_help() -> None:
    for project, option in (("shop", "entitlements = "), ("guests-1", "in project_entitlements")):
        ticket = Ticket(node_id="one", project_id=project, role="member")
        permitted = Permitted.of(CONFIG, project)
        with pytest.raises(AccessDeniedError, match=option):
            granted(BuildSpec(entitlements=["device=a"]), ticket, permitted)
        assert option in explain_refusal("security.insecure is not allowed", ticket, permitted)


def test_unknown_rights_are_refused_with_their_project() -> None:
    with pytest.raises(ConfigError, match='project_entitlements: x: "root" is unknown'):
        NodeConfig(gateway="g:1", project_entitlements={"x": ["root"]})


GPU = "nvidia.com/gpu=0"


@pytest.mark.parametrize(
    ("pattern", "permitted", "refused"),
    [
        ("device", ["*", GPU, "nvidia.com/gpu", "gpu"], []),
        (
            "device=nvidia.com/gpu=*",
            [GPU, "nvidia.com/gpu=*", "nvidia.com/gpu"],
            ["*", "gpu", "nvidia.com/nic=0"],
        ),
        ("device=nvidia.com/gpu", [GPU, "nvidia.com/gpu=*"], ["nvidia.com/gpus=0", "gpu"]),
        ("device=nvidia.com/*", [GPU, "nvidia.com/nic"], ["acme.example/gpu=0"]),
        # One that fits some names never permits all of them.
        ("device=nvidia.com/gpu=?", [GPU], ["nvidia.com/gpu=*", "nvidia.com/gpu", "*"]),
        ("device=nvidia.com/gpu=mig*", ["nvidia.com/gpu=mig1"], [GPU, "nvidia.com/gpu=*"]),
        ("device=gpu", ["gpu"], [GPU, "nvidia.com/gpu"]),
        ("network.host", [], [GPU, "*"]),
    ],
)
def test_patterns_permit_what_they_fit(
    pattern: str, permitted: list[str], refused: list[str]
) -> None:
    found = Permitted((pattern,))
    assert [name for name in permitted if not found.permits_device(name)] == []
    assert [name for name in refused if found.permits_device(name)] == []


def test_devices_are_granted_in_a_form_that_hides_nothing() -> None:
    ticket = Ticket(node_id="one", project_id="shop", role="member")
    spec = BuildSpec(entitlements=[f'device="{GPU}",alias=mine', "device=nvidia.com/gpu=1"])
    permitted = Permitted(("device=nvidia.com/gpu=*",))
    assert permitted.rights == ("device",)
    assert granted(spec, ticket, permitted) == [
        f"device={GPU},alias=mine",
        "device=nvidia.com/gpu=1",
    ]
    with pytest.raises(AccessDeniedError, match="permits project shop only device="):
        granted(BuildSpec(entitlements=[f"device=a.b/c=d,alias={GPU}"]), ticket, permitted)


def test_refusals_of_devices_name_the_device() -> None:
    ticket = Ticket(node_id="one", project_id="shop", role="member")
    permitted = Permitted(("device",))
    for message in (
        f"device {GPU} is requested by the build but not allowed",
        f"devices {GPU}, nvidia.com/gpu=1 are requested by the build but not allowed",
        f'CDI device "{GPU}" is required by step "x", but CDI device support is disabled',
    ):
        assert f"--allow device={GPU} " in explain_refusal(message, ticket, permitted)
    assert "no device x/y=z" in explain_refusal(
        'required device "x/y=z" is not registered', ticket, permitted
    )


def test_rights_to_devices_are_checked_in_the_configuration() -> None:
    NodeConfig(gateway="g:1", entitlements=["device=nvidia.com/gpu=*"])
    for name in ("device=", "network.host=x", "security.insecure="):
        with pytest.raises(ConfigError, match="is unknown"):
            NodeConfig(gateway="g:1", entitlements=[name])
