"""Which platforms go to which node."""

from __future__ import annotations

import pytest

from offload_builder.gateway.platforms import platform_groups
from offload_builder.gateway.scheduler import NodeView, QueuedBuild, candidates, waiting_reason

AMD, ARM, RISC = "linux/amd64", "linux/arm64", "linux/riscv64"


def node(name: str, *native: str, emulated: tuple[str, ...] = (), load: int = 0) -> NodeView:
    return NodeView(name, 2, load, frozenset(native), frozenset(emulated))


def groups(wanted: tuple[str, ...], *here: NodeView, away: tuple[NodeView, ...] = ()) -> list[str]:
    return ["+".join(group) for group in platform_groups(wanted, here, (*here, *away))]


def test_a_node_that_is_native_for_all_builds_all() -> None:
    found = groups((AMD, ARM), node("a", AMD), node("b", AMD, ARM))
    assert found == [f"{AMD}+{ARM}"]


def test_each_platform_goes_where_it_is_native() -> None:
    emulator = node("a", AMD, emulated=(ARM,))
    assert groups((ARM, AMD), emulator, node("b", ARM)) == [ARM, AMD]


def test_what_is_native_nowhere_is_emulated_beside_another_platform() -> None:
    emulator = node("a", AMD, emulated=(ARM, RISC))
    assert groups((AMD, RISC), emulator) == [f"{AMD}+{RISC}"]
    assert groups((AMD, ARM, RISC), node("b", ARM), emulator) == [f"{AMD}+{RISC}", ARM]


def test_a_platform_of_a_node_that_is_away_is_a_build_of_its_own() -> None:
    away = (node("b", AMD, ARM),)
    assert groups((AMD, ARM), node("a", AMD), away=away) == [AMD, ARM]


def test_variants_that_are_the_usual_ones_do_not_matter() -> None:
    assert groups(("linux/arm64/v8", AMD), node("a", AMD, ARM)) == [f"linux/arm64/v8+{AMD}"]


def test_native_nodes_get_a_build_even_when_one_that_emulates_is_free() -> None:
    build = QueuedBuild("1", "p", 1, (ARM,))
    emulator = node("a", AMD, emulated=(ARM,))
    assert candidates(build, [emulator, node("b", ARM)]) == ["b"]
    assert candidates(build, [emulator, node("b", ARM, load=2)]) == []
    assert candidates(build, [emulator]) == ["a"]
    reason = waiting_reason(build, [emulator, node("b", ARM, load=2)])
    assert reason == f"the only node that builds {ARM} natively is busy"


@pytest.mark.parametrize("preferred", [AMD, ARM])
def test_without_a_platform_the_client_gets_images_that_it_can_run(preferred: str) -> None:
    build = QueuedBuild("1", "p", 1, (), preferred)
    nodes = [node("amd64", AMD), node("arm64", ARM)]
    assert candidates(build, nodes) == [preferred.partition("/")[2]]
    other = QueuedBuild("1", "p", 1, (), RISC)
    assert len(candidates(other, nodes)) == 2
    busy = [node("amd64", AMD, load=2), node("arm64", ARM, load=2)]
    assert waiting_reason(build, busy) == f"the only node that builds {preferred} natively is busy"
