"""From the command line to the request that a node understands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.build.vcs import in_repository
from offload_core.contextnames import DOCKERFILE
from offload_core.errors import InvalidValueError
from offload_proto.v1.build_spec_pb2 import BuildSpec, CacheOption, Output

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from offload_client.build.cacheoptions import OtherCache
    from offload_client.build.contextfiles import ContextFiles
    from offload_client.build.options import BuildOptions, OutputOption

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

    A build with a tag, --iidfile, --metadata-file or --quiet and no output keeps its image in the
    pool's registry; so a later `--load` or `--push` transfers layers and nothing else.
    """
    from offload_client.build.options import OutputOption

    outputs = list(options.outputs)
    wants_image = options.tags or options.iidfile or options.metadata_file or options.quiet
    if not outputs and wants_image:
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
    if len(options.platforms) > 1 and any(output.type == "docker" for output in outputs):
        raise InvalidValueError(
            "docker exporter does not currently support exporting manifest lists; use type=oci"
        )


def build_spec(
    options: BuildOptions, outputs: Sequence[OutputOption], files: ContextFiles
) -> BuildSpec:
    """Return the request for the node."""
    attributes = {}
    if files.url and any(item.local_name == DOCKERFILE for item in files.inline):
        # BuildKit would take the Dockerfile from the context.
        attributes["dockerfilekey"] = DOCKERFILE
    return BuildSpec(
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
            Output(type=_TYPES[output.type], attributes=dict(output.attributes))
            for output in outputs
        ],
    )


def _cache(cache: OtherCache, *, leave_out: Collection[str] = ()) -> CacheOption:
    attributes = dict(cache.attributes)
    if cache.type == "local":
        attributes = {key: value for key, value in attributes.items() if key not in leave_out}
    return CacheOption(type=cache.type, attributes=attributes)
