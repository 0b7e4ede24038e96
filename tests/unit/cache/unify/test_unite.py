from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_cache.contributions import CacheLayer
from offload_cache.unify import (
    SALT_PREFIX,
    Part,
    Rendered,
    read_part,
    render,
    salt_digest,
    unite,
)
from offload_core.digest import sha256_digest
from offload_core.errors import UsageError
from tests.fixtures.cachecontent import LAYER_TYPE, step_config
from tests.fixtures.cacheimporter import Importer

SALT = salt_digest("p")
TIMES = ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.5Z", "2026-01-02T03:04:05.25+01:00"]


def layer(name: str, **changes: Any) -> CacheLayer:
    digest = sha256_digest(name.encode())
    values = {"digest": digest, "size_bytes": 3, "media_type": LAYER_TYPE, "annotations": {}}
    return CacheLayer(**{**values, **changes})


LAYERS = [layer(name) for name in "abcd"]
BLOBS = [item.digest for item in LAYERS]


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """Records of a world in which a key of level n has parents of lower levels."""
    layers = []
    for number in range(draw(st.integers(0, 5))):
        parent = draw(st.integers(-1, number - 1))
        layers.append({"blob": draw(st.sampled_from(BLOBS)), "parent": parent})
    records: list[dict[str, Any]] = []
    levels: list[int] = []
    for _ in range(draw(st.integers(1, 10))):
        below = [index for index, level in enumerate(levels) if level < 3]
        inputs = []
        if below:
            links = st.fixed_dictionaries(
                {"link": st.sampled_from(below), "selector": st.sampled_from(["", "/x"])}
            )
            inputs = draw(st.lists(st.lists(links, min_size=1, max_size=2), max_size=2))
        level = max((levels[link["link"]] + 1 for some in inputs for link in some), default=0)
        name = f"{level}{len(inputs)}{draw(st.sampled_from('ab'))}"
        record: dict[str, Any] = {"digest": sha256_digest(name.encode()), "inputs": inputs}
        if layers and draw(st.booleans()):
            index = draw(st.integers(0, len(layers) - 1))
            record["layers"] = [{"layer": index, "createdAt": draw(st.sampled_from(TIMES))}]
        records.append(record)
        levels.append(level)
    return json.dumps({"layers": layers, "records": records}).encode()


def part(config: bytes) -> Part:
    return read_part(config, LAYERS)


def united(*parts: Part, have: set[str] | None = None, short: bool = False) -> Rendered:
    return render(unite(parts, lambda digest: have is None or digest in have), SALT, short=short)


@given(st.lists(configs(), min_size=1, max_size=4), st.randoms(), st.sets(st.sampled_from(BLOBS)))
def test_the_outcome_depends_neither_on_order_nor_on_repetition(
    documents: list[bytes], random: Any, have: set[str]
) -> None:
    parts = [part(document) for document in documents]
    first = united(*parts, have=have)
    random.shuffle(parts)
    assert united(*parts, parts[0], have=have) == first
    assert united(part(first.config), have=have) == first
    assert united(part(first.config), *parts, have=have) == first


def test_what_two_records_have_together_can_make_them_one_with_a_third() -> None:
    def step(*inputs: str) -> dict[str, object]:
        links = [[{"link": 0, "selector": name} for name in some.split(",")] for some in inputs]
        return {"digest": sha256_digest(b"step"), "inputs": links}

    root = {"digest": sha256_digest(b"root"), "inputs": []}
    documents = [
        json.dumps({"layers": [], "records": [root, record]}).encode()
        for record in (step("a,b", "a"), step("b", "b"), step("a", "a,b"))
    ]
    for order in itertools.permutations(documents):
        assert united(*map(part, order)).record_count == 2


@given(st.lists(configs(), min_size=1, max_size=4))
def test_buildkit_tells_apart_exactly_the_records_that_are_left(documents: list[bytes]) -> None:
    rendered = united(*map(part, documents))
    importer = Importer(rendered.config)
    assert len(importer.items) == rendered.record_count + 1  # and the salt
    raw = json.loads(rendered.config)
    assert len(raw["records"]) == rendered.record_count + 1


@given(st.lists(configs(), min_size=1, max_size=4))
def test_every_record_of_every_contribution_is_found(documents: list[bytes]) -> None:
    rendered = part(united(*map(part, documents)).config)
    for document in documents:
        found: dict[bytes, set[bytes]] = {}
        own = part(document)
        for name, record in sorted(own.records.items(), key=lambda item: item[1].depth):
            found[name] = {
                other
                for other, candidate in rendered.records.items()
                if candidate.digest == record.digest
                and len(candidate.inputs) == len(record.inputs)
                and all(
                    {(p, s) for parent, s in some for p in found[parent]} & alternatives
                    for some, alternatives in zip(record.inputs, candidate.inputs, strict=True)
                )
            }
            assert found[name]
            whole = any(_chain(own, result.chain) <= set(BLOBS) for result in record.results)
            assert not whole or any(rendered.records[other].results for other in found[name])


