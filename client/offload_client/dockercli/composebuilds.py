"""`docker compose build` by `offload install`.

Compose does not ask for docker's alias: it runs `docker-buildx bake` with a bake file of its own,
and that builds with the builder which the user has chosen in buildx. So ours is chosen, for all
docker endpoints, and what was chosen before is written down.

Source: docker compose, pkg/compose/build_bake.go; buildx, builder/builder.go and store/store.go.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from offload_client.build.outputfiles import replace_file
from offload_client.buildx.builders import (
    DEFAULT_NAME,
    Builder,
    find_builder,
    forget_builder,
    note_due,
)
from offload_client.buildx.creation import create_builder
from offload_client.buildx.registration import Registration
from offload_client.settings import resolve_settings
from offload_core.errors import ConfigError, NotFoundError, OffloadError, UsageError

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation

STATE_FILE = "compose-install.json"
NO_BUILDER = ("", "default")
"""What buildx calls the engine's own builder."""


@dataclass(frozen=True)
class BuildxBefore:
    """What `offload install` has found of buildx.

    Attributes:
        choice: buildx's file about the chosen builder; None for none.
        made_builder: ours was made.
        made_folder: buildx's directory was made.
    """

    choice: str | None
    made_builder: bool
    made_folder: bool


class ComposeBuilds:
    """Whether one user's compose builds on the pool."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self._registration = Registration(invocation)
        self._store = self._registration.store
        self._state = invocation.config_dir() / STATE_FILE

    @property
    def has_buildx(self) -> bool:
        """Buildx, without which compose uses the engine's old builder, is installed."""
        return bool(self._registration.program)

    async def install(self, connections: Connections, *, force: bool) -> Builder:
        """Choose our builder in buildx; make it for the configured project when there is none.

        Args:
            connections: for the login.
            force: also in the place of another builder that is chosen.

        Returns:
            Our builder.

        Raises:
            UsageError: another builder is chosen, or has our builder's name.
            AuthenticationError: nobody is logged in.
            ConfigError: no gateway is configured, or a file cannot be written.
        """
        chosen = self._store.current()
        if not force and chosen not in NO_BUILDER and not self._registration.is_ours(chosen):
            raise UsageError(
                f'buildx uses the builder "{chosen}", and so does docker compose',
                hint="take its place with --force; uninstalling brings it back",
            )
        known = self._read_state()
        builder = self._own()
        before = known or BuildxBefore(
            choice=self._store.choice(),
            made_builder=builder is None,
            made_folder=not self._store.folder.exists(),
        )
        self._write_state(before)
        try:
            if builder is None:
                settings = resolve_settings(self._invocation)
                builder = Builder(DEFAULT_NAME, settings.gateway, settings.project)
                await create_builder(
                    self._invocation, connections, self._registration, builder, use=False
                )
            elif not self._registration.is_ours(builder.name):
                self._registration.add(builder, use=False)
        except OffloadError:
            if known is None:
                self._state.unlink(missing_ok=True)
            raise
        self._store.choose(builder.name, everywhere=True)
        return builder

    def uninstall(self) -> bool:
        """Bring back what was chosen before; return whether anything was changed by us.

        A builder that somebody has chosen since then stays chosen, one that was not made by
        `offload install` stays.

        Raises:
            ConfigError: a file cannot be written.
        """
        before = self._read_state()
        if before is None:
            return False
        still_chosen = self._store.chosen_anywhere() == DEFAULT_NAME
        if before.made_builder and self._own() is not None:
            self._registration.remove(DEFAULT_NAME)
            forget_builder(self._invocation, DEFAULT_NAME)
            note_due(self._invocation)
        if still_chosen:
            self._store.put_back(before.choice)
        if before.made_folder:
            self._store.tidy()
        self._state.unlink(missing_ok=True)
        return True

    def _own(self) -> Builder | None:
        try:
            return find_builder(self._invocation, DEFAULT_NAME)
        except NotFoundError:
            return None

    def _read_state(self) -> BuildxBefore | None:
        try:
            values = json.loads(self._state.read_text("utf-8"))
        except (OSError, ValueError):
            # Without it nothing can be brought back; `offload buildx rm` is left.
            return None
        known = {field.name for field in fields(BuildxBefore)}
        if not isinstance(values, dict) or set(values) != known:
            return None
        return BuildxBefore(**values)

    def _write_state(self, before: BuildxBefore) -> None:
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cannot write {self._state}: {error.strerror}") from error
        replace_file(self._state, json.dumps(asdict(before), indent=2))
