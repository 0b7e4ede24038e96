"""Opens the sessions of a node, with everything that they need, where the machine can have any."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.sessions.engine.host import EngineHost
from offload_builder.node.sessions.engine.settings import EngineSettings
from offload_builder.node.sessions.guard.door import Doors
from offload_builder.node.sessions.limits import Machine, SessionBounds, free_disk
from offload_builder.node.sessions.network import SessionNetworks
from offload_builder.node.sessions.nodesessions import NodeSessions
from offload_builder.node.sessions.registryoptions import registry_options
from offload_builder.node.sessions.sessiontasks import SessionTasks
from offload_builder.provider.process import tools_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from offload_builder.buildkit.daemon_config import RegistrySettings
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.gatewaylink import GatewayLink
    from offload_builder.node.isolation import Isolation
    from offload_builder.node.sessions.guard.images import ImageSources
    from offload_builder.node.sessions.models import SessionModels
    from offload_builder.node.sessions.sync.desk import SyncDesk
    from offload_cache.registry.server import RegistryServer
    from offload_proto.v1.nodes_service_pb2 import NodeDevices

log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_sessions(
    config: NodeConfig,
    isolation: Isolation,
    registry: RegistryServer,
    link: GatewayLink,
    images: ImageSources,
    models: SessionModels,
    copies: SyncDesk,
    registries: Mapping[str, RegistrySettings],
    devices: Callable[[], NodeDevices | None],
) -> AsyncIterator[NodeSessions]:
    """Take sessions while the context is open; all of them end with it.

    Where there can be none, that is no error: the gateway is told why.

    Args:
        config: of the node.
        isolation: of it, open already.
        registry: of it.
        link: to the gateway.
        images: that the node has for engines.
        models: of projects.
        copies: of members' directories.
        registries: of the node's configuration, by host.
        devices: returns what devices the node has; None while that is not known.
    """
    networks = SessionNetworks(isolation, registry)
    bounds = SessionBounds(config, Machine.here(), free_disk(config.data, config.disk_reserve))
    settings = EngineSettings(
        data=config.data / "sessions",
        dockerd=config.sessions_dockerd,
        search=(tools_directory(),),
        ready=config.sessions_ready,
        ready_limits=bounds.default,
        cdi_spec_dirs=tuple(config.cdi_spec_dirs),
        options=registry_options(registries),
    )
    host = EngineHost(settings, networks)
    async with AsyncExitStack() as stack:
        problem = networks.why_impossible() if config.session_slots else ""
        takes = bool(config.session_slots) and not problem
        if takes:
            await stack.enter_async_context(host)
            problem = host.why_impossible()
        elif settings.data.is_dir():
            # Of a former process that took some.
            await host.sweep()
        if problem:
            log.info("sessions.impossible", reason=problem)
        sessions = await stack.enter_async_context(
            NodeSessions(
                config,
                bounds,
                host if takes and not problem else None,
                networks,
                Doors(images, models, networks.registry_of),
                models,
                copies,
                link,
                devices,
                problem=problem,
            )
        )
        tasks = SessionTasks(sessions, link)
        stack.push_async_callback(tasks.close)
        link.handlers["session_task"] = tasks.take_message
        yield sessions
