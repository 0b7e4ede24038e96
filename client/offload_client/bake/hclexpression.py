"""Expressions of HCL: literals, templates, references, conditionals and simple operators.

Source: the HCL native syntax specification, chapters "Expressions" and "Templates". Functions,
`for` and `%{...}` directives are left to docker buildx; they are refused by name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from offload_client.bake.errors import unsupported
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from collections.abc import Callable

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_-]*)"
    r"|(?P<mark>==|!=|<=|>=|&&|\|\||=>|\.\.\.|[()\[\]{},.?:<>!+*/%=-]))"
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\"}
_LEVELS: tuple[tuple[str, ...], ...] = (
    ("||",), ("&&",), ("==", "!="), ("<", ">", "<=", ">="), ("+", "-"), ("*", "/", "%"),
)  # fmt: skip
MAX_DEPTH = 64


def evaluate(text: str, lookup: Callable[[str], Any]) -> Any:
    """Return the value of an expression.

    Args:
        text: the expression.
        lookup: returns the value of a name.

    Raises:
        BakeError: it is wrong, or uses something that is not supported here.
    """
    parser = _Parser(text, lookup)
    value = parser.expression()
    parser.end()
    return value


def template(text: str, lookup: Callable[[str], Any], *, quoted: bool) -> Any:
    """Return the value of a template, the inside of a string.

    A template that is one interpolation and nothing else has the value's own type.

    Args:
        text: without its quotes.
        lookup: returns the value of a name.
        quoted: it has backslash escapes; a heredoc has none.

    Raises:
        BakeError: as `evaluate`.
    """
    parts: list[Any] = []
    literal: list[str] = []
    position = 0
    while position < len(text):
        two, three = text[position : position + 2], text[position : position + 3]
        if three in ("$${", "%%{"):
            literal.append(three[1:])
            position += 3
        elif two == "%{":
            raise unsupported('a "%{...}" directive')
        elif two == "${":
            end = interpolation_end(text, position)
            if literal:
                parts.append("".join(literal))
                literal = []
            parts.append(_Interpolated(evaluate(text[position + 2 : end].strip("~ "), lookup)))
            position = end + 1
        elif quoted and text[position] == "\\":
            character, position = _escape(text, position)
            literal.append(character)
        else:
            literal.append(text[position])
            position += 1
    if literal:
        parts.append("".join(literal))
    if len(parts) == 1 and isinstance(parts[0], _Interpolated):
        return parts[0].value
    return "".join(
        to_text(part.value) if isinstance(part, _Interpolated) else part for part in parts
    )


class _Interpolated:
    def __init__(self, value: Any) -> None:
        self.value = value


def to_text(value: Any) -> str:
    """Return a value as HCL turns it into a string.

    Raises:
        BakeError: it has no such form.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    shown = "null" if value is None else "a list or an object"
    raise BakeError(f"{shown} cannot be part of a string")


def interpolation_end(text: str, start: int) -> int:
    """Return where the "}" is that closes the "${" at `start`.

    Raises:
        BakeError: nowhere.
    """
    depth, position = 0, start + 1
    while position < len(text):
        character = text[position]
        if character == '"':
            position = string_end(text, position)
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    raise BakeError(f'"{text[start : start + 40]}" has no closing brace')


def string_end(text: str, start: int) -> int:
    """Return where the quote is that closes the one at `start`.

    Raises:
        BakeError: nowhere.
    """
    position = start + 1
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text.startswith(("$${", "%%{"), position):
            position += 2
        elif text.startswith("${", position):
            position = interpolation_end(text, position)
        elif text[position] == '"':
            return position
        position += 1
    raise BakeError(f"{text[start : start + 40]} has no closing quote")


def _escape(text: str, position: int) -> tuple[str, int]:
    kind = text[position + 1 : position + 2]
    if kind in _ESCAPES:
        return _ESCAPES[kind], position + 2
    digits = {"u": 4, "U": 8}.get(kind, 0)
    code = text[position + 2 : position + 2 + digits]
    if not digits or not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", code):
        raise BakeError(f'"\\{kind}" is no escape in a string')
    return chr(int(code, 16)), position + 2 + digits


