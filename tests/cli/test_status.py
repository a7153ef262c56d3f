"""``micemu status`` of some cards."""

from __future__ import annotations

from mic_emu.testing.machine import Machine


def test_status_of_named_cards(machine: Machine) -> None:
    """Cards can be named, as everywhere; an unknown one is exit status 6."""
    machine.boot("-n", "2", "--disk", "none", "--net", "none")
    assert [c["name"] for c in machine.json("status", "mic1")["cards"]] == ["mic1"]
    assert [c["name"] for c in machine.json("status", "all")["cards"]] == ["mic0", "mic1"]
    unknown = machine.micemu("status", "mic7", check=False)
    assert (unknown.returncode, unknown.stderr) == (6, "micemu: there is no card mic7; cards: mic0, mic1\n")
