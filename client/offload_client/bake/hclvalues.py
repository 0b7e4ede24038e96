"""Values of bake blocks in HCL and in JSON, which write expressions differently."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload_client.bake.hclexpression import evaluate, template
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_INTERNAL_KEYS = frozenset(("__is_block__", "__comments__", "__inline_comments__"))


@dataclass(frozen=True)
class Block:
    """One block, or the attributes outside of all blocks.

    Attributes:
        file: where it stands, for errors.
        attributes: as they were parsed.
        is_json: strings are templates; in HCL they are quoted when they are.
    """

    file: str
    attributes: Mapping[str, Any]
    is_json: bool

    def names(self) -> list[str]:
        """Return the names of the attributes."""
        return [key for key in self.attributes if key not in _INTERNAL_KEYS]

    def value(self, name: str, lookup: Callable[[str], Any]) -> Any:
        """Return the value of an attribute; None when it is not there.

        Raises:
            BakeError: an expression is wrong or not supported; the sentence names the file.
        """
        try:
            return self._value(self.attributes.get(name), lookup)
        except BakeError as error:
            if not error.message.startswith(f"{self.file}: "):
                error.args = (f"{self.file}: {name}: {error.message}",)
            raise

    def _value(self, raw: Any, lookup: Callable[[str], Any]) -> Any:
        if isinstance(raw, list):
            return [self._value(item, lookup) for item in raw]
        if isinstance(raw, dict):
            return {
                str(self._key(key, lookup)): self._value(item, lookup)
                for key, item in raw.items()
                if key not in _INTERNAL_KEYS
            }
        if not isinstance(raw, str):
            return raw
        if self.is_json:
            return template(raw, lookup, quoted=False)
        return hcl_value(raw, lookup)

    def _key(self, key: str, lookup: Callable[[str], Any]) -> Any:
        if self.is_json or not key.startswith(('"', "${")):
            return key
        return hcl_value(key, lookup)


def hcl_value(text: str, lookup: Callable[[str], Any]) -> Any:
    """Return the value of an attribute as python-hcl2 gives it.

    Raises:
        BakeError: the expression is wrong or not supported.
    """
    if text.startswith('"<<') and "\n" in text:
        return template(_heredoc(text[1:-1]), lookup, quoted=False)
    if text.startswith("${") and text.endswith("}"):
        return evaluate(text[2:-1], lookup)
    return evaluate(text, lookup)


def unquoted(label: str) -> str:
    """Return the label of a block without its quotes."""
    return label[1:-1] if label.startswith('"') and label.endswith('"') else label


def _heredoc(text: str) -> str:
    first, _, body = text.partition("\n")
    lines = body.split("\n")[:-1]
    if first.startswith("<<-"):
        lines = textwrap.dedent("\n".join(lines)).split("\n")
    return "".join(f"{line}\n" for line in lines)
