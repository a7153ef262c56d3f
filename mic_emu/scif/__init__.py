"""SCIF, the Symmetric Communication Interface: nodes, endpoints, windows."""

from mic_emu.scif.errors import ScifError

__all__ = ["ScifError"]
