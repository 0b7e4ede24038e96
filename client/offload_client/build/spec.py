"""From the command line to the request that a node understands."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from offload_client.build.attestations import DISABLED
from offload_client.build.stepoptions import Resources
from offload_client.build.vcs import in_repository
from offload_core.contextnames import DOCKERFILE
from offload_core.errors import InvalidValueError
from offload_proto.v1.build_spec_pb2 import BuildSpec, CacheOption, Output, ResourceLimits

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from offload_client.build.cacheoptions import OtherCache
    from offload_client.build.contextfiles import ContextFiles
    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.build.stepoptions import StepOptions

NETWORK_HOST = "network.host"
"""BuildKit's name of the entitlement."""
_KEPT_HERE = ("dest", "tag", "reset")
"""What only the client needs to know of a cache in one of its directories."""
_TYPES = {
    "local": Output.TYPE_LOCAL,
    "tar": Output.TYPE_TAR,
    "oci": Output.TYPE_OCI,
    "docker": Output.TYPE_DOCKER,
    "image": Output.TYPE_IMAGE,
    "registry": Output.TYPE_REGISTRY,
    "cacheonly": Output.TYPE_CACHE_ONLY,
}


def effective_outputs(options: BuildOptions) -> list[OutputOption]:
    """Return the outputs of a build, with the image that is implied.

    A build with a tag, --iidfile, --metadata-file, --result-file, --quiet or --detach and no output
    keeps its image in the pool's registry; so a later `--load` or `--push` transfers
    layers and nothing else. So does each build with --save.
    """
    from offload_client.build.options import OutputOption

    if options.call is not None:
        # Nothing is made, so there is nothing to put anywhere.
        return []
    outputs = list(options.outputs)
    wants_image = options.tags or options.iidfile or options.metadata_file or options.quiet
    wants_image = wants_image or options.detach or options.result_file
    lacks_image = not any(output.type in ("image", "registry") for output in outputs)
    if (not outputs and wants_image) or (options.save and lacks_image):
        outputs.append(OutputOption("image"))
    check_outputs(options, outputs)
    return outputs


def check_outputs(options: BuildOptions, outputs: Sequence[OutputOption]) -> None:
    """Refuse combinations that cannot work.

    Raises:
        InvalidValueError: with what to change.
    """
    pushes = [output for output in outputs if output.type == "registry"]
    if pushes and not options.tags and not any("name" in item.attributes for item in pushes):
        raise InvalidValueError("tag is needed when pushing to registry")
    if sum(output.dest == "-" for output in outputs) > 1:
        raise InvalidValueError("only one output can go to standard output")
    attested = any(value != DISABLED for value in options.attestations.values())
    several = len(options.platforms) > 1 or attested
    if several and any(output.type == "docker" for output in outputs):
        raise InvalidValueError(
            "docker exporter does not currently support exporting manifest lists; use type=oci"
        )


def build_spec(
    options: BuildOptions,
    outputs: Sequence[OutputOption],
    files: ContextFiles,
    *,
    provenance: str = "",
) -> BuildSpec:
    """Return the request for the node.

    Args:
        options: what the user asked for.
        outputs: as `effective_outputs` returns them.
        files: of the contexts.
        provenance: how much the metadata file is to have, see `provenance_mode`.
    """
    attributes = {}
    if files.url and any(item.local_name == DOCKERFILE for item in files.inline):
        # BuildKit would take the Dockerfile from the context.
        attributes["dockerfilekey"] = DOCKERFILE
    spec = BuildSpec(
        tags=options.tags,
        dockerfile_path=files.dockerfile_name,
        definition=files.definition,
        definition_is_name=not files.url and not in_repository(files.root),
        target=options.target,
        build_args=dict(options.build_args),
        labels=dict(options.labels),
        platforms=options.platforms,
        no_cache=options.no_cache,
        pull=options.pull,
        frontend_attributes=attributes,
        context_url=files.url,
        named_contexts=dict(files.named),
        cache_imports=[_cache(cache) for cache in files.cache_imports],
        cache_exports=[_cache(cache, leave_out=_KEPT_HERE) for cache in options.caches.exports],
        outputs=[
            Output(type=_TYPES[output.type], attributes=_attributes(options, output))
            for output in outputs
        ],
        no_cache_stages=options.no_cache_stages,
        attestations=dict(options.attestations),
        call=options.call.method if options.call else "",
        metadata_provenance="" if options.call or not options.metadata_file else provenance,
        save_image=options.save,
    )
    set_step_options(spec, options.steps)
    return spec


def set_step_options(spec: BuildSpec, steps: StepOptions) -> None:
    """Set how RUN steps run."""
    spec.network_mode = steps.network
    if steps.network == "host":
        # As buildx does: who asks for the network of the machine also asks for the right to it.
        spec.entitlements.append(NETWORK_HOST)
    spec.extra_hosts.extend(steps.hosts)
    spec.ulimits.extend(steps.ulimits)
    spec.shm_size_bytes = steps.shm_size_bytes
    spec.cgroup_parent = steps.cgroup_parent
    if steps.resources != Resources():
        spec.resources.CopyFrom(ResourceLimits(**asdict(steps.resources)))


def _attributes(options: BuildOptions, output: OutputOption) -> dict[str, str]:
    annotated = output.type in ("oci", "docker", "image", "registry")
    return {**output.attributes, **(options.annotations if annotated else {})}


def _cache(cache: OtherCache, *, leave_out: Collection[str] = ()) -> CacheOption:
    attributes = dict(cache.attributes)
    if cache.type == "local":
        attributes = {key: value for key, value in attributes.items() if key not in leave_out}
    return CacheOption(type=cache.type, attributes=attributes)
