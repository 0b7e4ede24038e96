"""What a member wants of a session, from the words of a command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from offload_client.build.flagvalues import parse_bytes
from offload_core.errors import InvalidValueError
from offload_proto.v1.sessions_service_pb2 import SessionSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*=[A-Za-z0-9._:-]+")
"""A fully qualified name of the Container Device Interface."""
LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
MAX_CPUS = 4096


def make_spec(name: str, wishes: Mapping[str, Any]) -> SessionSpec:
    """Return the specification of a session.

    Args:
        name: what its owner calls it.
        wishes: values of the options by name: gpu, devices, cpus, memory, disk_size, idle_timeout
            and ttl in seconds, node_labels.

    Raises:
        UsageError: one of them cannot be used.
    """
    spec = SessionSpec(name=name, gpu=bool(wishes.get("gpu")))
    for device in wishes.get("devices") or ():
        if not DEVICE.fullmatch(device):
            raise InvalidValueError(
                f'--device "{device}" is no name of a device',
                hint="write for example nvidia.com/gpu=0; 'offload status' shows which there are",
            )
        spec.devices.append(device)
    cpus = wishes.get("cpus")
    if cpus is not None:
        if not 0.01 <= cpus <= MAX_CPUS:
            raise InvalidValueError(f"--cpus {cpus:g} is no number of processors")
        spec.cpu_millis = round(cpus * 1000)
    if text := wishes.get("memory"):
        spec.memory_bytes = parse_bytes("-m, --memory", text)
    if text := wishes.get("disk_size"):
        spec.disk_bytes = parse_bytes("--disk-size", text)
    for key, field in (("idle_timeout", spec.idle_timeout), ("ttl", spec.ttl)):
        seconds = wishes.get(key)
        if seconds is None:
            continue
        if seconds < 1:
            raise InvalidValueError(f"--{key.replace('_', '-')} must be at least one second")
        field.FromMilliseconds(round(seconds * 1000))
    for label in wishes.get("node_labels") or ():
        key, equals, value = label.partition("=")
        if not equals or not LABEL_KEY.fullmatch(key):
            raise InvalidValueError(f'--node-label "{label}" is not of the form KEY=VALUE')
        spec.node_labels[key] = value
    return spec
