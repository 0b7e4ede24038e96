"""What people who look for a fault see of a session: nothing that members have put into it.

Names of images and containers, environments, labels and credentials are left out: only fields that
are known to have none are taken over, and lines of the engine's log lose what is quoted in them.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from offload_builder.node.sessions.session import state_word
from offload_core.enginecalls import UnixConnection, call_engine
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.node.sessions.contract import Engine
    from offload_builder.node.sessions.session import NodeSession

CALL_SECONDS = 5.0
LOG_BYTES = 64 << 10
MAX_LINE = 2048
"""Characters of one line of the log that are kept. Whoever is root in an engine can write to its
log, and the patterns are not to have much of that at a time."""
_INFO = (
    "Containers", "ContainersRunning", "ContainersPaused", "ContainersStopped", "Images",
    "Driver", "DriverStatus", "MemoryLimit", "SwapLimit", "CpuCfsPeriod", "CpuCfsQuota",
    "PidsLimit", "OomKillDisable", "NFd", "NGoroutines", "LoggingDriver", "CgroupDriver",
    "CgroupVersion", "KernelVersion", "OSType", "Architecture", "NCPU", "MemTotal",
    "ServerVersion", "DefaultRuntime", "LiveRestoreEnabled", "SecurityOptions", "Warnings",
    "DefaultAddressPools", "FirewallBackend", "CDISpecDirs", "DiscoveredDevices",
)  # fmt: skip
_VERSION = ("Version", "ApiVersion", "MinAPIVersion", "GitCommit", "GoVersion", "Os", "Arch",
            "KernelVersion", "BuildTime")  # fmt: skip
_FIELD = re.compile(
    r"""(?<![\w.-])(?P<key>(?!(?:time|level|msg)=)[\w.-]++)="""
    r"""(?:"(?:[^"\\]|\\.)*(?:"|\\?$)|[^\s"]\S*)"""
)
_QUOTED = re.compile(r"""\\"(?:[^"\\]|\\[^"])*\\"|'[^']*'|`[^`]*`""")
_UNENDED = re.compile(r"""(?:\\"|['`]).*""")
_REFERENCE = re.compile(
    r"(?<![\w.-])[\w.-]++(?::\d++)?(?:/[\w.-]++)++(?::[\w.-]++)?(?:@sha256:[0-9a-f]{64})?"
)
_LONG_HEX = re.compile(r"\b[0-9a-f]{12,}\b")


async def describe(session: NodeSession) -> dict[str, str]:
    """Return texts by the names of their files."""
    texts = {"session.json": _text(_session(session))}
    engine = session.engine
    if engine is None:
        return texts
    if session.running.is_set():
        for name, target, fields in (
            ("engine-version.json", "/version", _VERSION),
            ("engine-info.json", "/info", _INFO),
        ):
            texts[name] = await _ask(engine, target, fields)
    texts["engine.log"] = await asyncio.to_thread(_log, engine.log)
    return texts


def _session(session: NodeSession) -> dict[str, Any]:
    engine = session.engine
    return {
        "state": state_word(session.state),
        "reason": session.reason,
        "limits": MessageToDict(session.limits.message()),
        "pids": session.limits.engine.pids,
        "devices": list(session.devices),
        "activity": MessageToDict(session.activity()),
        "used_seconds": round(session.used_seconds(), 1),
        "followers": session.followers,
        "engine": {
            "engine_id": engine.engine_id,
            "version": engine.version,
            "id_base": engine.id_base,
        }
        if engine is not None
        else None,
    }


async def _ask(engine: Engine, target: str, fields: tuple[str, ...]) -> str:
    try:
        reply = await call_engine(
            lambda: UnixConnection.open(engine.socket), "GET", target, timeout=CALL_SECONDS
        )
        found = reply.json()
    except OffloadError as error:
        return _text({"error": error.message})
    if not isinstance(found, dict):
        return _text({"error": "the engine's answer is not understood"})
    return _text({key: found[key] for key in fields if key in found})


def _log(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_BYTES))
            lines = file.read(LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"the log cannot be read: {error.strerror}\n"
    # The first one is mostly half of one.
    whole = lines if size <= LOG_BYTES else lines[1:]
    return "".join(f"{cleaned(line)}\n" for line in whole)


def cleaned(line: str) -> str:
    """Return a line of an engine's log without what members have put into the engine."""
    cut = len(line) > MAX_LINE
    if cut:
        # Half a word would be no word that the patterns know.
        line = line[:MAX_LINE].rpartition(" ")[0]
    line = _FIELD.sub(r"\g<key>=...", line)
    line = _QUOTED.sub("...", line)
    if cut:
        line = _UNENDED.sub("...", line) + " [cut]"
    line = _REFERENCE.sub("...", line)
    return _LONG_HEX.sub("...", line)


def _text(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
