"""What tests of builds over broken connections share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_builder.gateway.ca import CertificateAuthority
from tests.fixtures.cutrelay import CutRelay
from tests.fixtures.localcommand import Command
from tests.fixtures.nodepeer import serving_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.fixtures.nodepeer import NodePeer


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.open(tmp_path_factory.mktemp("ca"))


@pytest.fixture
async def peer(authority: CertificateAuthority) -> AsyncIterator[NodePeer]:
    async with serving_node(authority.gateway_keys()) as running:
        yield running


@pytest.fixture
def relay(peer: NodePeer) -> Iterator[CutRelay]:
    with CutRelay(peer.address) as running:
        peer.address = running.address
        yield running


@pytest.fixture
def command(tmp_path: Path, authority: CertificateAuthority, relay: CutRelay) -> Command:
    return Command(tmp_path, authority, relay.address)
