"""Docker's flag syntax, brought into the one form that click reads alike.

Docker's commands take `-ttag`, `-t tag`, `-t=tag`, `--tag tag`, `--tag=tag`, `-q=false`,
`--load=false`, flags after PATH, and `--` before a PATH that begins with a dash.
Source: the documented behaviour of the spf13/pflag package, "Command line flag syntax".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.goboolean import parse_boolean
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HINT = "See 'offload-build --help'."


class FlagSyntax:
    """The flags of one command."""

    def __init__(
        self,
        names: Mapping[str, str],
        switches: frozenset[str],
        shorthands: Mapping[str, str] | None = None,
    ) -> None:
        """Learn the flags.

        Args:
            names: every spelling ("-t", "--tag") with the long spelling that it stands for.
            switches: long spellings of the flags that need no value.
            shorthands: of those, which only stand for a flag with a value ("--call=check"): of
                all that set one flag, the last of the command line counts, and "=false" sets none.
        """
        self._names = names
        self._switches = switches
        self._shorthands = shorthands or {}

    def normalise(self, arguments: Sequence[str]) -> list[str]:
        """Return the same command line as `--name=value`, `--switch`, `--` and positional words.

        A switch that was last said to be false is left out.

        Raises:
            UsageError: in docker's words: unknown flag, missing or wrong value.
        """
        values: list[str] = []
        switches: dict[str, bool] = {}
        words: list[str] = []
        rest = iter(arguments)
        for token in rest:
            if token == "--":  # noqa: S105 - no password
                words.extend(rest)
            elif token.startswith("--"):
                self._long(token, rest, values, switches)
            elif token.startswith("-") and len(token) > 1:
                self._short(token, rest, values, switches)
            else:
                words.append(token)
        return [*values, *(name for name, on in switches.items() if on), "--", *words]

    def _long(
        self, token: str, rest: Iterator[str], values: list[str], switches: dict[str, bool]
    ) -> None:
        name, equals, value = token.partition("=")
        if name in ("--", "---") or name.startswith("---"):
            raise UsageError(f"bad flag syntax: {token}", hint=HINT)
        if name not in self._names:
            raise UsageError(f"unknown flag: {name}", hint=HINT)
        if name in self._switches:
            on = self._boolean(name, value) if equals else True
            if name not in self._shorthands:
                switches[name] = on
            elif on:
                values.append(self._shorthands[name])
            return
        if not equals:
            given = next(rest, None)
            if given is None:
                raise UsageError(f"flag needs an argument: {name}", hint=HINT)
            value = given
        values.append(f"{self._names[name]}={value}")

    def _short(
        self, token: str, rest: Iterator[str], values: list[str], switches: dict[str, bool]
    ) -> None:
        letters = token[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            name = self._names.get(f"-{letter}")
            if name is None:
                raise UsageError(f"unknown shorthand flag: '{letter}' in {token}", hint=HINT)
            if name in self._switches:
                if letters.startswith("="):
                    switches[name] = self._boolean(name, letters[1:])
                    return
                switches[name] = True
                continue
            value = letters.removeprefix("=") if letters else next(rest, None)
            if value is None:
                raise UsageError(f"flag needs an argument: '{letter}' in {token}", hint=HINT)
            values.append(f"{name}={value}")
            return

    def _boolean(self, name: str, text: str) -> bool:
        value = parse_boolean(text)
        if value is None:
            shown = ", ".join((*(k for k, v in self._names.items() if v == name and k != v), name))
            raise UsageError(
                f'invalid argument "{text}" for "{shown}" flag: "{text}" is not true or false',
                hint=HINT,
            )
        return value
