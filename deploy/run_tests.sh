#!/usr/bin/env bash
# Runs all tests: those without network and root beside those on real daemons, which mostly wait.
# What fails beside thousands of others on a busy machine is named, and has to pass alone.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=.venv/bin/pytest
notes=$(mktemp -d)
trap 'rm -rf "$notes"' EXIT
trap 'kill "$unit" 2>/dev/null; exit 130' INT TERM

part() { # part NAME PATH...
  local name=$1
  shift
  "$pytest" -o "cache_dir=.pytest_cache/$name" "$@"
}

part unit tests/unit >"$notes/unit" 2>&1 &
unit=$!
part daemons tests/integration tests/e2e
daemons_failed=$?
wait "$unit"
unit_failed=$?
cat "$notes/unit"

failed=0
settle() { # settle CODE NAME PATH...
  case $1 in
    0) ;;
    # All were run, and some failed. Any other code says that not all were run.
    1)
      printf '==> once more, what failed above\n'
      part "$2" --last-failed --last-failed-no-failures none "${@:3}" || failed=1
      ;;
    *) failed=1 ;;
  esac
}
settle "$unit_failed" unit tests/unit
settle "$daemons_failed" daemons tests/integration tests/e2e
exit "$failed"
