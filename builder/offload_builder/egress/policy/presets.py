"""Sets of hosts of well-known registries and package indexes, for the key `presets`.

Which hosts belong to a service is what its own documentation says, or what its redirects show.
Content delivery networks are shared: who allows such a host trusts what stands behind its name.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload_builder.egress.policy.model import (
    Action,
    HostTarget,
    Layer,
    Place,
    PortRange,
    Protocol,
    Rule,
)

HTTPS = PortRange(443, 443)
HTTP = PortRange(80, 80)


@dataclass(frozen=True)
class Preset:
    """Hosts of one service.

    Attributes:
        about: one sentence.
        hosts: as in a rule.
        plain: plain HTTP is allowed too, because clients of this service use it.
        further: hosts with ports of their own.
    """

    about: str
    hosts: tuple[str, ...]
    plain: bool = False
    further: tuple[tuple[str, int], ...] = ()


PRESETS: dict[str, Preset] = {
    "docker-hub": Preset(
        "Docker Hub: registry, login, and the networks that deliver its layers.",
        (
            "docker.io", "registry-1.docker.io", "index.docker.io", "auth.docker.io",
            "hub.docker.com", "login.docker.com", "production.cloudflare.docker.com",
            "production.cloudfront.docker.com",
            "docker-images-prod.s3.dualstack.us-east-1.amazonaws.com",
            "docker-images-prod.6aa30f8b08e16409b46e0173d6de2f56.r2.cloudflarestorage.com",
        ),
    ),
    "ghcr": Preset(
        "GitHub's container registry.",
        ("ghcr.io", "pkg-containers.githubusercontent.com"),
    ),
    "quay": Preset("Quay.io and its delivery networks.", ("quay.io", "*.quay.io")),
    "google-registry": Preset(
        "Google Container Registry and Artifact Registry.",
        ("gcr.io", "*.gcr.io", "*.pkg.dev", "storage.googleapis.com", "oauth2.googleapis.com"),
    ),
    "ecr": Preset(
        "Amazon's registries, private and public. Private ones of all accounts and regions have "
        "hosts below amazonaws.com, and their layers lie in S3: name your own for less.",
        (
            "public.ecr.aws", "*.public.ecr.aws", "api.ecr-public.us-east-1.amazonaws.com",
            "*.cloudfront.net", "*.amazonaws.com", "*.on.aws",
        ),
    ),
    "acr": Preset(
        "Azure's and Microsoft's container registries.",
        ("*.azurecr.io", "mcr.microsoft.com", "*.data.mcr.microsoft.com",
         "login.microsoftonline.com", "*.blob.core.windows.net"),
    ),
    "pypi": Preset("Python Package Index.", ("pypi.org", "files.pythonhosted.org")),
    "conda": Preset(
        "Conda packages.",
        ("conda.anaconda.org", "repo.anaconda.com", "api.anaconda.org",
         "binstar-cio-packages-prod.s3.amazonaws.com"),
    ),
    "npm": Preset(
        "npm and Yarn packages, and Node.js itself.",
        ("registry.npmjs.org", "registry.yarnpkg.com", "nodejs.org", "repo.yarnpkg.com"),
    ),
    "crates": Preset(
        "Rust crates and toolchains.",
        ("crates.io", "index.crates.io", "static.crates.io", "static.rust-lang.org",
         "sh.rustup.rs"),
    ),
    "go": Preset(
        "Go modules through the proxy and its checksum database, and Go itself.",
        ("proxy.golang.org", "sum.golang.org", "index.golang.org", "go.dev", "dl.google.com",
         "golang.org", "storage.googleapis.com"),
    ),
    "maven": Preset(
        "Maven Central and Gradle's plugins and distributions.",
        ("repo.maven.apache.org", "repo1.maven.org", "plugins.gradle.org",
         "plugins-artifacts.gradle.org", "services.gradle.org", "downloads.gradle.org"),
    ),
    "rubygems": Preset(
        "Ruby gems.", ("rubygems.org", "index.rubygems.org", "*.rubygems.org")
    ),
    "packagist": Preset(
        "PHP packages by Composer; archives come from GitHub.",
        ("packagist.org", "repo.packagist.org", "getcomposer.org"),
    ),
    "nuget": Preset(
        ".NET packages.", ("api.nuget.org", "www.nuget.org", "globalcdn.nuget.org")
    ),
    "debian": Preset(
        "Debian packages.",
        ("deb.debian.org", "security.debian.org", "ftp.debian.org", "cdn-fastly.deb.debian.org",
         "snapshot.debian.org"),
        plain=True,
    ),
    "ubuntu": Preset(
        "Ubuntu packages, ports and personal archives.",
        ("archive.ubuntu.com", "*.archive.ubuntu.com", "security.ubuntu.com",
         "ports.ubuntu.com", "changelogs.ubuntu.com", "ppa.launchpadcontent.net",
         "keyserver.ubuntu.com"),
        plain=True,
        further=(("keyserver.ubuntu.com", 11371),),
    ),
    "alpine": Preset(
        "Alpine packages.", ("dl-cdn.alpinelinux.org", "dl-2.alpinelinux.org"), plain=True
    ),
    "fedora": Preset(
        "Fedora and EPEL packages; the mirror list may lead to other hosts.",
        ("mirrors.fedoraproject.org", "dl.fedoraproject.org",
         "download.fedoraproject.org", "codecs.fedoraproject.org"),
        plain=True,
    ),
    "github": Preset(
        "GitHub: repositories by HTTPS and SSH, archives, releases, raw files and large files.",
        ("github.com", "api.github.com", "codeload.github.com", "raw.githubusercontent.com",
         "objects.githubusercontent.com", "release-assets.githubusercontent.com",
         "gist.githubusercontent.com", "github-cloud.githubusercontent.com",
         "media.githubusercontent.com", "lfs.github.com", "github-cloud.s3.amazonaws.com"),
        further=(("github.com", 22), ("ssh.github.com", 443)),
    ),
    "gitlab": Preset(
        "GitLab.com: repositories by HTTPS and SSH, its registry.",
        ("gitlab.com", "registry.gitlab.com", "cdn.registry.gitlab-static.net"),
        further=(("gitlab.com", 22), ("altssh.gitlab.com", 443)),
    ),
}  # fmt: skip
"""By name, as in the key `presets`."""


def preset_rules(name: str, place: Place, layer: Layer) -> tuple[Rule, ...]:
    """Return what a preset allows: one rule, and one for each port of its own.

    Raises:
        KeyError: there is no such preset.
    """
    preset = PRESETS[name]
    hosts = tuple(_target(host) for host in preset.hosts)
    ports = (HTTP, HTTPS) if preset.plain else (HTTPS,)
    rules = [_rule(f"preset-{name}", hosts, ports, preset.about, place, layer, name)]
    by_port: dict[int, list[HostTarget]] = {}
    for host, port in preset.further:
        by_port.setdefault(port, []).append(_target(host))
    for port, found in by_port.items():
        rules.append(
            _rule(
                f"preset-{name}-{port}", tuple(found), (PortRange(port, port),), preset.about,
                place, layer, name,
            )
        )  # fmt: skip
    return tuple(rules)


def _target(host: str) -> HostTarget:
    return HostTarget(host.removeprefix("*."), host.startswith("*."))


def _rule(
    rule_id: str,
    hosts: tuple[HostTarget, ...],
    ports: tuple[PortRange, ...],
    about: str,
    place: Place,
    layer: Layer,
    preset: str,
) -> Rule:
    return Rule(
        rule_id, Action.ALLOW, hosts, ports, Protocol.TCP,
        comment=about, place=place, layer=layer, preset=preset,
    )  # fmt: skip
