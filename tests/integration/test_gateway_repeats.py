"""A build that repeats a lost one: another node, and records that know each other."""

from __future__ import annotations

from offload_proto.v1.identity_service_pb2 import ROLE_MEMBER
from tests.fixtures.node import NodePool


async def test_repeat_is_linked_and_placed_at_another_node() -> None:
    async with NodePool() as pool:
        for name in ("one", "two"):
            await pool.start_node(name, slots=8)
        lost = await pool.assigned()
        again = await pool.assigned(repeat_of=lost.build_id)
        assert again.node_id != lost.node_id
        assert (await pool.build(again.build_id)).repeat_of == lost.build_id
        assert (await pool.build(lost.build_id)).repeated_by == again.build_id
        # The only node that is left is as good as any.
        await pool.stop_node(again.node_id)
        third = await pool.assigned(repeat_of=lost.build_id)
        assert third.node_id == lost.node_id
        # Whose build it was matters: a link to that of another member is not made.
        keys = await pool.gateway.login(await pool.gateway.create_token("bob", ROLE_MEMBER))
        foreign = await pool.assigned(keys, repeat_of=third.build_id)
        assert not (await pool.build(foreign.build_id)).repeat_of
        assert not (await pool.build(third.build_id)).repeated_by
        unknown = await pool.assigned(repeat_of="no such build")
        assert not (await pool.build(unknown.build_id)).repeat_of
