from __future__ import annotations

import pytest

from benchmarks.commands import Finished
from benchmarks.model import BenchmarkError, Case, Row
from benchmarks.report import format_table, to_json
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
        }
    ]


def test_table_shows_spread_and_whether_the_goal_is_met() -> None:
    text = format_table([row(), row(goal=0.4), row(goal=None)])
    assert "2.000 (1.000 - 9.000)" in text
    assert "0.25 - 1.80" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines()[2:]] == ["met", "missed", ""]


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
    assert "main" in benchmarks
    for name, benchmark in benchmarks.items():
        assert benchmark.name == name
        cases = [case.name for case in benchmark.cases]
        assert len(set(cases)) == len(cases)
    with pytest.raises(ValueError, match="kebab-case"):
        Case("Not_Kebab", "", "")