def _chain(of: Part, chain: bytes | None) -> set[str]:
    found = set()
    while chain is not None:
        blob, chain = of.chains[chain]
        found.add(blob)
    return found


def steps(*names: str, layers: str = "", base: str = "base", created: str = "2026-01-01") -> Part:
    blobs = [name.encode() for name in layers]
    return part(step_config(*names, layers=blobs, base=base, created=created))


def listed(rendered: Rendered) -> list[str]:
    return list(rendered.layers)


def test_the_oldest_result_whose_layers_are_all_there_stays() -> None:
    old = steps("one", "two", layers="ab", created="2026-01-01")
    new = steps("one", "two", layers="cd", created="2026-01-02")
    a, b, c, d = BLOBS
    assert listed(united(old, new)) == sorted([a, b])
    assert listed(united(old, new, have={c, d})) == sorted([c, d])
    # The first step's old result is whole, the second's is not.
    assert listed(united(old, new, have={a, c, d})) == sorted([a, c, d])
    union = unite([old, new], lambda digest: digest in {a, c, d})
    assert union.missing == {b}


def test_a_record_stays_when_its_result_is_gone() -> None:
    rendered = united(steps("one", "two", layers="ab"), have=set())
    assert (rendered.record_count, rendered.layers) == (3, {})
    assert "layers" not in json.loads(rendered.manifest()).get("config")
    assert json.loads(rendered.config)["layers"] == []


def test_equal_ages_are_decided_by_the_layers() -> None:
    rendered = united(steps("one", layers="a"), steps("one", layers="b"))
    assert listed(rendered) == [min(BLOBS[:2])]


def test_records_are_one_when_every_input_shares_an_alternative() -> None:
    def copy(*alternatives: str, result: int) -> Part:
        roots = [{"digest": sha256_digest(name.encode())} for name in ("base", *alternatives)]
        links = [{"link": index} for index in range(1, len(roots))]
        step = {
            "digest": sha256_digest(b"copy"),
            "inputs": [[{"link": 0}], links],
            "layers": [{"layer": result, "createdAt": TIMES[result]}],
        }
        return part(
            json.dumps(
                {
                    "layers": [{"blob": blob, "parent": -1} for blob in BLOBS],
                    "records": [*roots, step],
                }
            ).encode()
        )

    one, two, three = copy("x", result=0), copy("x", "y", result=1), copy("y", result=0)
    assert united(one, three).record_count == 5
    assert united(one, two, three).record_count == 4
    assert listed(united(one, two, three)) == [BLOBS[0]]


def test_salt_never_makes_two_records_one() -> None:
    """Two bases under one command: BuildKit would take the layer of the wrong base."""
    rendered = united(steps("run", layers="a", base="x"), steps("run", layers="b", base="y"))
    importer = Importer(rendered.config)
    assert sorted(len(item.results) for item in importer.items) == [0, 0, 0, 1, 1]
    salts = [r for r in json.loads(rendered.config)["records"] if "inputs" not in r]
    assert sum(record["digest"].startswith(SALT_PREFIX) for record in salts) == 1


def test_salt_of_our_own_imports_is_taken_out() -> None:
    plain = steps("one", "two", layers="ab")
    salted = united(plain)
    assert part(salted.config).records.keys() == plain.records.keys()
    other = render(unite([plain], lambda _: True), salt_digest("another project"))
    assert other.config != salted.config
    assert united(part(other.config), part(salted.config)) == salted


def test_records_that_would_become_their_own_parents_are_left_out() -> None:
    """No build makes these: one says a comes before b, the other the reverse."""

    def pair(first: str, second: str) -> Part:
        records = [
            {"digest": sha256_digest(b"root")},
            {"digest": sha256_digest(first.encode()), "inputs": [[{"link": 0}]]},
            {
                "digest": sha256_digest(second.encode()),
                "inputs": [[{"link": 0}, {"link": 1}]],
            },
            {"digest": sha256_digest(b"top"), "inputs": [[{"link": 2}]]},
        ]
        return part(json.dumps({"records": records}).encode())

    one, two = pair("a", "b"), pair("b", "a")
    rendered = united(one, two)
    assert rendered == united(two, one)
    assert rendered == united(part(rendered.config))
    Importer(rendered.config)
    assert rendered.record_count == 5  # each "top" keeps its own parent


