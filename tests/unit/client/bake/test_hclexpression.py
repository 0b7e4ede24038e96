"""Expressions of HCL."""

from __future__ import annotations

import pytest

from offload_client.bake.hclexpression import evaluate, template
from offload_core.errors import BakeError

NAMES = {"TAG": "v1", "N": 3, "ON": True, "LIST": ["a", "b"], "ITEM": {"os": "linux"}}


def lookup(name: str):
    if name not in NAMES:
        raise BakeError(f'there is no variable named "{name}"')
    return NAMES[name]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"app:${TAG}"', "app:v1"),
        ('"a${"b${TAG}"}c"', "abv1c"),
        ('"$${TAG} %%{x}"', "${TAG} %{x}"),
        (r'"tab\tquote\" \u00e9"', 'tab\tquote" é'),
        ("N", 3),
        ('"${N}"', 3),
        ('"${N}-${ON}"', "3-true"),
        ("-N + 2 * 4", 5),
        ("1.5", 1.5),
        ('N == 3 ? "yes" : "no"', "yes"),
        ('ON && !(N > 5) ? LIST : ["c"]', ["a", "b"]),
        ('LIST[1]', "b"),
        ("ITEM.os", "linux"),
        ('ITEM["os"]', "linux"),
        ('{a = 1, "b": [true, null]}', {"a": 1, "b": [True, None]}),
        ('TAG != "v2" || missing', True),
        ("null", None),
    ],
)  # fmt: skip
def test_value(text: str, value: object):
    if text == 'TAG != "v2" || missing':
        with pytest.raises(BakeError, match="missing"):
            evaluate(text, lookup)
        return
    assert evaluate(text, lookup) == value


def test_the_alternative_that_is_not_taken_is_not_looked_up():
    assert evaluate('ON ? "a" : missing', lookup) == "a"
    assert evaluate('!ON ? "${missing}" : "b"', lookup) == "b"


def test_heredoc_has_no_escapes():
    assert template("RUN echo \\n ${TAG}\n", lookup, quoted=False) == "RUN echo \\n v1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("upper(TAG)", "the function upper()"),
        ("[for t in LIST : t]", 'a "for" expression'),
        ("{for t in LIST : t => t}", 'a "for" expression'),
        ("LIST[*]", '"[*]"'),
        ('"%{ if ON }x%{ endif }"', "directive"),
    ],
)
def test_what_only_buildx_understands_is_named(text: str, words: str):
    with pytest.raises(BakeError) as caught:
        evaluate(text, lookup)
    assert words in caught.value.message
    assert "buildx" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "1 +", '"open', '"${TAG"', "N ? 1 : 2", "TAG + 1", "1 / 0", "LIST[7]", "ITEM.cpu", "a b",
     "(" * 100 + "1" + ")" * 100],
)  # fmt: skip
def test_wrong_expressions_are_config_errors(text: str):
    with pytest.raises(BakeError):
        evaluate(text, lookup)
