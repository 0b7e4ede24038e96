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
