"""Our own Python backends against every malformation and race that the fixture knows (VOP-44 to VOP-57, VOP-61)."""

from __future__ import annotations

import pytest

from mic_emu.testing.backend import BackendRig
from mic_emu.testing.plugin import HostileDriver
from mic_emu.testing.races import CASES, NotPossible, try_on
from mic_emu.virtio.rng import Rng


def entropy(driver: BackendRig) -> None:
    """A good request of virtio-rng."""
    assert len(driver.request(room=64)) == 64


def test_vop_44_to_57_rng_survives(hostile_driver: HostileDriver) -> None:
    """VOP-44..57: the entropy device answers good requests after each attack."""
    hostile_driver.attack(Rng, entropy)


def test_vop_44_to_57_every_clause_has_a_case() -> None:
    """VOP-44..57: none is left out."""
    assert {c.clause for c in CASES.values()} >= {f"VOP-{n}" for n in range(44, 58)}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_vop_44_to_57_rng_survives_many_seeds() -> None:
    """VOP-44..57: other values, other orders."""
    for seed in range(200):
        for case in CASES.values():
            try:
                try_on(Rng, case, seed, entropy)
            except NotPossible:
                continue
