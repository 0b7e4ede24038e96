"""Tokens, builds and logs in a real SQLite database."""

from __future__ import annotations

import asyncio
import sqlite3
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_builder.gateway.history import BuildRecord, History
from offload_builder.gateway.log_book import LogBook
from offload_builder.gateway.members import Members
from offload_builder.gateway.store import Store, default_url
from offload_core.errors import ConfigError, NotFoundError, UsageError
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import events_pb2 as events_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb

NOW = datetime.now(UTC)
CA = "ab" * 32


@pytest.fixture
async def store(tmp_path):
    async with Store(default_url(tmp_path)) as opened:
        yield opened


def build(build_id: str, *, age: float = 0, project: str = "shop", **values) -> BuildRecord:
    defaults = {
        "request_id": build_id,
        "member": "ann",
        "token_id": "t",
        "role": identity_pb.ROLE_MEMBER,
        "name": "image:latest",
        "state": builds_pb.BUILD_STATE_QUEUED,
        "created_at": NOW - timedelta(seconds=age),
    }
    return BuildRecord(build_id=build_id, project_id=project, **defaults | values)


def batches(first: int, last: int, size: int = 10) -> list[events_pb.ProgressBatch]:
    return [
        events_pb.ProgressBatch(
            sequence=number, logs=[events_pb.VertexLog(vertex="v", data=b"x" * size)]
        )
        for number in range(first, last + 1)
    ]


async def sequences(book: LogBook, *, after: int = 0, follow: bool = False, ended=lambda: True):
    read = book.read("aaaaaaaaaaaa", after=after, follow=follow, ended=ended)
    return [batch.sequence async for run in read for batch in run]


async def test_database_of_a_newer_version_is_refused(tmp_path):
    url = default_url(tmp_path)
    async with Store(url) as store:
        await store.write(lambda db: db.execute(schema.meta.update().values(value="99")))
    with pytest.raises(ConfigError, match="version 99"):
        await Store(url).__aenter__()


async def test_database_that_cannot_be_opened_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot open"):
        await Store(f"sqlite:///{tmp_path}/file/x/db").__aenter__()


async def test_password_of_the_database_is_not_in_the_error():
    with pytest.raises(ConfigError) as caught:
        await Store("nosuchdriver://user:hunter2@host/db").__aenter__()
    assert "hunter2" not in caught.value.message


async def test_database_is_private_in_a_directory_that_is_not(tmp_path, store):
    tmp_path.chmod(0o755)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


