"""Where everything happens: a world with a server, and machines that reach it.

    world (server) <- veth -> machine          the node's, with its router and projects
                   <- veth -> plain machine    forwards without a single rule of nftables
                   <- veth -> stock machine    a BuildKit as its makers ship it, with their bridge

All are network namespaces without names. The benchmark itself moves to the machine, so a node takes
that for the machine that it runs on, and nothing of the real one is touched.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, Self, TypeVar

from benchmarks.daemons import ROOT, TOOLS
from benchmarks.egress.rules import SERVER, STREAMS, VISITS
from benchmarks.model import BenchmarkError
from offload_builder.egress.firewall import links
from offload_builder.egress.firewall.daemonnet import find_cni_plugins
from offload_builder.egress.firewall.lifecycle import EgressFirewall
from offload_builder.egress.firewall.namespaces import NetworkNamespace
from offload_builder.egress.firewall.nft import open_nft
from offload_builder.node.egresstold import EgressTold
from offload_core.errors import OffloadError
from tests.fixtures.egressprobe import egress_probe
from tests.fixtures.egressworld import World
from tests.fixtures.wan import entered

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from pathlib import Path


T = TypeVar("T")
_PROGRAMS = ("ip", "nsenter", "unshare", "iptables", "go", "dnsmasq", "runc")
_PATH = "/usr/local/go/bin:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_MTU = 1400
"""As in the world of the tests."""


def require_parts() -> None:
    """Look for everything that the benchmark needs.

    Raises:
        BenchmarkError: something is missing; in one sentence.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:{_PATH}"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    missing += [f".tools/bin/{name}" for name in ("buildkitd",) if not (TOOLS / name).exists()]
    if missing:
        raise BenchmarkError(f"{', '.join(missing)} cannot be found; run 'make tools'")
    try:
        find_cni_plugins()
        NetworkNamespace("probe").close()
        open_nft().close()
    except OffloadError as error:
        raise BenchmarkError(f"{error.message}; {error.hint}") from error


class Ground:
    """The namespaces and the server; a context manager of the main thread.

    Attributes:
        work: a directory for whoever needs one.
        world: everything that there is outside of the machine.
        probe: the program that steps use.
        told: hears of what is reached, as in a node.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.world = World()
        self._runner = asyncio.Runner()
        self._entered = ExitStack()
        self._stack = AsyncExitStack()
        self.probe = self.work / "probe"
        self.told = EgressTold()

    def __enter__(self) -> Self:
        try:
            self.enter(self.world)
            self.probe.write_bytes(egress_probe())
            self.probe.chmod(0o755)
            self.run(self._serve())
            self._entered.enter_context(entered(self.world.machine.path))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()
        try:
            self._runner.run(self._stack.aclose())
        finally:
            self._runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine returns. Whatever else was opened works on meanwhile."""
        return self._runner.run(work)

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Open something until the end."""
        return self._runner.run(self._stack.enter_async_context(context))

    def enter_here(self, context: AbstractContextManager[T]) -> T:
        """Open something that needs no event loop, until the end."""
        return self._stack.enter_context(context)

    def firewall(self) -> EgressFirewall:
        """Return the firewall of a node on the machine."""
        return self.enter(EgressFirewall(self.work / "node", self.told.connection))

    def probe_in(self, namespace: Path, *places: str) -> str:
        """Run the probe in a namespace; return what it printed.

        Raises:
            BenchmarkError: it failed.
        """
        return self._output([*_there(namespace), str(self.probe), *places])

    def visit_from(self, namespace: Path, *arguments: object) -> str:
        """Run `visits` in a namespace; return what it printed.

        Raises:
            BenchmarkError: it failed.
        """
        command = [sys.executable, "-m", "benchmarks.egress.visits", *map(str, arguments)]
        return self._output([*_there(namespace), *command])

    def _output(self, command: list[str]) -> str:
        # In a thread: the log of the firewall is read and names are answered meanwhile.
        return self.run(asyncio.to_thread(_output, command))

    async def _serve(self) -> None:
        listeners = [await self.world.world.listen_tcp(SERVER, port) for port in (STREAMS, VISITS)]
        for listener in listeners:
            listener.listen(4096)
        numbers = [str(listener.fileno()) for listener in listeners]
        server = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", sys.executable,
             "-m", "benchmarks.egress.streams", *numbers],
            pass_fds=[listener.fileno() for listener in listeners], cwd=ROOT,
        )  # fmt: skip
        for listener in listeners:
            listener.close()
        self._stack.callback(server.wait)
        self._stack.callback(server.kill)

    async def machine(self, number: int) -> NetworkNamespace:
        """Return another machine, which forwards and has no rules."""
        made = NetworkNamespace(f"machine-{number}")
        self._stack.callback(made.close)
        await made.run(links.skip_duplicate_detection, "default")
        await made.run(links.write_setting, "ipv4/ip_forward", "1")
        device, network = f"eth{number}", f"198.51.{100 + number}"
        world = self.world.world
        peer = f"peer name {device} mtu {_MTU} netns {world.path}"
        await made.run(
            links.run_ip,
            [
                "link set lo up",
                f"link add eth0 mtu {_MTU} type veth {peer}",
                f"address add {network}.2/24 dev eth0",
                "link set eth0 up",
            ],
        )
        await world.run(
            links.run_ip,
            [f"address add {network}.1/24 dev {device}", f"link set {device} up"],
        )
        await made.run(links.run_ip, [f"route add default via {network}.1 dev eth0"])
        return made

    async def forwarded(self) -> NetworkNamespace:
        """Return a namespace as far from the world as a project, with no rule on its way."""
        machine = await self.machine(1)
        router, project = NetworkNamespace("plain-router"), NetworkNamespace("plain-project")
        for made in (router, project):
            self._stack.callback(made.close)
            await made.run(links.configure)
            await made.run(links.run_ip, ["link set lo up"])
        await _join(machine, "ob", router, "uplink", "198.18.0")
        await _join(router, "p0", project, "eth0", "100.64.0")
        await router.run(links.run_ip, ["route add default via 198.18.0.1 dev uplink"])
        await project.run(links.run_ip, ["route add default via 100.64.0.1 dev eth0"])
        await machine.run(links.run_ip, ["route add 100.64.0.0/24 via 198.18.0.2 dev ob"])
        await self.world.world.run(
            links.run_ip, ["route add 100.64.0.0/24 via 198.51.101.2 dev eth1"]
        )
        return project


async def _join(
    near: NetworkNamespace, near_device: str, far: NetworkNamespace, far_device: str, network: str
) -> None:
    """Connect two namespaces: `.1` is the near one."""
    peer = f"peer name {far_device} mtu {_MTU} netns {far.path}"
    await near.run(
        links.run_ip,
        [
            f"link add {near_device} mtu {_MTU} type veth {peer}",
            f"address add {network}.1/30 dev {near_device}",
            f"link set {near_device} up",
        ],
    )
    await far.run(
        links.run_ip,
        [f"address add {network}.2/30 dev {far_device}", f"link set {far_device} up"],
    )


def _there(namespace: Path) -> list[str]:
    return ["nsenter", f"--net={namespace}", "--"]


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
