from __future__ import annotations

from offload_builder.node.stepmatching import ANY, SURE, matching_steps

SHELL = ("/bin/sh", "-c")


def test_a_process_is_the_step_that_says_the_same():
    names = {
        "a": "[stage-0 2/5] RUN curl -s http://one.example/x",
        "b": "[stage-0 3/5] RUN --mount=type=cache,target=/c curl -s http://two.example/x",
    }
    assert matching_steps((*SHELL, "curl -s http://two.example/x"), names) == ["b"]


def test_variables_that_are_filled_in_do_not_hide_a_step():
    names = {
        "a": "[2/3] RUN make install PREFIX=/usr/local VERSION=1.2",
        "b": "[3/3] RUN apt-get update",
    }
    assert matching_steps((*SHELL, "make install PREFIX=$P VERSION=$V"), names) == ["a"]


def test_a_program_under_an_emulator_is_found_by_its_command():
    names = {"a": "[linux/arm64 2/2] RUN uname -a && id", "b": "[linux/arm64 1/2] RUN date"}
    arguments = ("/dev/.buildkit_qemu_emulator", "-0", "/bin/sh", "/bin/sh", "-c", "uname -a && id")
    assert matching_steps(arguments, names) == ["a"]


def test_steps_that_say_the_same_are_both_named():
    names = {"a": "[linux/amd64 2/2] RUN make all", "b": "[linux/arm64 2/2] RUN make all"}
    assert sorted(matching_steps((*SHELL, "make all"), names)) == ["a", "b"]


def test_a_step_that_is_like_none_is_none_unless_one_may_guess():
    names = {"a": "[2/2] RUN <<EOF (set...)"}
    assert matching_steps((*SHELL, "curl http://evil.example"), names) == []
    assert matching_steps((*SHELL, "curl http://evil.example"), names, least=ANY) == ["a"]
    assert matching_steps((*SHELL, "x"), {}, least=ANY) == []


def test_one_that_is_nearly_alike_is_not_sure():
    names = {"a": "[s0 1/2] RUN probe one:7000 && sleep 1"}
    arguments = (*SHELL, "probe one:7001 && sleep 1")
    assert matching_steps(arguments, names, least=SURE) == []
    assert matching_steps(arguments, names) == ["a"]
    names["b"] = "[s1 1/2] RUN probe one:7001 && sleep 1"
    assert matching_steps(arguments, names, least=SURE) == ["b"]
