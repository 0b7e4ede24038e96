"""Bake files in HCL and JSON, read without docker buildx.

The common subset: targets, groups, variables with defaults that the environment overrides,
interpolation, conditionals, references and matrix. Source: docker's bake file reference.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

from offload_client.bake.definition import OLD_NAMES, Definition, Variable, check_name
from offload_client.bake.errors import unsupported
from offload_client.bake.hclexpression import to_text
from offload_client.bake.hclvalues import Block, unquoted
from offload_client.goboolean import parse_boolean
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_BLOCKS = ("variable", "group", "target", "function")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def parse_hcl(file: str, text: str) -> dict[str, Any]:
    """Return the document of an HCL file as python-hcl2 gives it.

    Raises:
        BakeError: it is no HCL, or python-hcl2 is missing.
    """
    try:
        import hcl2
        from lark.exceptions import LarkError
    except ImportError as error:
        raise BakeError(
            f"{file} is in HCL, and neither docker buildx nor python-hcl2 is there to read it",
            hint="install docker buildx, or run: pip install 'offload-build[bake]'",
        ) from error
    try:
        return dict(hcl2.loads(text if text.endswith("\n") else f"{text}\n"))
    except LarkError as error:
        line = getattr(error, "line", None)
        where = f"{file}:{line}" if isinstance(line, int) and line > 0 else file
        raise BakeError(f"{where}: this is not HCL that can be read here") from error


def parse_json(file: str, text: str) -> dict[str, Any]:
    """Return the document of a JSON file.

    Raises:
        BakeError: it is no JSON object.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BakeError(f"{file}: {error}") from error
    if not isinstance(document, dict):
        raise BakeError(f"{file} is not a JSON object")
    return document


