"""Which records of several builds are one: BuildKit's own rule, carried to its end.

Two records are one when they have the same digest and share, for every input, at least one
alternative (parent and selector); what is one then has the alternatives of both. BuildKit applies
this while it reads a document (`cache/remotecache/v1/chains.go`, `CacheChains.Add`). A merge never
undoes a reason for another, so the end is the same for every order.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from offload_cache.unify.records import record_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_cache.unify.records import Record

Inputs = list[set[tuple[bytes, str]]]


class Closure:
    """Classes of records that are one.

    Args:
        records: of all builds, by identifier; parents of each are among them.
    """

    def __init__(self, records: Mapping[bytes, Record]) -> None:
        self._records = records
        self._above: dict[bytes, bytes] = {}
        self._members: dict[bytes, list[bytes]] = {}
        self._inputs: dict[bytes, Inputs] = {}
        self._order = sorted(records, key=lambda name: (records[name].depth, name))
        self._unite_all()

    def _find(self, name: bytes) -> bytes:
        above = self._above.get(name, name)
        while above != name:
            further = self._above.get(above, above)
            self._above[name] = further
            name, above = above, further
        return name

    def _unite_all(self) -> None:
        merged = True
        while merged:
            merged = self._pass()

    def _pass(self) -> bool:
        """Go through all classes once, parents before children; return whether any two met."""
        merged = False
        index: dict[tuple[str, int, bytes, str], set[bytes]] = defaultdict(set)
        former: dict[bytes, list[bytes]] = defaultdict(list)
        for name in self._order:
            former[self._find(name)].append(name)
        self._members, self._inputs = {}, {}
        for home, names in former.items():
            # What is one already has the alternatives of all its records.
            inputs = self._alternatives(names)
            digest, at = self._records[home].digest, home
            for twin in self._twins(index, digest, inputs):
                if (other := self._find(twin)) != at:
                    # The smaller name stays: the outcome must not depend on the order.
                    at, gone = min(at, other), max(at, other)
                    self._above[gone] = at
                    self._move(gone, at)
                    merged = True
            self._members.setdefault(at, []).extend(names)
            own = self._inputs.setdefault(at, [set() for _ in inputs])
            for number, some in enumerate(inputs):
                own[number] |= some
                for parent, selector in some:
                    index[digest, number, parent, selector].add(at)
        return merged

    def _alternatives(self, names: Sequence[bytes]) -> Inputs:
        """Return the alternatives of records that are one, for each input."""
        found: Inputs = [set() for _ in self._records[names[0]].inputs]
        for name in names:
            for own, some in zip(found, self._records[name].inputs, strict=True):
                own |= {(self._find(parent), selector) for parent, selector in some}
        return found

    def _move(self, gone: bytes, home: bytes) -> None:
        self._members.setdefault(home, []).extend(self._members.pop(gone, []))
        moved = self._inputs.pop(gone, None)
        if moved is not None:
            own = self._inputs.setdefault(home, [set() for _ in moved])
            for number, some in enumerate(moved):
                own[number] |= some

    def _twins(
        self,
        index: Mapping[tuple[str, int, bytes, str], set[bytes]],
        digest: str,
        inputs: Inputs,
    ) -> set[bytes]:
        """Return the classes so far that share an alternative of every input."""
        found: set[bytes] | None = None
        for number, some in enumerate(inputs):
            sharing: set[bytes] = set()
            for parent, selector in some:
                sharing |= index.get((digest, number, parent, selector), set())
            sharing = {self._find(name) for name in sharing}
            found = sharing if found is None else found & sharing
            if not found:
                return set()
        count = len(inputs)
        return {name for name in found or () if len(self._inputs[name]) == count}

    def classes(self) -> dict[bytes, tuple[str, Inputs, list[bytes]]]:
        """Return the classes by name: digest, alternatives of each input, names of the records.

        A link that would make a class its own ancestor is left out, and with it what then has an
        input without alternatives; builds do not make such records, but their union may.
        """
        inputs = {
            home: [{(self._find(parent), selector) for parent, selector in some} for some in own]
            for home, own in self._inputs.items()
        }
        _break_loops(inputs)
        return {
            home: (self._records[home].digest, own, self._members[home])
            for home, own in inputs.items()
        }


def _parents(own: Inputs) -> set[bytes]:
    return {parent for some in own for parent, _ in some}


def parents_first(inputs: Mapping[bytes, Inputs]) -> list[bytes]:
    """Return names so that parents come before their children; what is in a loop is missing."""
    children: dict[bytes, list[bytes]] = defaultdict(list)
    waiting = {}
    for name, own in inputs.items():
        parents = _parents(own)
        waiting[name] = len(parents)
        for parent in parents:
            children[parent].append(name)
    order = [name for name, count in waiting.items() if count == 0]
    for name in order:  # grows while it is read
        for child in children.get(name, ()):
            waiting[child] -= 1
            if waiting[child] == 0:
                order.append(child)
    return order


def _break_loops(inputs: dict[bytes, Inputs]) -> None:
    done = set(parents_first(inputs))
    if len(done) == len(inputs):
        return
    group = _loops({name: _parents(own) - done for name, own in inputs.items() if name not in done})
    for name, own in inputs.items():
        if name in group:
            for some in own:
                some -= {link for link in some if group.get(link[0]) == group[name]}
    _drop_orphans(inputs)


def _drop_orphans(inputs: dict[bytes, Inputs]) -> None:
    while empty := [name for name, own in inputs.items() if not all(own)]:
        for name in empty:
            del inputs[name]
        for own in inputs.values():
            for some in own:
                some -= {link for link in some if link[0] not in inputs}


def _loops(parents: Mapping[bytes, Iterable[bytes]]) -> dict[bytes, int]:
    """Return a number for each name; names on one loop have the same (Tarjan's algorithm)."""
    number: dict[bytes, int] = {}
    low: dict[bytes, int] = {}
    group: dict[bytes, int] = {}
    stack: list[bytes] = []
    for start in parents:
        if start in number:
            continue
        work = [(start, iter(parents[start]))]
        number[start] = low[start] = len(number)
        stack.append(start)
        while work:
            name, rest = work[-1]
            for parent in rest:
                if parent not in number:
                    number[parent] = low[parent] = len(number)
                    stack.append(parent)
                    work.append((parent, iter(parents[parent])))
                    break
                if parent not in group:
                    low[name] = min(low[name], number[parent])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == number[name]:
                    while True:
                        member = stack.pop()
                        group[member] = number[name]
                        if member == name:
                            break
    return group


def rename(classes: Mapping[bytes, tuple[str, Inputs, list[bytes]]]) -> dict[bytes, bytes]:
    """Return for each class the identifier that its record has in a document of its own."""
    names: dict[bytes, bytes] = {}
    for home in parents_first({home: own for home, (_, own, _) in classes.items()}):
        digest, own, _ = classes[home]
        names[home] = record_name(
            digest, [[(names[parent], selector) for parent, selector in some] for some in own]
        )
    return names
