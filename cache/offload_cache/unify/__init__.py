"""Unites the cache records of many builds into the one import that BuildKit can use.

Nothing here reads or writes anything but what it is given.
"""

from offload_cache.unify.limits import Choice, Limits, Unified, unify
from offload_cache.unify.records import SALT_PREFIX, Part, Record, Result, read_part
from offload_cache.unify.render import Rendered, empty_import, render, salt_digest
from offload_cache.unify.union import Union, keep_newest, unite

__all__ = [
    "SALT_PREFIX",
    "Choice",
    "Limits",
    "Part",
    "Record",
    "Rendered",
    "Result",
    "Unified",
    "Union",
    "empty_import",
    "keep_newest",
    "read_part",
    "render",
    "salt_digest",
    "unify",
    "unite",
]
