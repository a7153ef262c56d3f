"""SCIF, the Symmetric Communication Interface: the API for programs, and nodes underneath.

``from mic_emu import scif`` gives what a program needs; a node's own parts are in the submodules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mic_emu.scif.errors import ScifError

if TYPE_CHECKING:
    from mic_emu.scif.api import Endpoint, Mapping, PortID, Window, alloc, get_node_ids, poll

__all__ = ["Endpoint", "Mapping", "PortID", "ScifError", "Window", "alloc", "get_node_ids", "poll"]


def __getattr__(name: str) -> Any:
    """The API is loaded when it is first used: node processes do not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mic_emu.scif.api"), name)
