"""The words of fault filters: one table behind command line, configuration and API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mic_emu.cli.config import toml
from mic_emu.config import load
from mic_emu.errors import UsageError
from mic_emu.faults import KINDS, WORDS, parse


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_can_be_written_and_read_back(name: str) -> None:
    """A filter with all of its words set gives the same filter when its words are read again."""
    some = {
        "device": "net", "channel": 3, "direction": "to-card", "op": "write", "rate": 0.25, "after": 10, "count": 2,
        "seed": 7, "delay": "5ms", "jitter": "10us", "error": "source", "errno": "EOPNOTSUPP", "keep": 3,
        "report": "success", "gap": 2, "bandwidth": "100M", "latency": "1.5ms", "preset": "x100",
    }  # fmt: skip
    words: dict[str, Any] = {w: some[w] for w in KINDS[name].accepts}
    if name.startswith("os-"):
        del words["delay"]
    fault = parse({"kind": name, **words})
    assert set(fault.given) == set(words)
    assert parse(fault.words()) == fault


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "it has no kind"),
        ({"kind": "doorbel-drop"}, "did you mean 'doorbell-drop'"),
        ({"kind": "packet-loss", "rate": "1.5"}, "rate '1.5': use a number from 0 to 1"),
        ({"kind": "packet-loss", "rate": "-0.1"}, "use a number from 0 to 1"),
        ({"kind": "packet-loss", "rate": "nan"}, "use a number from 0 to 1"),
        ({"kind": "packet-loss", "rate": "much"}, "rate 'much': use P"),
        ({"kind": "packet-loss", "count": "0"}, "count '0': use 1 or more"),
        ({"kind": "packet-loss", "count": 1.5}, "use a whole number"),
        ({"kind": "packet-loss", "delay": "1ms"}, "packet-loss has no 'delay'; it takes direction"),
        ({"kind": "packet-loss", "sed": 1}, "packet-loss has no 'sed', did you mean 'seed'"),
        ({"kind": "packet-delay"}, "packet-delay needs delay"),
        ({"kind": "packet-delay", "delay": "2h"}, "use a time up to an hour"),
        ({"kind": "packet-delay", "delay": "3601s"}, "use a time up to an hour"),
        ({"kind": "packet-loss", "direction": "up"}, "use one of to-card, to-host, both"),
        ({"kind": "dma-fail", "channel": 8}, "channel 8: use a number from 0 to 7"),
        ({"kind": "dma-fail", "error": "bad"}, "use one of head, ring"),
        ({"kind": "disk-error", "errno": "ENOSPC"}, "use one of EIO, EOPNOTSUPP"),
        ({"kind": "disk-error", "device": "a b"}, "use a device's name"),
        ({"kind": "link"}, "link needs bandwidth, latency or preset"),
        ({"kind": "link", "bandwidth": "0"}, "use bytes per second"),
        ({"kind": "link", "preset": "x200"}, "use one of x100"),
        ({"kind": "link", "rate": 0.5}, "link has no 'rate'"),
        ({"kind": "os-kill", "delay": "1s", "after": 5}, "not both"),
    ],
)
def test_bad_words_are_refused_with_the_fix(words: dict[str, Any], says: str) -> None:
    """Each mistake is named, with the word and what would be right."""
    with pytest.raises(UsageError) as e:
        parse(words)
    assert says in str(e.value)


def test_the_x100_preset_is_what_was_published() -> None:
    """6.5 GB/s plateau and 1.3 GB/s at 4 KiB (SCIF 5, documented performance); single words win over it."""
    fault = parse({"kind": "link", "preset": "x100"})
    seconds = fault["latency"] * 1e-9 + 4096 / fault["bandwidth"]
    assert 4096 / seconds == pytest.approx(1.3e9, rel=0.05)
    assert (1 << 20) / (fault["latency"] * 1e-9 + (1 << 20) / fault["bandwidth"]) == pytest.approx(
        6.5e9, rel=0.05
    )
    assert parse({"kind": "link", "preset": "x100", "latency": "1ms"})["latency"] == 10**6


CONFIG = """
[[card]]
net = "none"

[[card.fault]]
kind = "disk-error"
device = "block"
rate = 0.5
seed = 4

[[card.fault]]
kind = "os-kill"
delay = "2s"
"""


def test_configuration_holds_faults_and_show_prints_them(tmp_path: Path) -> None:
    """[[card.fault]] tables survive the way through ``micemu config show`` and back."""
    path = tmp_path / "lab.toml"
    path.write_text(CONFIG)
    first = load(path)
    assert [f["kind"] for f in first.cards[0].fault] == ["disk-error", "os-kill"]
    again = tmp_path / "again.toml"
    again.write_text(toml(first.to_dict()))
    assert load(again) == first


def test_configuration_errors_name_the_table(tmp_path: Path) -> None:
    """The message says which card and which of its faults is wrong."""
    path = tmp_path / "lab.toml"
    path.write_text(CONFIG.replace("rate = 0.5", "rate = 5"))
    with pytest.raises(
        UsageError, match=r"number 1 \(mic0\): fault number 1: rate 5: use a number from 0 to 1"
    ):
        load(path)
    path.write_text('[[card]]\nfault = "many"\n')
    with pytest.raises(UsageError, match=r"\[\[card.fault\]\] tables"):
        load(path)


def test_every_word_belongs_to_a_kind() -> None:
    """No option of the command line is for nothing."""
    assert {w for k in KINDS.values() for w in k.accepts} == set(WORDS)
