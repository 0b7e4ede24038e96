"""Bounds of memory and processors that hold for each step, whatever its build says.

Frontends hand our bounds to BuildKit (`node.steplimits`). A client that sends its own steps need
not, and BuildKit has no setting for it, so the program in runc's place (`runcwrapper`) looks at the
specification of each step: what has no bound gets the default, and what asks for more than there
is gets the most there is.

Source: the runtime specification's linux.resources; BuildKit writes it without white space.
"""

from __future__ import annotations

PERIOD_MICROSECONDS = 100_000
"""The kernel's usual period of a processor quota."""

_SHELL = r"""# Bounds of a step that asks for none, or for too much.
beyond() { # VALUE MOST: it is no number from 1 to MOST; MOST 0 is any
    case $1 in '' | *[!0-9]* | ????????????????*) return 0 ;; esac
    [ "$1" -lt 1 ] || { [ "$2" -gt 0 ] && [ "$1" -gt "$2" ]; }
}
field() { # OBJECT NAME: the number of that name
    rest=${1#*"\"$2\":"}
    [ "$rest" = "$1" ] || printf %s "${rest%%,*}"
}
object() { # NAME: its inside, of the resources
    rest=${resources#*"\"$1\":{"}
    [ "$rest" = "$resources" ] || printf %s "${rest%%\}*}"
}
bound() { # NAME INSIDE: takes the place of what the step has
    LC_ALL=C sed -i -e 's/\("resources":{.*\),"'"$1"'":{[^}]*}/\1/' \
        -e 's/"resources":{/&"'"$1"'":{'"$2"'},/' "$bundle/config.json" &&
        grep -qF '"resources":{"'"$1"'":{'"$2"'},' "$bundle/config.json" || {
        echo "the step's bounds cannot be set" >&2
        exit 1
    }
}
if [ -n "$bundle" ]; then
    resources=$(LC_ALL=C sed -n 's/.*"resources":{//p' "$bundle/config.json") || exit 1
@EACH@fi
"""

_MEMORY = r"""    own=$(object memory)
    swap=$(field "$own" swap)
    if beyond "$(field "$own" limit)" @MOST@ ||
        { [ @MOST@ -gt 0 ] && [ -n "$swap" ] && beyond "$swap" $((2 * @MOST@)); }; then
        bound memory '"limit":@DEFAULT@'
    fi
"""

_PROCESSORS = r"""    own=$(object cpu)
    quota=$(field "$own" quota) period=$(field "$own" period)
    if beyond "$quota" 0 || beyond "$period" 1000000 ||
        { [ @MOST@ -gt 0 ] && [ $((quota * 1000)) -gt $((period * @MOST@)) ]; }; then
        bound cpu '"quota":@DEFAULT@,"period":@PERIOD@'
    fi
"""


def bounds_shell(*, memory_bytes: int, max_memory_bytes: int, cpus: float, max_cpus: float) -> str:
    """Return shell commands for `write_runc_wrapper`, to run before each step; 0 is no bound.

    Args:
        memory_bytes: of a step that asks for nothing; 0 for the most.
        max_memory_bytes: the most that a step gets.
        cpus: processors of a step that asks for nothing; 0 for the most.
        max_cpus: the most that a step gets.
    """
    each = ""
    if memory := memory_bytes or max_memory_bytes:
        each += _filled(_MEMORY, max_memory_bytes, memory)
    if processors := cpus or max_cpus:
        quota = round(processors * PERIOD_MICROSECONDS)
        each += _filled(_PROCESSORS, round(max_cpus * 1000), quota)
    return _SHELL.replace("@EACH@", each) if each else ""


def _filled(shell: str, most: int, default: int) -> str:
    shell = shell.replace("@MOST@", str(most)).replace("@DEFAULT@", str(default))
    return shell.replace("@PERIOD@", str(PERIOD_MICROSECONDS))
