"""What --allow takes."""

from __future__ import annotations

import pytest

from offload_client.connect.allowed import parse_allowed
from offload_core.errors import UsageError


def test_a_host_is_found_under_its_name_or_elsewhere():
    assert parse_allowed(["Registry.Corp.example.:443", "web.office:80=127.0.0.1:8081"]) == {
        ("registry.corp.example", 443): ("registry.corp.example", 443),
        ("web.office", 80): ("127.0.0.1", 8081),
    }
    assert parse_allowed(["git.office:22=[fd00::7]:2222"]) == {
        ("git.office", 22): ("fd00::7", 2222)
    }


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        ([], "name at least one host"),
        (["registry.corp"], "takes HOST:PORT"),
        (["https://registry.corp:443"], "takes HOST:PORT"),
        (["registry.corp:https"], "takes HOST:PORT"),
        (["registry.corp:0"], "no port 0"),
        (["registry.corp:65536"], "no port 65536"),
        (["10.0.0.5:443"], "write NAME:443=10.0.0.5:443"),
        (["[fd00::1]:443"], "is no host name"),
        (["*.corp:443"], "is no host name"),
        (["a.corp:443="], "takes HOST:PORT"),
        (["a.corp:443", "A.corp:443=b:1"], "twice"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(texts, part):
    with pytest.raises(UsageError, match=part.replace("[", r"\[").replace("*", r"\*")):
        parse_allowed(texts)