ROOT = {"digest": sha256_digest(b"r")}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"records": 3},
        {"records": [3]},
        {"records": [{"digest": ""}]},
        {"records": [{"digest": "random:abc"}]},
        {"records": [{**ROOT, "inputs": [[{"link": 0}]]}]},
        {"records": [{**ROOT, "inputs": [[{"link": 1}]]}, {**ROOT, "inputs": [[{"link": 0}]]}]},
        {"records": [{**ROOT, "inputs": [[{"link": 1}]]}]},
        {"records": [{**ROOT, "inputs": [[{"link": -1}]]}]},
        {"records": [ROOT, {**ROOT, "inputs": [[]]}]},
        {"records": [ROOT, {**ROOT, "inputs": [[{"link": True}]]}]},
        {"records": [ROOT, {**ROOT, "inputs": [[{"link": 0, "selector": 1}]]}]},
        {"records": [{**ROOT, "layers": [{"layer": 0, "createdAt": TIMES[0]}]}]},
        {"layers": [{"blob": BLOBS[0], "parent": 0}]},
        {"layers": [{"blob": BLOBS[0], "parent": 1}, {"blob": BLOBS[0], "parent": 0}]},
        {"layers": [{"blob": BLOBS[0], "parent": -2}]},
        {"layers": [{"blob": "sha256:x", "parent": -1}]},
        {
            "layers": [{"blob": BLOBS[0], "parent": -1}],
            "records": [{**ROOT, "layers": [{"layer": 0, "createdAt": "yesterday"}]}],
        },
        {
            "layers": [{"blob": BLOBS[0], "parent": -1}],
            "records": [
                {**ROOT, "layers": [{"layer": 0, "createdAt": "0001-01-01T00:00:00+10:00"}]}
            ],
        },
    ],
)  # fmt: skip
def test_what_buildkit_would_refuse_is_refused(document: object) -> None:
    with pytest.raises(UsageError):
        part(json.dumps(document).encode())


@settings(max_examples=200)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["records", "layers", "digest", "inputs", "link", "blob", "parent", "chains"]
    ), inner, max_size=4), max_leaves=20))  # fmt: skip
def test_whatever_is_read_ends_in_records_or_a_usage_error(document: object) -> None:
    try:
        part(json.dumps(document).encode())
    except UsageError:
        return


def test_chained_results_and_unknown_ages_are_read() -> None:
    document = {
        "layers": [{"blob": BLOBS[0], "parent": -1}, {"blob": BLOBS[1], "parent": -1}],
        "records": [
            {**ROOT, "chains": [{"layers": [1, 0], "createdAt": "0001-01-01T00:00:00Z"}]},
        ],
    }
    rendered = united(part(json.dumps(document).encode()))
    raw = json.loads(rendered.config)
    top = raw["records"][1]["layers"][0]
    assert top["createdAt"] == "0001-01-01T00:00:00Z"
    upper = raw["layers"][top["layer"]]
    assert (upper["blob"], raw["layers"][upper["parent"]]["blob"]) == (BLOBS[0], BLOBS[1])
    # A known age wins over an unknown one.
    known = {**ROOT, "layers": [{"layer": 0, "createdAt": TIMES[0]}]}
    other = part(json.dumps({"layers": document["layers"], "records": [known]}).encode())
    assert listed(united(part(json.dumps(document).encode()), other)) == [BLOBS[0]]


def test_descriptors_do_not_depend_on_who_describes_a_layer() -> None:
    one = layer(
        "a", annotations={"containerd.io/distribution.source.x": "y", "buildkit/createdat": "1"}
    )
    two = layer("a", annotations={"buildkit/createdat": "0"})  # fmt: skip
    config = step_config("one", layers=[b"a"])
    first, second = read_part(config, [one]), read_part(config, [two])
    assert united(first, second) == united(second, first)
    raw = json.loads(united(first).manifest())["layers"][0]
    assert raw["annotations"] == {"buildkit/createdat": "1"}
    assert "annotations" not in json.loads(united(first, short=True).manifest())["layers"][0]


def test_unlisted_layers_leave_the_rest_of_the_manifest_as_it_is() -> None:
    rendered = united(steps("one", "two", layers="ab"))
    whole, part_of_it = json.loads(rendered.manifest()), json.loads(rendered.manifest({BLOBS[1]}))
    assert [item["digest"] for item in part_of_it["layers"]] == [BLOBS[1]]
    assert {**whole, "layers": 0} == {**part_of_it, "layers": 0}
    assert len(rendered.manifest()) <= rendered.manifest_bytes
