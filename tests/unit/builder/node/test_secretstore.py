"""A build's secrets at the node: asked for once and at once, wiped at the end."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.node.clientlink import ClientLink
from offload_builder.node.secretstore import BuildSecrets
from offload_core.errors import ContextError, NodeLostError
from offload_proto.v1.node_service_pb2 import SecretReply


async def asked(link: ClientLink, count: int) -> dict[str, int]:
    """Return the requests by name."""
    found = {}
    for _ in range(count):
        message = await asyncio.wait_for(link.outbox.get(), 5)
        assert message is not None
        found[message.secret_request.secret_id] = message.secret_request.request_id
    return found


async def test_secrets_are_fetched_before_anybody_asks_and_wiped_at_the_end():
    link = ClientLink()
    secrets = BuildSecrets(link, ["a", "GIT_AUTH_TOKEN.example.org", "none", "a"])
    secrets.fetch()
    ids = await asked(link, 3)
    waiting = asyncio.ensure_future(secrets.wait_complete())
    await asyncio.sleep(0)
    assert not waiting.done()
    for name in ("a", "GIT_AUTH_TOKEN.example.org"):
        link.secret_reply(SecretReply(request_id=ids[name], found=True, data=b"v-" + name.encode()))
    link.secret_reply(SecretReply(request_id=ids["none"]))
    assert await secrets.get("a") == b"v-a"
    assert await secrets.get("none") is None
    assert await secrets.get("never-named") is None
    await asyncio.wait_for(waiting, 5)
    kept = list(secrets._values.values())
    secrets.forget_steps()
    assert await secrets.get("a") is None
    assert await secrets.get("GIT_AUTH_TOKEN.example.org") is not None
    await secrets.close()
    assert all(not any(value) for value in kept)
    assert "v-a" not in repr(secrets)


async def test_secret_that_the_client_cannot_read_fails_whoever_wants_it_with_its_sentence():
    link = ClientLink()
    secrets = BuildSecrets(link, ["a"])
    secrets.fetch()
    ids = await asked(link, 1)
    link.secret_reply(SecretReply(request_id=ids["a"], error="secret a: cannot read f: gone"))
    with pytest.raises(ContextError, match="cannot read f"):
        await secrets.get("a")
    await secrets.close()


async def test_client_that_goes_away_leaves_nobody_waiting_and_what_has_come_counts():
    link = ClientLink()
    secrets = BuildSecrets(link, ["a", "b"])
    secrets.fetch()
    ids = await asked(link, 2)
    link.secret_reply(SecretReply(request_id=ids["a"], found=True, data=b"v"))
    await asyncio.sleep(0)
    link.lose(NodeLostError("the client went away"))
    with pytest.raises(NodeLostError):
        await secrets.get("b")
    assert await secrets.get("a") == b"v"
    await secrets.close()
