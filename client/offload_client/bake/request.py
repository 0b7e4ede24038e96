"""What a bake command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class BakeRequest:
    """One `offload-build bake`.

    Attributes:
        targets: names and patterns; "default" when none is given.
        files: values of -f.
        overrides: values of --set.
        allow: values of --allow.
        shown: --print: the plan is shown and nothing is built.
        listed: value of --list; empty for none.
        load: --load.
        push: --push.
        no_cache: --no-cache; None when it is not given.
        pull: --pull; None when it is not given.
        provenance: value of --provenance.
        sbom: value of --sbom.
        call: value of --call, or "check" for --check, whichever was the last; empty for neither.
        debug: --debug.
        remarks: what to warn of before building.
        progress: mode of --progress.
        metadata_file: value of --metadata-file.
        summary_file: value of --summary-file.
        network_policy: value of --network-policy.
        gateway: value of --gateway.
        project: value of --project.
    """

    targets: Sequence[str] = ("default",)
    files: Sequence[str] = ()
    overrides: Sequence[str] = ()
    allow: Sequence[str] = ()
    shown: bool = False
    listed: str = ""
    load: bool = False
    push: bool = False
    no_cache: bool | None = None
    pull: bool | None = None
    provenance: str = ""
    sbom: str = ""
    call: str = ""
    debug: bool = False
    remarks: Sequence[str] = ()
    progress: str = "auto"
    metadata_file: str = ""
    summary_file: str = ""
    network_policy: str = ""
    gateway: str | None = None
    project: str | None = None
