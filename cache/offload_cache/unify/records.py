"""Reading BuildKit's cache configuration into records that are comparable across builds.

Source: BuildKit `cache/remotecache/v1/types` ("application/vnd.buildkit.cacheconfig.v0") and the
checks of its importer in `cache/remotecache/v1/parse.go`, which refuses a whole document for one
bad record.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from offload_core.digest import is_digest
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_cache.contributions import CacheLayer

SALT_PREFIX = "sha256:0ff10ad05a170ff10ad05a17"
"""How the digests of the fake roots begin that we add to what we offer."""

MAX_CONFIG_BYTES = 4 << 20
_MAX_RECORDS = 40_000
_MAX_LINKS = 400_000
_MAX_TEXT = 4096
_ID_BYTES = 16
_TIME = re.compile(
    r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?(Z|[+-]\d{2}:\d{2})", re.ASCII
)
_UNKNOWN_TIME = "9999"  # after every time: a result that says nothing of its age replaces nothing


@dataclass(frozen=True, slots=True)
class Result:
    """What a step produced.

    Attributes:
        created_at: UTC in RFC 3339 without its zone, so that texts compare as times do.
        chain: the top of its layers in `Part.chains`.
    """

    created_at: str
    chain: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One cache key.

    Attributes:
        digest: of the operation or of content.
        depth: 0 without inputs, else one more than the deepest of its parents.
        inputs: for each input the alternatives that it may have: identifier of the parent record,
            selector.
        results: of any builder.
    """

    digest: str
    depth: int
    inputs: tuple[frozenset[tuple[bytes, str]], ...]
    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The records of one contribution.

    Attributes:
        records: by an identifier that depends only on what the key is, not on the document.
        chains: by identifier a layer and the chain below it, None for the lowest.
        layers: descriptors by digest; results with other layers cannot be had.
    """

    records: Mapping[bytes, Record]
    chains: Mapping[bytes, tuple[str, bytes | None]]
    layers: Mapping[str, CacheLayer]


def read_part(config: bytes, layers: Iterable[CacheLayer]) -> Part:
    """Read a cache configuration as BuildKit exported it; salt of ours is taken out.

    Args:
        config: the JSON.
        layers: what its manifest lists.

    Raises:
        UsageError: BuildKit would refuse it, or it is too large.
    """
    if len(config) > MAX_CONFIG_BYTES:
        raise UsageError(f"cache records may have {MAX_CONFIG_BYTES} bytes, not {len(config)}")
    try:
        document = orjson.loads(config)
        raw_records = document.get("records") or []
        raw_layers = document.get("layers") or []
        if not isinstance(raw_records, list) or not isinstance(raw_layers, list):
            raise TypeError("no list")
        if len(raw_records) > _MAX_RECORDS or len(raw_layers) > _MAX_RECORDS:
            raise UsageError(f"there are more than {_MAX_RECORDS} cache records")
        chains: dict[bytes, tuple[str, bytes | None]] = {}
        tops = _read_layers(raw_layers, chains)
        links = _read_links(raw_records)
        return Part(
            _read_records(raw_records, links, tops, chains),
            chains,
            {layer.digest: layer for layer in layers},
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"the cache records are damaged: {error}") from error


def _read_layers(raw: Sequence[Any], chains: dict[bytes, tuple[str, bytes | None]]) -> list[bytes]:
    """Return the chain that ends at each layer."""
    tops: list[bytes | None] = [None] * len(raw)
    for start in range(len(raw)):
        path: list[int] = []
        on_path: set[int] = set()
        at = start
        while at != -1 and tops[_index(at, len(raw))] is None:
            if at in on_path:
                raise ValueError("a layer is its own parent")
            on_path.add(at)
            path.append(at)
            at = raw[at].get("parent", 0)
        below = None if at == -1 else tops[at]
        for index in reversed(path):
            blob = raw[index]["blob"]
            if not isinstance(blob, str) or not is_digest(blob):
                raise ValueError("a layer without a digest")
            below = _add_chain(chains, blob, below)
            tops[index] = below
    return [top for top in tops if top is not None]


def _add_chain(
    chains: dict[bytes, tuple[str, bytes | None]], blob: str, below: bytes | None
) -> bytes:
    chain = _hash(blob.encode(), below or b"")
    chains[chain] = (blob, below)
    return chain


def _read_links(raw: Sequence[Any]) -> list[list[set[tuple[int, str]]]]:
    """Return for each record and input the records that it may come from."""
    count = 0
    links = []
    for record in raw:
        inputs = record.get("inputs") or []
        if any(not alternatives for alternatives in inputs):
            raise ValueError("a record with an empty input")
        found = [
            {(_index(item["link"], len(raw)), _text(item.get("selector", ""))) for item in some}
            for some in inputs
        ]
        count += sum(map(len, found))
        if count > _MAX_LINKS:
            raise UsageError(f"the cache records have more than {_MAX_LINKS} links")
        links.append(found)
    return links


def _read_records(
    raw: Sequence[Any],
    links: list[list[set[tuple[int, str]]]],
    tops: Sequence[bytes],
    chains: dict[bytes, tuple[str, bytes | None]],
) -> dict[bytes, Record]:
    records: dict[bytes, Record] = {}
    names: dict[int, bytes] = {}
    for index in _parents_first(links):
        digest = _text(raw[index]["digest"])
        if not digest or digest.startswith("random:"):
            raise ValueError("a record without a digest")
        if digest.startswith(SALT_PREFIX):
            continue
        inputs = tuple(
            frozenset((names[link], selector) for link, selector in some if link in names)
            for some in links[index]
        )
        if not all(inputs):
            continue  # it hung on nothing but the salt of a manifest of ours
        name = record_name(digest, inputs)
        names[index] = name
        results = _results(raw[index], tops, chains)
        before = records.get(name)
        if before is not None:
            results |= set(before.results)
        depth = max((records[p].depth + 1 for some in inputs for p, _ in some), default=0)
        records[name] = Record(digest, depth, inputs, tuple(sorted(results, key=_result_order)))
    return records


def record_name(digest: str, inputs: Iterable[Iterable[tuple[bytes, str]]]) -> bytes:
    """Return the identifier of a record: equal keys have equal ones in every document."""
    parts = [digest.encode()]
    for some in inputs:
        parts.append(b"\0")
        for parent, selector in sorted(some):
            parts += [parent, selector.encode(), b"\1"]
    return _hash(*parts)


def _result_order(result: Result) -> tuple[str, bytes]:
    return result.created_at, result.chain


def _parents_first(links: list[list[set[tuple[int, str]]]]) -> list[int]:
    children: list[list[int]] = [[] for _ in links]
    waiting = []
    for index, inputs in enumerate(links):
        parents = {parent for some in inputs for parent, _ in some}
        waiting.append(len(parents))
        for parent in parents:
            children[parent].append(index)
    order = [index for index, count in enumerate(waiting) if count == 0]
    for index in order:  # grows while it is read
        for child in children[index]:
            waiting[child] -= 1
            if waiting[child] == 0:
                order.append(child)
    if len(order) < len(links):
        raise ValueError("a record is its own parent")
    return order


def _results(
    raw: Any, tops: Sequence[bytes], chains: dict[bytes, tuple[str, bytes | None]]
) -> set[Result]:
    found = set()
    for item in raw.get("layers") or []:
        found.add(Result(_time(item), tops[_index(item["layer"], len(tops))]))
    for item in raw.get("chains") or []:
        top: bytes | None = None
        for layer in item["layers"]:
            top = _add_chain(chains, chains[tops[_index(layer, len(tops))]][0], top)
        if top is not None:
            found.add(Result(_time(item), top))
    return found


def _time(item: Any) -> str:
    text = item.get("createdAt", "")
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError("a result without its time")
    seconds, fraction, zone = match.groups()
    if zone != "Z":
        moment = datetime.fromisoformat(seconds + zone)
        try:
            seconds = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        except OverflowError:
            raise ValueError("a result without its time") from None
    if seconds < "1970":  # Go's zero time: nobody noted it
        return _UNKNOWN_TIME
    fraction = (fraction or "").rstrip("0")
    return f"{seconds}.{fraction}" if fraction else seconds


def time_text(created_at: str, *, short: bool) -> str:
    """Return a time as BuildKit reads it; a short one has whole seconds."""
    if created_at == _UNKNOWN_TIME:
        return "0001-01-01T00:00:00Z"
    return (created_at.partition(".")[0] if short else created_at) + "Z"


def _index(value: Any, count: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise ValueError("an index out of range")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise TypeError("not a text")
    return value


def _hash(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=_ID_BYTES).digest()
