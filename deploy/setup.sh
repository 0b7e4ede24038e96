#!/usr/bin/env bash
# Installs what this checkout needs: `deploy/setup.sh demo` for building and the demo,
# `deploy/setup.sh session` for docker engines of sessions as well, and `deploy/setup.sh test` for
# the tests and benchmarks too. Safe to run again; what is there is left alone. Needs Python 3.11+,
# Go 1.26.8+ and, for missing Debian packages, root.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-demo}
tools=$PWD/.tools/bin
mkdir -p "$tools"

say() { printf '==> %s\n' "$*"; }
die() { printf 'ERROR: %s\n' "$*" >&2; exit 1; }

# --- Debian packages: "program package" pairs; only what is missing is installed.
need="runc:runc setpriv:util-linux busybox:busybox-static git:git"
# For builds behind the firewall.
need="$need nft:nftables ip:iproute2 nsenter:util-linux /usr/lib/cni/ptp:containernetworking-plugins"
# For docker engines of sessions, whose disks are files with ext4.
if [ "$what" != demo ]; then
  need="$need containerd:containerd docker:docker.io iptables:iptables mkfs.ext4:e2fsprogs"
  need="$need losetup:mount"
fi
if [ "$what" = test ]; then
  need="$need dockerd:docker.io docker-registry:docker-registry"
  need="$need ssh-agent:openssh-client sshd:openssh-server pgrep:procps"
  need="$need dnsmasq:dnsmasq-base systemd-analyze:systemd"
fi
missing=""
PATH=$PATH:/usr/sbin:/sbin
for pair in $need; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
# A busybox that needs libraries of the machine would not run in an empty image.
if command -v busybox >/dev/null 2>&1 && ldd "$(command -v busybox)" >/dev/null 2>&1; then
  missing="$missing busybox-static"
fi
if [ -n "$missing" ]; then
  command -v apt-get >/dev/null 2>&1 || die "please install:$missing"
  [ "$(id -u)" = 0 ] || die "root is needed to install:$missing; run: sudo deploy/setup.sh $what"
  say "installing$missing"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # Services must not start by themselves: the tests run engines of their own.
  printf '#!/bin/sh\nexit 101\n' > /tmp/offload-policy-rc.d && chmod +x /tmp/offload-policy-rc.d
  kept=no
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    cp /tmp/offload-policy-rc.d /usr/sbin/policy-rc.d; kept=yes
  fi
  # shellcheck disable=SC2086
  apt-get install -y -qq --no-install-recommends $missing >/dev/null || {
    [ $kept = yes ] && rm -f /usr/sbin/policy-rc.d; die "apt-get could not install:$missing"; }
  if [ $kept = yes ]; then rm -f /usr/sbin/policy-rc.d; fi
fi

# --- Python: a virtual environment with pinned versions.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed"
stamp=.venv/.installed-$what
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ requirements.lock -nt "$stamp" ]; then
  say "installing Python packages into .venv"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  extras=builder,load,compress
  [ "$what" = test ] && extras=$extras,dev
  .venv/bin/pip install -q --disable-pip-version-check -c requirements.lock -e ".[$extras]"
  touch "$stamp"
fi

# --- Go programs, by package name, from modules that pin their versions.
command -v go >/dev/null 2>&1 || die "Go 1.26.8 or newer is needed to build BuildKit; install it and run this again"
# Some programs know their version only when the linker writes it into a VARIABLE.
go_tool() { # go_tool PROGRAM MODULE_DIR PACKAGE [VARIABLE]
  if [ ! -x "$tools/$1" ] || [ "$2/go.mod" -nt "$tools/$1" ]; then
    say "building $1 (some minutes)"
    (
      cd "$2"
      export GOFLAGS=-buildvcs=false CGO_ENABLED=0
      link=""
      [ -z "${4:-}" ] || link="-X $4=$(go list -f '{{.Module.Version}}' "$3")"
      go build -ldflags "$link" -o "$tools/.$1.new" "$3"
    )
    mv "$tools/.$1.new" "$tools/$1"
    touch "$tools/$1"
  fi
}
go_tool buildkitd deploy/tools github.com/moby/buildkit/cmd/buildkitd
if [ ! -x "$tools/minio" ]; then
  say "building minio (some minutes)"
  GOFLAGS=-buildvcs=false GOBIN="$tools" CGO_ENABLED=0 \
    go install github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c
fi
[ "$what" = demo ] || go_tool dockerd deploy/tools/engine github.com/moby/moby/v2/cmd/dockerd
if [ "$what" = test ]; then
  go_tool buildctl deploy/tools github.com/moby/buildkit/cmd/buildctl
  go_tool dockerfile-frontend deploy/tools \
    github.com/moby/buildkit/frontend/dockerfile/cmd/dockerfile-frontend
  go_tool buildx deploy/tools/buildx github.com/docker/buildx/cmd/buildx \
    github.com/docker/buildx/version.Version
  go_tool docker-compose deploy/tools/compose github.com/docker/compose/v5/cmd \
    github.com/docker/compose/v5/internal.Version
  if [ ! -x "$tools/versitygw" ]; then
    say "building versitygw (some minutes)"
    GOFLAGS=-buildvcs=false GOBIN="$tools" CGO_ENABLED=0 \
      go install github.com/versity/versitygw/cmd/versitygw@v1.8.0
  fi
  go_tool crane deploy/tools/registry github.com/google/go-containerregistry/cmd/crane
fi

# --- The examples start from nothing but a static busybox.
busybox=$(command -v busybox)
for example in examples/*/; do
  [ -f "$example/Dockerfile" ] || continue
  cmp -s "$busybox" "$example/busybox" || install -m 755 "$busybox" "$example/busybox"
done
say "ready ($what)"
