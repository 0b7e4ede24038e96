"""What stays in the audit log when there is too much of it, in a real SQLite database."""

from __future__ import annotations

from offload_builder.gateway.audit import AuditLog, Event, Query
from offload_builder.gateway.store import Store, default_url

KEEP = 40_000


async def actions(audit):
    return [record.action for record in await audit.read(Query())]


async def test_nobody_drives_the_deeds_of_administrators_out_of_the_log(tmp_path):
    async with Store(default_url(tmp_path)) as store:
        audit = AuditLog(store)
        await audit.write(Event("token.created", member="ann", role="admin"))
        await audit.write(Event("ca.rotated", member="root", role="operator"))
        for _ in range(400):
            audit.note(Event("login", address="192.0.2.1", result="UNAUTHENTICATED"))
            audit.note(Event("build.created", member="mallory", role="untrusted"))
        # Nor with the name of somebody else, which was not proved.
        audit.note(Event("token.created", role="admin", result="ACCESS_DENIED", detail="x" * 400))
        await audit.prune(keep_bytes=KEEP, retention_seconds=0)
        left = await actions(audit)
        assert left[:2] == ["token.created", "ca.rotated"]
        assert 50 < len(left) < 400
        assert left[-1] == "token.created"


async def test_a_log_of_administrators_alone_is_bounded_as_well(tmp_path):
    async with Store(default_url(tmp_path)) as store:
        audit = AuditLog(store)
        audit.note(Event("login", address="192.0.2.1", result="UNAUTHENTICATED"))
        for number in range(400):
            audit.note(Event("token.created", member=f"m{number}", role="admin"))
        await audit.prune(keep_bytes=KEEP, retention_seconds=0)
        left = await audit.read(Query())
        assert 50 < len(left) < 400
        assert left[-1].member == "m399"
