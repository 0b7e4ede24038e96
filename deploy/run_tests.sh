#!/usr/bin/env bash
# Runs all tests, in two halves beside each other: those on real daemons mostly wait.
# What fails beside thousands of others on a busy machine is shown, and has to pass alone: only what
# fails then too is in a summary as FAILED.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=.venv/bin/pytest
notes=$(mktemp -d)
trap 'rm -rf "$notes"' EXIT
trap 'kill "$commands" 2>/dev/null; exit 130' INT TERM

part() { # part NAME PATH...
  "$pytest" -o "cache_dir=.pytest_cache/$1" "${@:2}"
}

part commands -r sxX tests/unit tests/e2e >"$notes/commands" 2>&1 &
commands=$!
part daemons -r sxX tests/integration
daemons_code=$?
wait "$commands"
commands_code=$?
cat "$notes/commands"

failed=0
settle() { # settle CODE NAME PATH...
  case $1 in
    0) ;;
    # All were run, and some failed. Any other code says that not all were run.
    1)
      printf '==> once more, what failed above\n'
      part "$2" -v --last-failed --last-failed-no-failures none "${@:3}" || failed=1
      ;;
    *) failed=1 ;;
  esac
}
settle "$daemons_code" daemons tests/integration
settle "$commands_code" commands tests/unit tests/e2e
exit "$failed"
