"""Write the generated parts of docs/ and the help texts, or check that they are up to date.

A generated part stands between two lines, and nothing else of the file is touched:

    <!-- generated: NAME -->
    <!-- end -->

Usage: python deploy/generate_docs.py [--check]
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import pkgutil
import re
import sys
import typing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import grpc

from offload_core.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from offload_client.ci.scaffold import Template

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HELP_WIDTH = 96
PACKAGES = ("offload_core", "offload_cache", "offload_client", "offload_builder")
BLOCK = re.compile(
    r"(?P<head><!-- generated: (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)
SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
DURATIONS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


# --- Options of gateway and node.


def config_table(cls: type[Any], prefix: str) -> str:
    """Return the options of a configuration dataclass as a table."""
    hints = typing.get_type_hints(cls)
    rows = []
    # What a class has from another one stands behind its own.
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.kw_only):
        form = option_form(hints[field.name], field.metadata["unit"])
        about = sentence(field.metadata["about"])
        if field.metadata["secret"]:
            about += " Secret: never shown."
        variable = f"`{prefix}_{field.name.upper()}`"
        rows.append((f"`{field.name}`", variable, form, default_text(field), about))
    return table(("Key", "Variable", "Form", "Default", "Meaning"), rows)


def option_form(hint: Any, unit: str) -> str:
    """Return in words how the value of an option is written."""
    if unit:
        return unit
    inner = [part for part in typing.get_args(hint) if part not in (type(None), Ellipsis)]
    if typing.get_origin(hint) in (list, tuple):
        return "list of paths" if Path in inner else "list of texts"
    if typing.get_origin(hint) is dict:
        return "table of texts" if inner[1] is str else "table of lists of texts"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names[inner[0] if inner else hint]


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return the default of an option as a user would write it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value in ("", [], (), {}):
        return "none"
    if unit := field.metadata["unit"]:
        text = with_unit(value, SIZES if unit == "size" else DURATIONS)
        if (parse_size if unit == "size" else parse_duration)(text) != value:
            raise ValueError(f"{field.name}: {value} cannot be written with a unit")
        return f"`{text}`"
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return f"`{value}`"


def with_unit(value: float, units: tuple[tuple[int, str], ...]) -> str:
    """Return a number with the largest unit of which it is a multiple."""
    for size, unit in units:
        if value and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return f"{value * 1000:.0f}ms" if units is DURATIONS else f"{value}B"


def registry_table() -> str:
    """Return the keys of the file that registry_config names."""
    from offload_builder.node.registryfile import LOGIN_KEYS, REGISTRY_KEYS

    forms = {bool: "true or false", str: "text", list: "list of texts"}
    rows = [
        (f"`{name}`", place, forms[key.kind], sentence(key.about))
        for place, keys in (("registry", REGISTRY_KEYS), ("registry or login", LOGIN_KEYS))
        for name, key in keys.items()
    ]
    return table(("Key", "In", "Form", "Meaning"), rows)


def identity_table() -> str:
    """Return the keys of identity.toml."""
    from offload_builder.gateway.oidc.policykeys import ISSUER_KEYS, RULE_KEYS, TOP_KEYS

    rows = [
        (f"`{name}`", place, key.form, key.default or "-", sentence(key.about))
        for place, keys in (
            ("top", TOP_KEYS), ("`[issuer.NAME]`", ISSUER_KEYS), ("`[[rule]]`", RULE_KEYS)
        )
        for name, key in keys.items()
    ]  # fmt: skip
    return table(("Key", "In", "Form", "Default", "Meaning"), rows)


def egress_keys() -> str:
    """Return the keys of a policy file."""
    from offload_builder.egress.policy.keys import RULE_KEYS, TOP_KEYS

    rows = [
        (
            f"`{name}`",
            place,
            ", ".join(layer.value for layer in key.layers),
            key.form,
            key.default or "-",
            sentence(key.about),
        )
        for place, keys in (("top", TOP_KEYS), ("`[[rule]]`", RULE_KEYS))
        for name, key in keys.items()
    ]
    return table(("Key", "In", "Policy of", "Form", "Default", "Meaning"), rows)


def egress_ranges() -> str:
    """Return the protected ranges, by the id under which they are refused."""
    from offload_builder.egress.policy.model import PROTECTED

    rows = [
        (f"`protected-{item.kind}`", f"`{item.network}`", item.about,
         "yes" if item.openable else "never")
        for item in PROTECTED
    ]  # fmt: skip
    return table(("Refused as", "Range", "What", "Can be allowed"), rows)


def egress_presets() -> str:
    """Return the presets of policies."""
    from offload_builder.egress.policy.presets import PRESETS

    rows = [
        (
            f"`{name}`",
            sentence(preset.about),
            ", ".join(
                [
                    *(f"`{host}`" for host in preset.hosts),
                    *(f"`{host}` port {port}" for host, port in preset.further),
                ]
            ),
        )
        for name, preset in PRESETS.items()
    ]
    return table(("Preset", "What", "Hosts"), rows)


def egress_kubernetes() -> str:
    """Return the manifests for the example of a policy."""
    from offload_builder.egress.policy.kubernetes import export
    from offload_builder.egress.policy.reading import load_text, read_text

    text = load_text(ROOT / "examples" / "egress" / "policy.toml")
    made = export(read_text(text, file="policy.toml").require())
    return f"```yaml\n{made.text}```"


# --- Errors.


def error_table() -> str:
    """Return every error that crosses a border, by exit code."""
    for package in PACKAGES:
        import_all(package)
    from offload_core.errors import all_errors

    codes = {code.value[0]: code.name for code in grpc.StatusCode}
    rows = [
        (
            str(cls.exit_code),
            f"`{cls.reason}`",
            codes[cls.status_code],
            "yes" if cls.retryable else "no",
            sentence((cls.__doc__ or "").splitlines()[0]),
        )
        for cls in sorted(all_errors(), key=lambda cls: (cls.exit_code, cls.reason))
    ]
    return table(("Exit code", "Reason", "gRPC status", "Worth a retry", "Meaning"), rows)


def import_all(package: str) -> None:
    """Import a package with all its modules, so that each class of it is known."""
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, f"{package}."):
        importlib.import_module(module.name)


# --- Commands.


def command_help() -> str:
    """Return the help of every command."""
    from offload_builder.cli.entry import main as builder
    from offload_client.cli.bake import bake_command
    from offload_client.cli.build import build_command
    from offload_client.cli.offload import offload

    parts = []
    clients = (
        (build_command, "offload-build"),
        (bake_command, "offload-build bake"),
        (offload, "offload"),
    )
    for command, name in clients:
        parts += list(help_texts(command, name, None))
    parts += list(help_texts(builder, "offload-builder", None))
    return "\n\n".join(parts)


def help_texts(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """Yield the help of a command and of all commands below it."""
    settings = {**command.context_settings, "terminal_width": HELP_WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    title = "##" if parent is None else "###"
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield f"{title} {context.command_path}\n\n```text\n{text}\n```"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from help_texts(found, child, context)


def flag_table() -> str:
    """Return every flag of `offload-build`, hidden ones too, and what becomes of it."""
    from offload_client.cli.build import build_command
    from offload_client.cli.furtherflags import LEGACY, NOTES, OWN

    rows = []
    for option in build_command.params:
        if not isinstance(option, click.Option):
            continue
        long = max(option.opts, key=len)
        short = next((f"`{name}`" for name in option.opts if name != long), "")
        state = "accepted without effect" if long in LEGACY else "honoured"
        if long in OWN:
            state = "our own"
        if long in NOTES:
            state = NOTES[long] if long in ("--builder", "--policy") else f"{state}; {NOTES[long]}"
        rows.append((f"`{long}`", short, sentence(option.help or ""), sentence(state)))
    return table(("Flag", "Short", "Meaning", "What becomes of it"), rows)


def ready_help() -> dict[Path, str]:
    """Return the files that `offload-build --help` prints, with their content."""
    from offload_client.cli.build import build_command
    from offload_client.cli.readyhelp import WIDTHS, help_file

    files = {}
    for columns in WIDTHS:
        # click leaves two columns free.
        settings = {**build_command.context_settings, "terminal_width": columns - 2}
        context = click.Context(build_command, info_name="offload-build", **settings)
        files[Path(help_file(columns))] = build_command.get_help(context) + "\n"
    return files


# --- Continuous integration.


def ci_source(template: Template) -> Path:
    """Return where a file of a pipeline is kept."""
    return ROOT / "deploy" / "ci" / template.source


def ci_files() -> dict[Path, str]:
    """Return the files that `offload init --ci` writes, with their content."""
    from offload_client.ci import scaffold

    folder = Path(scaffold.__file__).parent / "files"
    found = {template for templates in scaffold.TEMPLATES.values() for template in templates}
    return {folder / item.source: ci_source(item).read_text("utf-8") for item in found}


def ci_example(system: str) -> str:
    """Return the files of a system for the documentation."""
    from offload_client.ci.scaffold import TEMPLATES

    languages = {".yml": "yaml", ".sh": "bash", "": "bash"}
    shown = []
    for template in TEMPLATES[system]:
        path = Path(template.path)
        language = "groovy" if path.name == "Jenkinsfile" else languages[path.suffix]
        text = ci_source(template).read_text("utf-8").rstrip()
        shown.append(f"`{template.path}`:\n\n```{language}\n{text}\n```")
    return "\n\n".join(shown)


# --- Writing.


def sentence(text: str) -> str:
    """Return a text with a capital at the beginning and a full stop at the end."""
    text = text.strip().rstrip(".").replace("|", "\\|")
    return f"{text[0].upper()}{text[1:]}."


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parts() -> dict[str, Callable[[], str]]:
    """Return what can be generated, by name."""
    from offload_builder.gateway.config import ENVIRONMENT_PREFIX, GatewayConfig
    from offload_builder.node.config import NodeConfig
    from offload_client.ci.scaffold import TEMPLATES

    return {
        "gateway-config": lambda: config_table(GatewayConfig, ENVIRONMENT_PREFIX),
        "node-config": lambda: config_table(NodeConfig, "OFFLOAD_NODE"),
        "registry-keys": registry_table,
        "identity-keys": identity_table,
        "egress-keys": egress_keys,
        "egress-ranges": egress_ranges,
        "egress-presets": egress_presets,
        "egress-kubernetes": egress_kubernetes,
        "errors": error_table,
        "cli": command_help,
        "flags": flag_table,
        **{f"ci-{system}": partial(ci_example, system) for system in TEMPLATES},
    }


def main() -> int:
    """Write or check all files; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated parts of docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when outdated")
    check = parser.parse_args().check
    available = parts()
    used: list[str] = []

    def generate(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in available:
            raise SystemExit(f"there is no generated part {name!r}: {', '.join(available)}")
        used.append(name)
        return f"{match['head']}\n{available[name]()}\n\n{match['end']}"

    outdated = 0
    files = {
        path: BLOCK.sub(generate, path.read_text("utf-8")) for path in sorted(DOCS.rglob("*.md"))
    }
    for path, new in (files | ready_help() | ci_files()).items():
        old = path.read_text("utf-8") if path.exists() else ""
        if new == old:
            continue
        outdated += 1
        name = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
        if check:
            sys.stderr.writelines(difflib.unified_diff(
                old.splitlines(keepends=True), new.splitlines(keepends=True), name, "generated", n=1
            ))  # fmt: skip
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new, "utf-8")
            print(f"wrote {name}")
    if unused := sorted(set(available) - set(used)):
        raise SystemExit(f"no file in docs/ has the generated part {', '.join(unused)}")
    if check and outdated:
        print(f"{outdated} generated files are outdated; run: make docs", file=sys.stderr)
    return int(check and outdated > 0)


if __name__ == "__main__":
    sys.exit(main())
