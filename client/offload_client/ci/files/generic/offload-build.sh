#!/usr/bin/env bash
# A step that builds an image on the pool, for any system with a shell.
#
# Usage: offload-build.sh [OPTIONS] PATH      as offload-build, see "offload-build --help"
#
# OFFLOAD_GATEWAY   address of the gateway, where offload.toml does not name it
# OFFLOAD_CA        fingerprint of its CA, where a token of an identity provider is used
# OFFLOAD_TOKEN     a token of the gateway; or one of the system's identity provider in
#                   OFFLOAD_ID_TOKEN, OFFLOAD_ID_TOKEN_FILE or by OFFLOAD_ID_TOKEN_COMMAND
# OFFLOAD_RESULTS   directory of metadata.json, build.env and summary.md; offload-results
# OFFLOAD_PACKAGE   what pip installs where the client is missing; offload-build
set -euo pipefail

results=${OFFLOAD_RESULTS:-offload-results}
mkdir -p "$results"
if ! command -v offload-build > /dev/null; then
  python3 -m venv "$results/venv"
  "$results/venv/bin/pip" install --quiet "${OFFLOAD_PACKAGE:-offload-build}"
  PATH="$(cd "$results/venv/bin" && pwd):$PATH"
fi
exec offload-build --metadata-file="$results/metadata.json" --result-file="$results/build.env" \
  --summary-file="$results/summary.md" "$@"
