"""micemu: a MIC X100 (Xeon Phi) card and its host software stack as ordinary Linux processes."""

from mic_emu.version import VERSION as __version__

__all__ = ["__version__"]