async def test_write_waits_for_another_process(tmp_path, store):
    other = sqlite3.connect(tmp_path / "gateway.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    pending = store.write(lambda db: db.execute(schema.meta.insert(), {"key": "k", "value": "v"}))
    await asyncio.sleep(0.1)
    assert not pending.done()
    other.execute("COMMIT")
    other.close()
    await pending


async def test_failed_transaction_leaves_nothing(store):
    def work(db: sa.Connection) -> None:
        db.execute(schema.meta.insert(), {"key": "k", "value": "v"})
        raise UsageError("no")

    with pytest.raises(UsageError):
        await store.write(work)
    count = sa.select(sa.func.count()).select_from(schema.meta).where(schema.meta.c.key == "k")
    assert await store.read(lambda db: db.scalar(count)) == 0


async def test_token_secret_is_not_stored(tmp_path, store):
    members = Members(store, lambda: CA)
    _, text = await members.create_token(name="ann", role=identity_pb.ROLE_MEMBER)
    for path in tmp_path.iterdir():
        assert text.secret.encode() not in path.read_bytes()


async def test_token_comes_back_as_it_was_made(store):
    members = Members(store, lambda: CA)
    await members.create_project("shop")
    end = NOW + timedelta(days=1)
    record, _ = await members.create_token(
        name="ann", role=identity_pb.ROLE_CI, project_ids=["shop"], expires_at=end
    )
    assert await members.find_token(record.token_id) == record
    assert await members.list_tokens() == [record]


async def test_token_for_an_unknown_project_is_refused(store):
    members = Members(store, lambda: CA)
    await members.create_project("shop")
    with pytest.raises(NotFoundError, match="known projects are shop"):
        await members.create_token(name="ann", role=identity_pb.ROLE_MEMBER, project_ids=["shap"])


async def test_revoking_twice_keeps_the_first_time(store):
    members = Members(store, lambda: CA)
    record, _ = await members.create_token(name="ann", role=identity_pb.ROLE_MEMBER)
    first = await members.revoke_token(record.token_id)
    assert (await members.revoke_token(record.token_id)).revoked_at == first.revoked_at


@pytest.mark.parametrize("name", ["", "Shop", "a b", "-x", "x" * 41, "a/b"])
async def test_project_name_is_checked(store, name):
    with pytest.raises(UsageError):
        await Members(store, lambda: CA).create_project(name)


async def test_project_is_made_once(store):
    members = Members(store, lambda: CA)
    await members.create_project("shop")
    with pytest.raises(UsageError, match="already"):
        await members.create_project("shop")


async def test_build_comes_back_as_it_was_written(store):
    history = History(store)
    record = build("aaaaaaaaaaaa", platforms=("linux/amd64",), vcs_branch="main")
    assert await history.insert(record)
    assert await history.find(record.build_id) == record


async def test_request_makes_one_build(store):
    history = History(store)
    assert await history.insert(build("aaaaaaaaaaaa", request_id="r"))
    assert not await history.insert(build("bbbbbbbbbbbb", request_id="r"))
    found = await history.find_request("t", "r")
    assert found is not None
    assert found.build_id == "aaaaaaaaaaaa"


async def test_prefix_finds_the_one_build_that_may_be_seen(store):
    history = History(store)
    await history.insert(build("abcaaaaaaaaa"))
    await history.insert(build("abdzzzzzzzzz", project="bank"))
    assert (await history.resolve("abc", ())).build_id == "abcaaaaaaaaa"
    assert (await history.resolve("ab", ("bank",))).build_id == "abdzzzzzzzzz"
    with pytest.raises(UsageError, match="several"):
        await history.resolve("ab", ())
    for prefix in ("abd", "", "%", "abc_aaaaaaaa", "zz"):
        with pytest.raises(NotFoundError):
            await history.resolve(prefix, ("shop",))


async def test_pages_hold_every_build_once_newest_first(store):
    history = History(store)
    # Two of each age, so that pages also split equal times.
    names = [f"{letter}{'a' * 11}" for letter in "abcdefgh"]
    for number, name in enumerate(names):
        await history.insert(build(name, age=number // 2))
    seen: list[BuildRecord] = []
    token = ""
    while True:
        page, token = await history.page((), size=3, token=token)
        seen += page
        if not token:
            break
    assert sorted(record.build_id for record in seen) == names
    assert all(a.created_at >= b.created_at for a, b in pairwise(seen))


@pytest.mark.parametrize("token", ["x", "1-2", "999999999999999999-aaaaaaaaaaaa"])
async def test_foreign_page_token_is_refused(store, token):
    with pytest.raises(UsageError):
        await History(store).page((), size=1, token=token)


async def test_old_builds_go_with_their_logs(store):
    history, book = History(store), LogBook(store, 1000)
    ended = {"state": builds_pb.BUILD_STATE_SUCCEEDED}
    await history.insert(build("aaaaaaaaaaaa", completed_at=NOW - timedelta(days=9), **ended))
    await history.insert(build("bbbbbbbbbbbb", completed_at=NOW, **ended))
    await history.insert(build("cccccccccccc", age=9e6))
    await book.append("aaaaaaaaaaaa", batches(1, 1))
    await book.flush()
    assert await history.delete_older_than(NOW - timedelta(days=1)) == 1
    left, _ = await history.page((), size=9, token="")
    assert [record.build_id for record in left] == ["bbbbbbbbbbbb", "cccccccccccc"]
    assert await sequences(LogBook(store, 1000)) == []


async def test_log_is_read_from_memory_and_from_the_store(store):
    book = LogBook(store, 1 << 20)
    await book.append("aaaaaaaaaaaa", batches(1, 5))
    await book.flush()
    await book.append("aaaaaaaaaaaa", batches(6, 8))
    assert await sequences(book) == list(range(1, 9))
    assert await sequences(book, after=4) == [5, 6, 7, 8]
    assert await sequences(book, after=8) == []


async def test_log_that_is_sent_again_after_a_restart_is_kept_once(store):
    first = LogBook(store, 1 << 20)
    await first.append("aaaaaaaaaaaa", batches(1, 5))
    await first.flush()
    second = LogBook(store, 1 << 20)
    await second.append("aaaaaaaaaaaa", batches(1, 7))
    await second.flush()
    assert await sequences(second) == list(range(1, 8))


async def test_large_log_is_read_in_pages(store):
    book = LogBook(store, 1 << 30)
    for start in range(1, 41, 2):
        await book.append("aaaaaaaaaaaa", batches(start, start + 1, size=600_000))
        await book.flush()
    assert await sequences(book, after=1) == list(range(2, 41))


async def test_follower_sees_new_output_until_the_build_ends(store):
    book = LogBook(store, 1 << 20)
    running = [True]
    follower = asyncio.create_task(
        sequences(book, follow=True, ended=lambda: not running[0]), name="follower"
    )
    committer = asyncio.create_task(book.run(), name="committer")
    for number in range(1, 6):
        await book.append("aaaaaaaaaaaa", batches(number, number))
        await asyncio.sleep(0.02)
    running[0] = False
    book.wake_readers("aaaaaaaaaaaa")
    # Output that overtook the news of the end still counts.
    await asyncio.sleep(0.05)
    await book.append("aaaaaaaaaaaa", batches(6, 6))
    async with asyncio.timeout(5):
        assert await follower == [1, 2, 3, 4, 5, 6]
    committer.cancel()
    await asyncio.wait([committer])
    await book.flush()


async def test_output_beyond_the_limit_is_left_out_with_one_warning(store):
    book = LogBook(store, 300)
    await book.append("aaaaaaaaaaaa", batches(1, 20, size=50))
    await book.flush()
    read = [
        batch
        async for run in book.read("aaaaaaaaaaaa", after=0, follow=False, ended=lambda: True)
        for batch in run
    ]
    assert [batch.sequence for batch in read] == list(range(1, 21))
    assert sum(len(batch.warnings) for batch in read) == 1
    assert sum(len(log.data) for batch in read for log in batch.logs) <= 300


async def test_flush_that_is_cancelled_neither_loses_nor_doubles(store):
    book = LogBook(store, 1 << 20)
    await book.append("aaaaaaaaaaaa", batches(1, 50))
    task = asyncio.create_task(book.flush(), name="flush")
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await book.flush()
    assert await sequences(LogBook(store, 1 << 20)) == list(range(1, 51))


async def test_database_of_version_1_gets_the_new_columns_and_keeps_its_builds(tmp_path):
    url = default_url(tmp_path)
    async with Store(url) as store:
        await History(store).insert(build("aaaaaaaaaaaa", vcs_branch="topic"))
    with sqlite3.connect(tmp_path / "gateway.sqlite") as database:
        added = ("vcs_target_branch", "cache_choice", "repeat_of", "repeated_by", "image_saved")
        for column in added:
            database.execute(f"ALTER TABLE builds DROP COLUMN {column}")
        database.execute("UPDATE meta SET value = '1' WHERE key = 'schema_version'")
    database.close()
    async with Store(url) as store:
        history = History(store)
        old = await history.find("aaaaaaaaaaaa")
        assert old is not None
        assert (old.vcs_branch, old.vcs_target_branch, old.cache_choice) == ("topic", "", b"")
        assert (old.repeat_of, old.repeated_by, old.image_saved) == ("", "", False)
        new = build(
            "bbbbbbbbbbbb",
            vcs_target_branch="main",
            cache_choice=b"\x10\x01",
            repeat_of="aaaaaaaaaaaa",
            image_saved=True,
        )
        await history.insert(new)
        assert await history.find("bbbbbbbbbbbb") == new
    async with Store(url):
        pass


async def test_a_name_is_not_shared_by_an_untrusted_and_another_member(store):
    members = Members(store, lambda: CA)
    ci, _ = await members.create_token(name="ci", role=identity_pb.ROLE_CI)
    await members.create_token(name="ci", role=identity_pb.ROLE_MEMBER)
    await members.revoke_token(ci.token_id)
    with pytest.raises(UsageError, match='"ci" is, or was, the name of a trusted member'):
        await members.create_token(name="ci", role=identity_pb.ROLE_UNTRUSTED)
    await members.create_token(name="forks", role=identity_pb.ROLE_UNTRUSTED)
    await members.create_token(name="forks", role=identity_pb.ROLE_UNTRUSTED)
    with pytest.raises(UsageError, match="the name of an untrusted member"):
        await members.create_token(name="forks", role=identity_pb.ROLE_CI)
    # Nodes have names of their own kind.
    await members.create_token(name="forks", role=identity_pb.ROLE_NODE)
    await members.create_token(name="pool", role=identity_pb.ROLE_NODE)
    await members.create_token(name="pool", role=identity_pb.ROLE_UNTRUSTED)


def test_postgresql_refuses_changes_of_the_audit_log_as_well():
    statements = []
    engine = sa.create_mock_engine(
        "postgresql+psycopg://",
        lambda statement, *_, **__: statements.append(str(statement.compile(engine))),
    )
    schema.metadata.create_all(engine, checkfirst=False)
    (trigger,) = [item for item in statements if "CREATE TRIGGER" in item]
    assert "BEFORE UPDATE OR TRUNCATE ON audit" in trigger
    assert sum("CREATE FUNCTION audit_refuse_change" in item for item in statements) == 1
