"""Which build brings which blob: one asks, the others wait, and nothing is left behind."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from offload_builder.node.arrivals import Arrivals

A, B = b"a" * 32, b"b" * 32


class Build:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.bringing: set[bytes] = set()
        self.waiting: set[bytes] = set()
        self.got: list[tuple[bytes, bool]] = []

    def arrived(self, digests: list[bytes], *, verified: bool) -> None:
        for digest in digests:
            assert digest in self.bringing | self.waiting
            self.bringing.discard(digest)
            self.waiting.discard(digest)
            self.got.append((digest, verified))

    def take_over(self, digests: list[bytes]) -> None:
        assert self.waiting >= set(digests)
        self.waiting.difference_update(digests)
        self.bringing.update(digests)

    def claim(self, arrivals: Arrivals, digest: bytes) -> bool:
        mine = arrivals.claim(self, digest)
        (self.bringing if mine else self.waiting).add(digest)
        return mine


def test_the_first_brings_and_the_others_wait():
    arrivals, builds = Arrivals(), [Build() for _ in range(5)]
    assert [build.claim(arrivals, A) for build in builds] == [True, False, False, False, False]
    assert builds[3].claim(arrivals, B)
    arrivals.arrived([A], verified=True)
    assert all(build.got == [(A, True)] for build in builds)
    assert len(arrivals) == 1


def test_who_waits_longest_takes_over():
    arrivals, builds = Arrivals(), [Build() for _ in range(3)]
    for build in builds:
        build.claim(arrivals, A)
    arrivals.give_up(builds[0], [A])
    assert [build.bringing for build in builds[1:]] == [{A}, set()]
    arrivals.give_up(builds[1], [A])
    assert builds[2].bringing == {A}
    arrivals.give_up(builds[2], [A, B])
    assert len(arrivals) == 0


class ArrivalsMachine(RuleBasedStateMachine):
    """Several builds claim, deliver, fail and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals = Arrivals()
        self.builds = [Build() for _ in range(5)]

    def one(self, number: int) -> Build:
        return self.builds[number]

    @rule(number=st.integers(0, 4), digest=st.sampled_from([A, B, b"c" * 32]))
    def claims(self, number, digest):
        build = self.one(number)
        if digest not in build.bringing | build.waiting:
            build.claim(self.arrivals, digest)

    @rule(digests=st.sets(st.sampled_from([A, B, b"c" * 32])), verified=st.booleans())
    def arrive(self, digests, verified):
        self.arrivals.arrived(digests, verified=verified)
        assert not any((build.bringing | build.waiting) & digests for build in self.builds)

    @rule(number=st.integers(0, 4), digest=st.sampled_from([A, B, b"c" * 32]))
    def fails(self, number, digest):
        build = self.one(number)
        build.bringing.discard(digest)
        build.waiting.discard(digest)
        self.arrivals.give_up(build, [digest])

    @rule(number=st.integers(0, 4))
    def leaves(self, number):
        build = self.one(number)
        held = build.bringing | build.waiting
        build.bringing, build.waiting = set(), set()
        self.arrivals.give_up(build, held)

    @invariant()
    def one_build_brings_what_any_needs(self):
        for digest in (A, B, b"c" * 32):
            bringing = sum(digest in build.bringing for build in self.builds)
            waiting = sum(digest in build.waiting for build in self.builds)
            assert bringing == (digest in self.arrivals._bringing)
            assert bringing == 1 or (bringing == 0 and waiting == 0)
            assert len(self.arrivals._waiting.get(digest, ())) == waiting

    def teardown(self) -> None:
        for number in range(5):
            self.leaves(number)
        assert len(self.arrivals) == 0
        assert self.arrivals._waiting == {}


TestArrivals = ArrivalsMachine.TestCase
TestArrivals.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
