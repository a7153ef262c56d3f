"""Paths to the harnesses of the folders whose devices are made to fail here."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("vop", "hw"):
    sys.path.append(str(Path(__file__).parent.parent / folder))
