"""Whether images of builds without output go into the local engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload_client.build.options import OutputOption
from offload_client.goboolean import TRUE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.build.options import BuildOptions

DEFAULT_LOAD = "OFFLOAD_DEFAULT_LOAD"
"""Set by our plugin of docker's CLI, because `docker build` promises it."""


def with_default_load(options: BuildOptions, environment: Mapping[str, str]) -> BuildOptions:
    """Return the options of a build with --load, where that is the default.

    Args:
        options: of the command line.
        environment: of the command.
    """
    # A build that is only asked about something makes no image.
    asked = options.call is not None
    if options.outputs or asked or environment.get(DEFAULT_LOAD, "") not in TRUE:
        return options
    return replace(options, outputs=[OutputOption("image", load=True)])
