"""What this machine has of a session: record, helper and docker context, all or nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_client.sessions.dockercontext import DockerContexts
from offload_client.sessions.helperprocess import HelperProcess
from offload_client.sessions.launch import asked, end_helper, helper_answers
from offload_client.sessions.records import (
    DEFAULT_NAME,
    SessionRecord,
    context_name,
    engine_socket,
    list_records,
    read_record,
    remove_record,
    session_directory,
    sessions_directory,
    write_record,
)
from offload_client.sessions.statusview import OVER
from offload_core.errors import ConfigError, InvalidValueError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from offload_client.invocation import Invocation
    from offload_proto.v1.sessions_service_pb2 import Session


class Attachments:
    """The sessions that this machine uses."""

    def __init__(self, invocation: Invocation) -> None:
        """Look at the state directory and docker's configuration of a command's user."""
        self._invocation = invocation
        self.contexts = DockerContexts(invocation.environment)

    def directory(self, name: str) -> Path:
        """Return the directory of a session by its name here.

        Raises:
            InvalidValueError: it cannot be a name.
        """
        return session_directory(self._invocation, name)

    def records(self) -> list[SessionRecord]:
        """Return the records of all sessions here, by name."""
        return list_records(self._invocation)

    def record(self, name: str) -> SessionRecord | None:
        """Return the record of a session by its name here, None when there is none.

        Raises:
            InvalidValueError: it cannot be a name.
            ConfigError: it cannot be read.
        """
        with contextlib.suppress(NotFoundError):
            return read_record(self.directory(name))
        return None

    def unreadable(self, name: str) -> SessionRecord:
        """Return what is known of a session whose record cannot be read: all but its id."""
        return SessionRecord("", name, "", "", context_name(name), 0.0)

    def of_session(self, session_id: str) -> SessionRecord | None:
        """Return the record of a session by its id."""
        return next((one for one in self.records() if one.session_id == session_id), None)

    def chosen(self, name: str | None) -> SessionRecord:
        """Return the session that a command without a name means, or the one that it names.

        Without a name: the one whose context docker uses, else the default one, else the only one.

        Raises:
            NotFoundError: there is none.
            UsageError: there are several.
        """
        records = self.records()
        if name is not None:
            for record in records:
                if name in (record.name, record.session_id):
                    return record
            return read_record(self.directory(name))
        if not records:
            raise NotFoundError("no session is in use on this machine", hint="run 'offload start'")
        if len(records) == 1:
            # Whatever docker's configuration says, or does not say when it is damaged.
            return records[0]
        current = self.contexts.current()
        for record in records:
            if record.context and record.context == current:
                return record
        for record in records:
            if record.name == DEFAULT_NAME:
                return record
        names = ", ".join(record.name for record in records)
        raise UsageError(f"there are several sessions: {names}; give a name")

    def free_name(self, wanted: str, owner: str) -> str:
        """Return a name for a session that is new here.

        Raises:
            InvalidValueError: no name is free.
        """
        for name in (wanted, f"{owner}-{wanted}", *(f"{wanted}-{n}" for n in range(2, 100))):
            with contextlib.suppress(InvalidValueError):
                if self.record(name) is None:
                    return name
        raise InvalidValueError(
            f'the name "{wanted}" is taken here', hint="choose another one with --name"
        )

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Keep other commands from starting or stopping the same session meanwhile.

        Raises:
            InvalidValueError: it cannot be a name.
            ConfigError: another command does, or the state directory cannot be written.
        """
        self.directory(name)
        folder = sessions_directory(self._invocation)
        path = folder / f".{name}.lock"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f'another command starts or stops the session "{name}"',
                    hint="wait for it, or end it",
                ) from None
            # The file stays: whoever waits for it must not wait for one that is gone.
            yield
        finally:
            os.close(lock)

    def prepared(self, name: str) -> HelperProcess:
        """Return a helper that waits for the session of a name.

        Raises:
            InvalidValueError: it cannot be a name.
        """
        invocation = self._invocation
        return HelperProcess(self.directory(name), invocation.environment, invocation.cwd)

    async def attach(
        self, name: str, session: Session, gateway: str, helper: HelperProcess, *, own: bool
    ) -> SessionRecord:
        """Make a session usable here: record, helper and docker context; nothing when that fails.

        Args:
            name: of the session here.
            session: as the gateway tells of it.
            gateway: HOST:PORT.
            helper: that waits for it.
            own: it is not somebody else's.

        Raises:
            OffloadError: something of it cannot be made.
        """
        directory = self.directory(name)
        record = SessionRecord(
            session_id=session.session_id,
            name=name,
            project_id=session.project_id,
            gateway=gateway,
            context=context_name(name),
            created=time.time(),
            owner=session.owner,
            mine=own,
            node_id=session.node_id,
            gpu=session.spec.gpu or any("gpu" in device for device in session.devices),
            started=float(session.ready_at.seconds),
        )
        socket = engine_socket(directory)
        self.contexts.check_free(record.context, socket)
        try:
            write_record(directory, record)
            await helper.go()
            self.contexts.write(record.context, socket)
        except BaseException:
            self.contexts.remove(record.context, socket)
            remove_record(directory)
            raise
        return record

    async def revive(self, record: SessionRecord) -> bool:
        """Start the helper of a session that runs, if it has none; return whether it had none.

        Raises:
            OffloadError: it does not start, or the docker context cannot be written.
        """
        directory = self.directory(record.name)
        status = await asked(directory, "status")
        if status is not None and status.get("state") in OVER:
            # It was given up, and came back with its node.
            await end_helper(directory)
        missing = not await helper_answers(directory)
        if missing:
            with self.prepared(record.name) as helper:
                await helper.go()
        self.contexts.write(record.context, engine_socket(directory))
        return missing

    def use(self, record: SessionRecord) -> str:
        """Choose the docker context of a session; return the former one.

        Raises:
            ConfigError: docker's configuration cannot be read or written.
        """
        former = self.contexts.select(record.context)
        ours = {one.context for one in self.records()}
        # From one session back to another, what was there before both is still the former.
        if former != record.context and not (former in ours and record.former_context):
            write_record(self.directory(record.name), replace(record, former_context=former))
        return former

    async def quiet(self, record: SessionRecord) -> list[str]:
        """End the helper of a session, which first brings back what containers wrote.

        Returns:
            Sentences about what it could not bring back.
        """
        return await end_helper(self.directory(record.name))

    async def detach(self, record: SessionRecord) -> str | None:
        """End the use of a session here: helper, context, record.

        Returns:
            The docker context in use now, empty for docker's default one; None when the one of the
            session was not in use.

        Raises:
            ConfigError: a file cannot be changed.
        """
        directory = self.directory(record.name)
        await end_helper(directory)
        restored, damage = None, None
        if record.context:
            try:
                restored = self.contexts.restore(record.context, record.former_context)
            except ConfigError as error:
                # Docker cannot read it either; the session goes all the same.
                damage = error
            self.contexts.remove(record.context, engine_socket(directory))
        remove_record(directory)
        for other in self.records():
            if record.context and other.former_context == record.context:
                former = record.former_context
                former = "" if former == other.context else former
                write_record(self.directory(other.name), replace(other, former_context=former))
        if damage is not None:
            raise ConfigError(
                f'the session "{record.name}" is gone here, but {damage.message}',
                hint=f"afterwards run: docker context use {record.former_context or 'default'}",
            ) from damage
        return restored

    async def containers_running(self, records: Sequence[SessionRecord]) -> dict[str, int]:
        """Return how many containers run in sessions, by their names, as far as helpers know."""
        found = {}
        for record in records:
            answer = await asked(self.directory(record.name), "status", timeout=2.0) or {}
            activity = answer.get("activity")
            if isinstance(activity, dict) and "running_containers" in activity:
                found[record.name] = int(activity["running_containers"])
        return found
