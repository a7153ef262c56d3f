"""SCIF, the Symmetric Communication Interface: the API for programs, and nodes underneath.

``from mic_emu import scif`` gives what a program needs; a node's own parts are in the submodules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mic_emu.scif.errors import ScifError

if TYPE_CHECKING:
    from mic_emu.scif.api import (
        FENCE_INIT_PEER,
        FENCE_INIT_SELF,
        MAP_FIXED,
        POLLERR,
        POLLHUP,
        POLLIN,
        POLLNVAL,
        POLLOUT,
        PROT_READ,
        PROT_WRITE,
        RMA_ORDERED,
        RMA_SYNC,
        RMA_USECACHE,
        RMA_USECPU,
        SIGNAL_LOCAL,
        SIGNAL_REMOTE,
        Endpoint,
        Mapping,
        PortID,
        Window,
        alloc,
        get_node_ids,
        poll,
    )

__all__ = [
    "FENCE_INIT_PEER", "FENCE_INIT_SELF", "MAP_FIXED", "POLLERR", "POLLHUP", "POLLIN", "POLLNVAL", "POLLOUT", "PROT_READ",
    "PROT_WRITE", "RMA_ORDERED", "RMA_SYNC", "RMA_USECACHE", "RMA_USECPU", "SIGNAL_LOCAL", "SIGNAL_REMOTE", "Endpoint",
    "Mapping", "PortID", "ScifError", "Window", "alloc", "get_node_ids", "poll",
]  # fmt: skip


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__name__", "__path__"]


def __getattr__(name: str) -> Any:
    """The API is loaded when it is first used: node processes do not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mic_emu.scif.api"), name)
