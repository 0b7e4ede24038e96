"""Image names: docker's grammar, and short forms that always mean the same image."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_core.errors import InvalidValueError
from offload_core.reference import familiar_reference, normalise_reference, split_reference


@pytest.mark.parametrize(
    ("name", "full", "short"),
    [
        ("app", "docker.io/library/app:latest", "app:latest"),
        ("team/app:1", "docker.io/team/app:1", "team/app:1"),
        ("docker.io/app", "docker.io/library/app:latest", "app:latest"),
        ("index.docker.io/app", "docker.io/library/app:latest", "app:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest", "localhost:5000/app:latest"),
        ("Host/app", "Host/app:latest", "Host/app:latest"),
        ("[::1]:5000/a/b:c", "[::1]:5000/a/b:c", "[::1]:5000/a/b:c"),
        ("docker.io/localhost/x", "docker.io/localhost/x:latest", "docker.io/localhost/x:latest"),
        ("docker.io/a.b/x", "docker.io/a.b/x:latest", "docker.io/a.b/x:latest"),
        ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
    ],
)
def test_names_and_their_short_forms(name: str, full: str, short: str) -> None:
    assert normalise_reference(name) == full
    assert familiar_reference(full) == short


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", ""),
        ("App", "lowercase"),
        ("team/App", "lowercase"),
        ("app:", ""),
        ("app::x", ""),
        ("app:.x", ""),
        ("a" * 300, "255"),
        ("a" * 64, "image ID"),
        ("app@sha256:" + "a" * 64, "digest"),
        ("-host/app", ""),
        ("ho..st/app", ""),
        ("a//b", ""),
        ("a b", ""),
        ("app:x\n", ""),
        ("ap\udce9p", ""),
        ("app:" + "t" * 129, ""),
    ],
)
def test_names_that_docker_refuses(name: str, problem: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid reference format") as caught:
        normalise_reference(name)
    assert problem in caught.value.message
    assert caught.value.exit_code == 1


part = st.from_regex(r"[a-z0-9]+([._-][a-z0-9]+)?", fullmatch=True).filter(lambda p: len(p) < 30)
host = st.sampled_from(["", "docker.io/", "index.docker.io/", "localhost/", "a.b:5000/", "Up/"])


@given(host, st.lists(part, min_size=1, max_size=3), st.sampled_from(["", ":1", ":v1.2-x"]))
def test_normalising_and_shortening_round_trip(first: str, parts: list[str], tag: str) -> None:
    full = normalise_reference(first + "/".join(parts) + tag)
    assert normalise_reference(full) == full
    assert normalise_reference(familiar_reference(full)) == full
    registry, path, label = split_reference(full)
    assert f"{registry}/{path}:{label}" == full
