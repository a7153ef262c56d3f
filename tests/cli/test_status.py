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


def test_cards_keep_their_order_and_their_configuration(machine: Machine) -> None:
    """A card that got other hardware stays at its place: the next boot takes each card's own configuration."""
    machine.boot("-n", "2", "--disk", "none", "--net", "none")
    machine.micemu("shutdown")
    machine.boot("mic0", "--memory", "128M")
    assert [c["name"] for c in machine.json("status")["cards"]] == ["mic0", "mic1"]
    machine.micemu("shutdown", "all")
    machine.boot("mic1")
    memory = {c["name"]: c["memory"] for c in machine.json("status")["cards"]}
    assert memory["mic0"] == 128 << 20
    assert memory["mic1"] != memory["mic0"]
