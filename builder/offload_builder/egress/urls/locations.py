"""Where a source of a build lies, read from BuildKit's identifiers.

Source: BuildKit's source/types, source/git (gitidentifier) and util/gitutil for the forms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.egress.policy.targets import parse_server, parse_web_url
from offload_builder.egress.policy.weburl import DEFAULT_PORTS, WebUrl, printable
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Mapping

FULL_URL = "git.fullurl"
HUB_HOST = "registry-1.docker.io"
_HUB_NAMES = ("docker.io", "index.docker.io", HUB_HOST)
_PORTS = {**DEFAULT_PORTS, "git": 9418, "ssh": 22, "git+ssh": 22}
_SCP_FORM = re.compile(r"[A-Za-z0-9_-]+@([A-Za-z0-9.-]+):([^?#]*)(?:[?#].*)?")
"""What git takes for SSH without a scheme; only with a login, as for BuildKit."""
_SHOWN_SCP_FORM = re.compile(r"([^@:/\s]+):(?!//)(.*)", re.DOTALL)
_HAS_SCHEME = re.compile(r"[A-Za-z0-9]+://")
_SHOWN_FORM = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)", re.DOTALL)
_MAX_SHOWN = 1000


@dataclass(frozen=True, slots=True)
class Location:
    """Where something is fetched from.

    Attributes:
        kind: "image", "git", "http", or "local" for what comes with the build.
        host: lower case; empty for local things.
        port: of the first request; what follows may use others.
        url: for people: without login, query and fragment, and without the usual port.
        web: the same for rules by URL; None for what is not fetched by HTTP. An image is at
            `https://HOST/v2/REPOSITORY/manifests/TAG`, as the protocol of registries has it.
    """

    kind: str
    host: str
    port: int
    url: str
    web: WebUrl | None = None

    @property
    def is_local(self) -> bool:
        """Whether nothing of the network is needed."""
        return self.kind == "local"


class OddSourceError(Exception):
    """A source of an unknown kind, or without a place."""


def location_of(identifier: str, attributes: Mapping[str, str]) -> Location:
    """Read a source as BuildKit names it.

    Raises:
        OddSourceError: it cannot be understood, so nobody can say that it is allowed.
    """
    scheme, found, rest = identifier.partition("://")
    if not found:
        raise OddSourceError("the source is of no known kind")
    if scheme in ("local", "oci-layout", "oci-layout+blob"):
        return Location("local", "", 0, printable(identifier[:_MAX_SHOWN]))
    if scheme in ("docker-image", "docker-image+blob"):
        return _image(rest)
    if scheme in DEFAULT_PORTS:
        return _from_url("http", identifier)
    if scheme == "git":
        return _git(attributes.get(FULL_URL, rest))
    raise OddSourceError(f"sources of the kind {scheme[:40]!r} are not known to the policy")


def location_shown(url: str) -> Location:
    """Return the place of something whose `Location.url` was kept.

    Raises:
        OddSourceError: it cannot be understood.
    """
    if "://" in url:
        return _from_url("http", url)
    before = url.partition("/")[0]
    port = before.partition(":")[2]
    # A registry has a number after its colon, and git without a scheme a path.
    if port and not port.isdigit() and (found := _SHOWN_SCP_FORM.fullmatch(url)):
        return _over_ssh(found[1], found[2])
    return _image(url)


def image_at(host: str, repository: str) -> Location:
    """Return where a repository of a registry is.

    Raises:
        OddSourceError: the registry cannot be understood.
    """
    return _image(f"{host}/{repository}")


def shown_url(url: str) -> str:
    """Return a URL as it is shown: without login, query, fragment and usual port.

    Queries are left out because signed addresses carry their secret there.
    """
    found = _SHOWN_FORM.match(url)
    if found is None:
        return ""
    scheme, server = found[1].lower(), found[2].rpartition("@")[2].lower()
    usual = f":{_PORTS.get(scheme, 0)}"
    return printable(f"{scheme}://{server.removesuffix(usual)}{found[3]}"[:_MAX_SHOWN])


def _image(reference: str) -> Location:
    host, found, rest = reference.partition("/")
    if not found or not ("." in host or ":" in host or host == "localhost"):
        host, rest = HUB_HOST, reference
    name, port = _server(host.lower())
    if name in _HUB_NAMES:
        name = HUB_HOST
        rest = rest if "/" in rest else f"library/{rest}"
    repository, at, version = rest.partition("@")
    repository, colon, tag = repository.partition(":")
    version = version if at else tag if colon else "latest"
    web = WebUrl("https", name, port or 443, f"/v2/{repository}/manifests/{version}")
    return Location("image", name, port or 443, printable(reference[:_MAX_SHOWN]), web)


def _git(url: str) -> Location:
    """Read the address of a repository; one without a scheme is fetched over HTTPS."""
    if _HAS_SCHEME.match(url):
        return _from_url("git", url)
    if (found := _SCP_FORM.fullmatch(url)) is not None:
        return _over_ssh(found[1], found[2])
    return _from_url("git", f"https://{url}")


def _over_ssh(server: str, path: str) -> Location:
    host, _ = _server(server.lower())
    return Location("git", host, 22, printable(f"{host}:{path}"[:_MAX_SHOWN]))


def _from_url(kind: str, url: str) -> Location:
    found = _SHOWN_FORM.match(url)
    scheme = found[1].lower() if found is not None else ""
    # Nothing of it is shown where it is not clear which part is a login.
    if found is None or scheme not in _PORTS:
        raise OddSourceError(f"its address, of the kind {kind!r}, cannot be understood")
    shown = shown_url(url)
    if scheme in DEFAULT_PORTS:
        try:
            web = parse_web_url(url)
        except InvalidValueError as error:
            raise OddSourceError(f"its {scheme} address cannot be judged: {error.message}") from (
                error
            )
        return Location(kind, web.host, web.port, shown, web)
    host, port = _server(found[2].rpartition("@")[2])
    return Location(kind, host, port or _PORTS[scheme], shown)


def _server(text: str) -> tuple[str, int]:
    try:
        return parse_server(text)
    except InvalidValueError as error:
        raise OddSourceError(f"its server cannot be judged: {error.message}") from error
