"""Limits of waits in a SCIF node, in the specification's seconds."""

from __future__ import annotations

NODE_ALIVE_S = 30.0  # an answer of another node (SCIF 3.7)
DRAIN_S = 3.0  # the end of copies under a window list that is no longer valid
