from __future__ import annotations

import pytest

from benchmarks.commands import Finished
from benchmarks.model import Benchmark, BenchmarkError, Case, Row
from benchmarks.report import format_table, row_line, to_json
from benchmarks.suite import find_benchmarks

STEPS = "#1 [internal] load build definition\n#5 [base 1/2] COPY a b\n#6 [base 2/2] RUN x\n"


def row(goal: float | None = 1.0) -> Row:
    return Row("main", Case("warm", "ours", "peer", goal=goal), [1.0, 2.0, 9.0], [4.0, 4.0, 5.0])


def test_json_has_medians_and_their_ratio() -> None:
    assert to_json([row()]) == [
        {
            "benchmark": "main",
            "case": "warm",
            "ours": 2.0,
            "peer": 4.0,
            "unit": "s",
            "ratio": 0.5,
            "runs": 3,
            "goal": 1.0,
            "limit": None,
        }
    ]


def test_table_shows_spread_and_whether_the_goal_is_met() -> None:
    text = format_table([row(), row(goal=0.4), row(goal=None)])
    assert "2.000 (1.000 - 9.000)" in text
    assert "0.25 - 1.80" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines()[2:]] == ["met", "missed", ""]


def limited(limit: float, *, goal: float | None = None, peer: str = "peer") -> Case:
    return Case("bytes", "ours", peer, unit="MB", goal=goal, limit=limit)


def verdicts(rows: list[Row]) -> list[str]:
    return [line.split("|")[-2].strip() for line in format_table(rows).splitlines()[2:]]


def test_absolute_goal_is_for_every_run() -> None:
    figures, peer = [0.2, 0.3, 0.6], [100.0, 100.0, 100.0]
    rows = [Row("context", limited(limit), figures, peer) for limit in (0.6, 0.5)]
    assert verdicts(rows) == ["met", "missed"]
    assert "<= 0.5 MB" in format_table(rows)


def test_row_with_two_goals_is_met_when_both_are() -> None:
    cases = [limited(1.0, goal=goal) for goal in (0.5, 0.1)] + [limited(0.1, goal=0.5)]
    rows = [Row("context", case, [0.2], [1.0]) for case in cases]
    assert verdicts(rows) == ["met", "missed", "missed"]
    assert cases[0].goals == "<= 0.5 and <= 1 MB"


def test_row_without_a_peer_has_figures_and_no_ratio() -> None:
    alone = Row("context", limited(150.0, peer=""), [120.0], [])
    assert verdicts([alone]) == ["met"]
    assert row_line(alone) == "bytes: 120.000 MB, goal <= 150 MB"
    (found,) = to_json([alone])
    assert (found["ours"], found["peer"], found["ratio"], found["limit"]) == (120, None, None, 150)


def test_ratio_needs_a_peer() -> None:
    with pytest.raises(ValueError, match="nothing to compare with"):
        limited(1.0, goal=1.0, peer="")


def test_small_ratio_is_not_rounded_to_nothing() -> None:
    shown = [format_table([Row("context", limited(1.0), [ours], [1e4])]) for ours in (30.0, 0.3)]
    assert "| 0.003 |" in shown[0]
    assert "| < 0.001 |" in shown[1]


def test_beginning_of_names_selects_a_group_unless_it_is_a_name() -> None:
    names = ("memory-client", "memory-node", "scan", "scan-slow")
    benchmark = Benchmark("b", "", [Case(name, "", "") for name in names], lambda _: None)

    def selected(name: str) -> list[str]:
        return [case.name for case in benchmark.select(name)]

    assert selected("memory") == ["memory-client", "memory-node"]
    assert selected("scan") == ["scan"]
    assert selected("scan-slow") == ["scan-slow"]
    with pytest.raises(BenchmarkError, match="no case 'mem'"):
        benchmark.select("mem")


def test_cached_build_is_accepted_as_cached_only() -> None:
    done = Finished(0.1, STEPS + "#5 CACHED\n#6 CACHED\n")
    assert done.require_cached() == 0.1
    with pytest.raises(BenchmarkError, match="should run"):
        done.require_executed()


def test_fetched_layers_count_as_cached() -> None:
    fetched = f"#6 sha256:{'a' * 64} 1kB / 1kB done\n"
    assert Finished(0.1, STEPS + "#5 CACHED\n" + fetched).require_cached() == 0.1


def test_executed_step_is_not_accepted_as_cached() -> None:
    with pytest.raises(BenchmarkError, match="should be cached"):
        Finished(0.1, STEPS + "#5 CACHED\n#6 DONE 0.1s\n").require_cached()


def test_build_without_steps_is_accepted_as_nothing() -> None:
    for check in (Finished(0.1, "").require_cached, Finished(0.1, "").require_executed):
        with pytest.raises(BenchmarkError):
            check()


def test_benchmarks_and_cases_have_unique_kebab_case_names() -> None:
    benchmarks = find_benchmarks()
    assert {"main", "context"} <= benchmarks.keys()
    for name, benchmark in benchmarks.items():
        assert benchmark.name == name
        cases = [case.name for case in benchmark.cases]
        assert len(set(cases)) == len(cases)
    with pytest.raises(ValueError, match="kebab-case"):
        Case("Not_Kebab", "", "")
