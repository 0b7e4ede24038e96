"""Configuration: precedence, and mistakes that are named with their place."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest

from offload_builder.gateway.config import GatewayConfig
from offload_builder.node.config import NodeConfig
from offload_core.config import load, option
from offload_core.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    name: str = option(MISSING, "a text")
    count: int = option(3, "a number")
    share: float = option(0.5, "a number")
    on: bool = option(False, "a switch")
    folder: Path | None = option(None, "a path")
    size: int = option(1, "bytes", unit="size")
    wait: float = option(1.0, "seconds", unit="duration")
    names: list[str] = option([], "texts")
    pair: tuple[str, ...] = option(("a",), "texts")
    key: str = option("", "a secret", secret=True)
    table: dict[str, list[str]] = option({}, "texts by name")


def settings(tmp_path: Path, text: str = "", options=None, **environment: str) -> Settings:
    file = tmp_path / "c.toml"
    file.write_text(text)
    environment = {f"X_{key.upper()}": value for key, value in environment.items()}
    return load(Settings, file=file, environment=environment, prefix="X", options=options)


def test_values_of_every_type(tmp_path):
    found = settings(
        tmp_path,
        'name = "n"\ncount = 5\nshare = 2\non = true\nfolder = "~/x"\nsize = "2KiB"\n'
        'wait = "1m30s"\nnames = ["a", "b"]\npair = ["c"]\n',
    )
    assert found == Settings(
        "n", 5, 2.0, True, Path("~/x").expanduser(), 2048, 90.0, ["a", "b"], ("c",)
    )
    assert isinstance(found.share, float)


def test_environment_is_converted(tmp_path):
    found = settings(
        tmp_path, name="n", count="7", share="0.25", on="yes", folder="", size="1GB", wait="5s",
        names="a, b,,c", pair="x,y",
    )  # fmt: skip
    assert found == Settings("n", 7, 0.25, True, None, 10**9, 5.0, ["a", "b", "c"], ("x", "y"))


def test_tables_come_from_a_file_or_a_variable(tmp_path):
    text = 'name = "n"\n[table]\na = ["x", "y"]\n"b-*" = []\n'
    assert settings(tmp_path, text).table == {"a": ["x", "y"], "b-*": []}
    assert settings(tmp_path, text, table="c=x, y; d=;").table == {"c": ["x", "y"], "d": []}
    assert settings(tmp_path, text, table="").table == {}
    for wrong in ("c", "=x", "a=1;b"):
        with pytest.raises(ConfigError, match=r"X_TABLE: .* is not a table of lists"):
            settings(tmp_path, text, table=wrong)
    for wrong in ("table = 3\n", "[table]\na = 3\n", "[table]\na = [3]\n", "table = ['a']\n"):
        with pytest.raises(ConfigError, match=r"table: .* is not a table of lists"):
            settings(tmp_path, f'name = "n"\n{wrong}')


def test_option_beats_environment_beats_file_beats_default(tmp_path):
    text = 'name = "file"\ncount = 1\n'
    assert settings(tmp_path, text).count == 1
    assert settings(tmp_path, text, count="2").count == 2
    assert settings(tmp_path, text, {"count": 9, "share": None}, count="2") == Settings("file", 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nmae = 1", ["unknown key 'nmae'", "known keys are count, folder"]),
        ("count = true", ["c.toml: count", "True is not a whole number"]),
        ("count = 4.7", ["c.toml: count", "4.7 is not a whole number"]),
        ('count = "four"', ["'four' is not a whole number"]),
        ("name = 5", ["5 is not a text"]),
        ("on = 2", ["2 is not true or false"]),
        ("folder = 2", ["2 is not a path"]),
        ("names = 2", ["2 is not"]),
        ("names = [2]", ["[2] is not"]),
        ("share = nan", ["nan is not a number"]),
        ("wait = inf", ["inf is not a number"]),
        ('size = "big"', ["c.toml: size", '"big" is not a size']),
        ('wait = "soon"', ['"soon" is not a duration']),
        ("size = 1.5", ["1.5 is not a whole number"]),
        ("key = 12345", ["*** is not a text"]),
        ("name = [", ["is not valid TOML"]),
    ],
)
def test_mistakes_in_the_file_name_place_and_what_is_allowed(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, text)
    for word in (*words, str(tmp_path)):
        assert word in caught.value.message


def test_mistakes_in_the_environment_name_the_variable(tmp_path):
    with pytest.raises(ConfigError, match="X_COUNT: 'many' is not a whole number"):
        settings(tmp_path, count="many")


def test_required_value_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"name is not set; .* or as X_NAME"):
        settings(tmp_path)


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such"):
        load(Settings, file=tmp_path / "none.toml", environment={}, prefix="X")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(Settings, file=tmp_path / "bad.toml", environment={}, prefix="X")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"slots": 0}, "slots must be 1 or more"),
        ({"log_level": "loud"}, 'log_level "loud" is unknown'),
        ({"blobs_keep": 0}, "blobs_keep must be greater than 0"),
        ({"cache_grace": 3599.0}, "cache_grace must be an hour or more"),
        ({"cache_shared_pool_keep": -1}, "cache_shared_pool_keep must not be negative"),
        ({"drain_timeout": -1.0}, "drain_timeout must not be negative"),
        ({"listen": "host:port"}, "is not an address"),
        ({"advertise": ["a:1", "b:99999"]}, '"b:99999" is not an address'),
        ({"s3_endpoint": "http://x"}, "needs s3_access_key"),
        ({"s3_endpoint": "http://x", "s3_bucket": "a"}, '"a" cannot be the name of a bucket'),
        ({"s3_endpoint": "http://x", "s3_bucket": "10.0.0.1"}, "cannot be the name"),
    ],
)
def test_node_refuses_values_that_cannot_work(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        NodeConfig(gateway="g:1", **values)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Node-1.example.org", "node-1"),
        ("a_b", "a-b"),
        ("ünï", "n"),
        ("-", "node"),
        ("x" * 99, "x" * 40),
    ],
)
def test_names_of_nodes_fit_a_dns_label(given, name):
    assert NodeConfig(gateway="g:1", node_id=given).name() == name


def test_defaults_of_the_services_are_valid():
    assert NodeConfig(gateway="g:1").slots == 4
    assert GatewayConfig().log_level == "info"
