"""Which driver serves which virtio device type."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mic_emu import layout as L
from mic_emu.card.os.disk import BlockDriver
from mic_emu.card.os.drivers import ConsoleDriver, Environment, NetworkDriver
from mic_emu.card.os.pydriver import user_drivers
from mic_emu.card.os.vop import VirtioDriver

C = L.CONSTANTS

BUILT_IN: dict[int, Callable[[Environment], VirtioDriver]] = {
    C["VIRTIO_ID_CONSOLE"]: ConsoleDriver,
    C["VIRTIO_ID_NET"]: NetworkDriver,
    C["VIRTIO_ID_BLOCK"]: BlockDriver,
}


def drivers(env: Environment) -> dict[int, Callable[[], VirtioDriver]]:
    """Built-in drivers, and those of the kernel command line, which come first."""
    made: dict[int, Callable[[Environment], VirtioDriver]] = {**BUILT_IN, **user_drivers(env.params, env.log)}
    return {kind: functools.partial(make, env) for kind, make in made.items()}
