"""Paths to the harness of the drills, which this one is built on."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("cosm", "vop"):
    sys.path.append(str(Path(__file__).parent.parent / folder))
