"""The plan of a bake command line: by the user's buildx, or read here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.bake.bakefiles import read_definition
from offload_client.bake.buildxplan import buildx_list, buildx_plan, find_buildx
from offload_client.bake.listing import listed, parse_list
from offload_client.bake.resolve import resolve_plan
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from offload_client.bake.plan import BakePlan
    from offload_client.bake.request import BakeRequest
    from offload_client.invocation import Invocation


def make_plan(invocation: Invocation, request: BakeRequest) -> BakePlan:
    """Return what a command line builds; blocking.

    Raises:
        BakeError: the files are missing or wrong.
    """
    buildx = find_buildx(invocation.environment)
    if buildx is not None:
        plan = buildx_plan(invocation, buildx, request)
    else:
        definition = read_definition(invocation, request.files)
        plan = resolve_plan(definition, request, invocation.environment)
    if not plan.targets:
        raise BakeError("there is no target to build")
    plan.check()
    return plan


def list_text(invocation: Invocation, request: BakeRequest) -> str:
    """Return the text of --list; blocking.

    Raises:
        BakeError: as `make_plan`.
        InvalidValueError: there is no such list.
    """
    kind, form = parse_list(request.listed)
    buildx = find_buildx(invocation.environment)
    if buildx is not None:
        return buildx_list(invocation, buildx, request).rstrip("\n")
    return listed(read_definition(invocation, request.files), kind, form)
