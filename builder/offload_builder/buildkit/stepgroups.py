"""Puts each step below the control group of its build, whatever the build says.

BuildKit tells nowhere which build a container belongs to, but it hands the trace of the call that
began a build on to its steps, as the last variable of their environment. So we begin each call
with a trace that names the build, and the program in runc's place (`runcwrapper`) finds it there.
A trace is no part of a step's cache key. It names a group that the node has made before; steps
with any other trace share one group, with bounds as well. The variable is taken out again: a
step's environment must not differ from build to build.

A step that two builds share runs once, in the group of the build that asked for it first.

Sources: BuildKit's executor/oci (GenerateSpec), util/tracing/childprocess and solver/jobs.go; W3C
Trace Context, 3.2 (traceparent); runc's libcontainer/cgroups: an absolute path is one below the
root of each hierarchy.
"""

from __future__ import annotations

import hashlib
import shlex

TRACEPARENT = "traceparent"
TRACE_HEADERS = frozenset((TRACEPARENT, "tracestate", "baggage"))
OTHERS = "others"
"""Group of steps whose build is not known."""
DIGITS = 32

_SHELL = r"""# Into the control group of the step's build.
if [ -n "$bundle" ]; then
    # In texts of the file every quotation mark has a backslash; the last one is BuildKit's own.
    found=$(LC_ALL=C sed -n -e h \
        -e 's/.*"env":\[.*,"TRACEPARENT=00-\([0-9a-f]\{@DIGITS@\}\)-[^"\\]*".*/trace:\1/p' -e g \
        -e 's#.*"cgroupsPath":"\(/[A-Za-z0-9._/-]*\)".*#below:\1#p' "$bundle/config.json") || exit 1
    trace=none below=
    case $found in trace:*) trace=${found#trace:} trace=${trace%%[!0-9a-f]*} ;; esac
    case $found in *below:*) below=${found#*below:} ;; esac
    parent=
    for name in "$trace" @OTHERS@; do
        for group in /sys/fs/cgroup/memory@PLACE@/"$name" /sys/fs/cgroup@PLACE@/"$name"; do
            [ -n "$parent" ] || [ ! -d "$group" ] || parent=@PLACE@/$name
        done
    done
    # A build can name a group of its own below that one, but not lead out of it.
    case $below in '' | *..*) below=/${bundle##*/} ;; esac
    [ -n "$parent" ] && LC_ALL=C sed -i \
        -e 's/\("env":\[.*\),"TRACEPARENT=00-'"$trace"'-[0-9a-f-]*"/\1/;ty' -e ':y' \
        -e 's#"cgroupsPath":"\(\\.\|[^"\\]\)*"#"cgroupsPath":"'"$parent$below"'"#;tz' \
        -e 'Q1' -e ':z' "$bundle/config.json" || {
        echo "the step cannot be put into the control group of its build" >&2
        exit 1
    }
fi
"""


def trace_of(build_id: str) -> str:
    """Return the trace that stands for a build: the name of its control group."""
    return hashlib.sha256(build_id.encode()).hexdigest()[:DIGITS]


def trace_headers(trace: str) -> list[tuple[str, str]]:
    """Return what a call to BuildKit says of the trace; nothing without one.

    The last part says that nobody records it, so BuildKit makes no spans.
    """
    return [(TRACEPARENT, f"00-{trace}-{trace[:16]}-00")] if trace else []


def groups_shell(place: str) -> str:
    """Return shell commands for `write_runc_wrapper`, to run before each step.

    Args:
        place: of the groups, an absolute path below the root of each hierarchy.
    """
    shell = _SHELL.replace("@PLACE@", shlex.quote(place))
    return shell.replace("@OTHERS@", OTHERS).replace("@DIGITS@", str(DIGITS))