class BakeBlocks:
    """The blocks of several files, evaluated together."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Know none yet.

        Args:
            environment: overrides the defaults of variables.
        """
        self._environment = environment
        self._variables: dict[str, Block] = {}
        self._globals: dict[str, Block] = {}
        self._groups: list[tuple[str, Block]] = []
        self._targets: list[tuple[str, Block]] = []
        self._values: dict[str, Any] = {}
        self._evaluating: list[str] = []
        self._reading: list[str] = []
        """Fields of targets that are being evaluated for others."""

    def add(self, file: str, document: Mapping[str, Any], *, is_json: bool) -> None:
        """Add the blocks of one file.

        Raises:
            BakeError: it has no such form.
        """
        for kind in _BLOCKS:
            for label, attributes in _labelled(file, kind, document.get(kind)):
                if not isinstance(attributes, dict):
                    raise BakeError(f'{file}: the {kind} "{label}" is not an object')
                self._add_block(kind, label, Block(file, attributes, is_json))
        rest = Block(file, document, is_json)
        for name in rest.names():
            if name not in _BLOCKS:
                self._globals[name] = rest

    def _add_block(self, kind: str, label: str, block: Block) -> None:
        if kind == "function":
            raise unsupported(f'{block.file}: the function "{label}"')
        if kind == "variable":
            if "validation" in block.attributes:
                raise unsupported(f'{block.file}: "validation" of the variable {label}')
            self._variables[label] = block
        else:
            (self._groups if kind == "group" else self._targets).append((label, block))

    def into(self, definition: Definition) -> None:
        """Evaluate everything and add it to a definition.

        Raises:
            BakeError: an expression is wrong or not supported, or a name is none.
        """
        definition.variables += [self._shown(name) for name in sorted(self._variables)]
        for name, block in self._groups:
            members = block.value("targets", self._lookup)
            if not _is_texts(members):
                raise BakeError(f'{block.file}: "targets" of the group {name} is not a list')
            description = block.value("description", self._lookup)
            definition.add_group(name, members, str(description or ""))
        for name, block in self._targets:
            self._add_target(definition, name, block)

    def _shown(self, name: str) -> Variable:
        block = self._variables[name]
        value = self._lookup(name)
        shown = "" if value is None else _shown_value(value)
        description = str(block.value("description", self._lookup) or "")
        return Variable(name, shown, description, str(block.attributes.get("type", "")))

    def _add_target(self, definition: Definition, name: str, block: Block) -> None:
        if "matrix" not in block.attributes:
            if "name" in block.attributes:
                raise BakeError(f'{block.file}: target {name} has a "name" but no "matrix"')
            definition.add_target(name, self._fields(block, self._lookup))
            return
        made = []
        for values in self._combinations(name, block):
            lookup = self._with(values)
            own_name = block.value("name", lookup)
            if not isinstance(own_name, str):
                raise BakeError(f'{block.file}: target {name} has a "matrix" but no "name"')
            check_name("target", own_name)
            if own_name in made:
                raise BakeError(f'{block.file}: the matrix of {name} makes "{own_name}" twice')
            made.append(own_name)
            definition.add_target(own_name, self._fields(block, lookup))
        definition.add_group(name, made)

    def _combinations(self, name: str, block: Block) -> list[dict[str, Any]]:
        matrix = block.value("matrix", self._lookup)
        if not isinstance(matrix, dict) or not all(isinstance(v, list) for v in matrix.values()):
            raise BakeError(f"{block.file}: the matrix of target {name} is not an object of lists")
        return [
            dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())
        ]

    def _with(self, values: Mapping[str, Any]) -> Callable[[str], Any]:
        return lambda name: values[name] if name in values else self._lookup(name)

    def _fields(self, block: Block, lookup: Callable[[str], Any]) -> dict[str, Any]:
        return {
            OLD_NAMES.get(name, name): block.value(name, lookup)
            for name in block.names()
            if name not in ("matrix", "name")
        }

    def _lookup(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        if name in self._evaluating:
            raise BakeError(f'the variable "{name}" depends on itself')
        self._evaluating.append(name)
        try:
            value = self._evaluated(name)
        finally:
            self._evaluating.pop()
        self._values[name] = value
        return value

    def _evaluated(self, name: str) -> Any:
        if name in self._variables:
            block = self._variables[name]
            default = block.value("default", self._lookup)
            if name in self._environment:
                return _overridden(name, default, self._environment[name])
            return default
        if name in self._globals:
            return self._globals[name].value(name, self._lookup)
        if name == "target":
            return _LazyTargets(self._targets, self._lookup, self._reading)
        raise BakeError(f'there is no variable named "{name}"')


class _LazyTargets(dict[str, Any]):
    """`target.NAME.FIELD`: what the blocks themselves say."""

    def __init__(
        self,
        targets: list[tuple[str, Block]],
        lookup: Callable[[str], Any],
        reading: list[str],
        name: str = "",
    ) -> None:
        super().__init__()
        self._blocks = targets
        self._lookup = lookup
        self._reading = reading
        self._name = name

    def __getitem__(self, key: str) -> Any:
        if not self._name:
            named = [item for item in self._blocks if item[0] == key]
            if not named:
                raise KeyError(key)
            return _LazyTargets(named, self._lookup, self._reading, key)
        for _, block in reversed(self._blocks):
            if key in block.attributes:
                return self._value(block, key)
        raise KeyError(key)

    def _value(self, block: Block, key: str) -> Any:
        where = f"{self._name}.{key}"
        if where in self._reading:
            raise BakeError(f'"target.{where}" depends on itself')
        self._reading.append(where)
        try:
            return block.value(key, self._lookup)
        finally:
            self._reading.pop()


def _labelled(file: str, kind: str, found: Any) -> list[tuple[str, Any]]:
    """Return label and content of each block of a kind, in HCL's and in JSON's form."""
    groups = found if isinstance(found, list) else [found or {}]
    if not all(isinstance(group, dict) for group in groups):
        raise BakeError(f'{file}: "{kind}" is not an object')
    return [(unquoted(label), content) for group in groups for label, content in group.items()]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _overridden(name: str, default: Any, text: str) -> Any:
    """Return what the environment says, as the type that the default has."""
    if isinstance(default, bool):
        value = parse_boolean(text)
        if value is None:
            raise BakeError(f'the variable {name} is "{text}", which is neither true nor false')
        return value
    if isinstance(default, int | float):
        if not _NUMBER.fullmatch(text):
            raise BakeError(f'the variable {name} is "{text}", which is not a number')
        return float(text) if "." in text else int(text)
    if isinstance(default, list | dict):
        raise unsupported(f"a list or an object in the environment, as {name},")
    return text


def _shown_value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else to_text(value)