class _Parser:
    """Recursive descent; evaluates while it reads."""

    def __init__(self, text: str, lookup: Callable[[str], Any]) -> None:
        self._text = text
        self._lookup = lookup
        self._at = 0
        self._depth = 0
        self._skipping = 0
        """The value is not needed: names are not looked up."""

    def end(self) -> None:
        if self._text[self._at :].strip():
            raise self._wrong()

    def expression(self) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BakeError(f'the expression "{self._text[:40]}..." is nested too deeply')
        try:
            condition = self._binary(0)
            if not self._take("?"):
                return condition
            if not self._skipping and not isinstance(condition, bool):
                raise BakeError(f'the condition in "{self._text}" is neither true nor false')
            first = self._alternative(needed=condition is True)
            if not self._take(":"):
                raise self._wrong()
            second = self._alternative(needed=condition is False)
            return first if condition else second
        finally:
            self._depth -= 1

    def _alternative(self, *, needed: bool) -> Any:
        self._skipping += not needed
        try:
            return self.expression()
        finally:
            self._skipping -= not needed

    def _binary(self, level: int) -> Any:
        if level == len(_LEVELS):
            return self._unary()
        value = self._binary(level + 1)
        while (operator := self._take_any(_LEVELS[level])) is not None:
            value = self._operate(operator, value, self._binary(level + 1))
        return value

    def _unary(self) -> Any:
        if self._take("!"):
            value = self._unary()
            if not self._skipping and not isinstance(value, bool):
                raise self._wrong()
            return not value
        if self._take("-"):
            value = self._unary()
            return -value if isinstance(value, int | float) else self._operate("-", 0, value)
        return self._postfix()

    def _postfix(self) -> Any:
        value = self._primary()
        while True:
            if self._take("..."):
                raise unsupported('"..."')
            if self._take("."):
                if self._peek() == "*":
                    raise unsupported('".*"')
                value = self._member(value, self._name())
            elif self._take("["):
                if self._peek() == "*":
                    raise unsupported('"[*]"')
                value = self._member(value, self.expression())
                self._expect("]")
            else:
                return value

    def _primary(self) -> Any:
        rest = self._text[self._at :]
        stripped = rest.lstrip()
        if stripped.startswith('"'):
            start = self._at + len(rest) - len(stripped)
            end = string_end(self._text, start)
            self._at = end + 1
            inside = self._text[start + 1 : end]
            return None if self._skipping else template(inside, self._lookup, quoted=True)
        if self._take("("):
            value = self.expression()
            self._expect(")")
            return value
        if self._take("["):
            return self._list()
        if self._take("{"):
            return self._object()
        match = _TOKEN.match(self._text, self._at)
        if match is None or match["mark"]:
            raise self._wrong()
        self._at = match.end()
        if match["number"]:
            number = float(match["number"])
            return int(number) if number.is_integer() else number
        return self._named(match["name"])

    def _named(self, name: str) -> Any:
        if name in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[name]
        if self._peek() == "(":
            raise unsupported(f"the function {name}()")
        return None if self._skipping else self._lookup(name)

    def _list(self) -> list[Any]:
        self._refuse_for()
        values: list[Any] = []
        while not self._take("]"):
            values.append(self.expression())
            if not self._take(","):
                self._expect("]")
                break
        return values

    def _object(self) -> dict[str, Any]:
        self._refuse_for()
        values: dict[str, Any] = {}
        while not self._take("}"):
            match = _TOKEN.match(self._text, self._at)
            if match is not None and match["name"]:
                self._at = match.end()
                key: Any = match["name"]
            else:
                key = self.expression()
            if self._take_any(("=", ":")) is None:
                raise self._wrong()
            values[str(key)] = self.expression()
            self._take(",")
        return values

    def _refuse_for(self) -> None:
        if re.match(r"\s*for\b", self._text[self._at :]):
            raise unsupported('a "for" expression')

    def _member(self, value: Any, key: Any) -> Any:
        if self._skipping:
            return None
        try:
            if isinstance(value, dict):
                return value[str(key)]
            if isinstance(value, list) and isinstance(key, int) and not isinstance(key, bool):
                return value[key]
        except (KeyError, IndexError):
            raise BakeError(f'there is no "{key}" in "{self._text}"') from None
        raise BakeError(f'"{self._text}" takes a part of something that has none')

    def _operate(self, operator: str, left: Any, right: Any) -> Any:
        if self._skipping:
            return None
        if operator in ("==", "!="):
            same = type(left) is type(right) or _are_numbers(left, right)
            return (same and left == right) == (operator == "==")
        if operator in ("&&", "||"):
            if not (isinstance(left, bool) and isinstance(right, bool)):
                raise self._wrong()
            return (left and right) if operator == "&&" else (left or right)
        if not _are_numbers(left, right):
            raise BakeError(f'"{self._text}" calculates with something that is no number')
        return self._calculate(operator, left, right)

    def _calculate(self, operator: str, left: float, right: float) -> Any:
        if operator in ("/", "%") and right == 0:
            raise BakeError(f'"{self._text}" divides by zero')
        results: dict[str, Callable[[], Any]] = {
            "<": lambda: left < right,
            ">": lambda: left > right,
            "<=": lambda: left <= right,
            ">=": lambda: left >= right,
            "+": lambda: left + right,
            "-": lambda: left - right,
            "*": lambda: left * right,
            "/": lambda: left / right,
            "%": lambda: left % right,
        }
        return results[operator]()

    def _peek(self) -> str:
        match = _TOKEN.match(self._text, self._at)
        return match[0].strip() if match is not None else ""

    def _take(self, mark: str) -> bool:
        return self._take_any((mark,)) is not None

    def _take_any(self, marks: tuple[str, ...]) -> str | None:
        match = _TOKEN.match(self._text, self._at)
        if match is None or match["mark"] not in marks:
            return None
        self._at = match.end()
        return match["mark"]

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise self._wrong()

    def _name(self) -> str:
        match = _TOKEN.match(self._text, self._at)
        if match is None or not (match["name"] or match["number"]):
            raise self._wrong()
        self._at = match.end()
        return match["name"] or match["number"]

    def _wrong(self) -> BakeError:
        return BakeError(f'cannot understand the expression "{self._text[:200]}"')


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
