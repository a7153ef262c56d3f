"""The pytest plugin as its users see it: inner pytest runs, failures with their logs, the page in docs/ literally."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mic_emu.testing.machine import eventually
from mic_emu.testing.races import CASES

pytest_plugins = "pytester"

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"
EXAMPLES = dict(re.findall(r"`(test_\w+)\.py`:\n\n```python\n(.*?)```", DOCS.read_text(), re.S))
FIXTURES = ("bar", "fake_driver", "hostile_driver", "machine", "card")

ECHO = """
import pytest
from mic_emu.vop import Backend

class Echo(Backend):
    device_type = 42
    num = 16
    def process(self, chain):
        return chain.write(chain.read()[::-1])

def good(driver):
    assert driver.request(b"abc", room=16) == b"cba"
"""


def run(pytester: pytest.Pytester, text: str, *args: str) -> pytest.RunResult:
    """An inner run of one file in a process of its own."""
    pytester.makepyfile(test_inner=text)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q", *args, timeout=100)


def test_plugin_docs_have_an_example_per_fixture() -> None:
    """Every fixture has a file in docs/testing.md, and every case of hostile_driver its name there."""
    assert sorted(EXAMPLES) == sorted([*(f"test_{name}" for name in FIXTURES), "test_echo_on_a_card"])
    text = DOCS.read_text()
    for name in CASES:
        spot = re.sub(r"^(readable|writable)_segment_", "", name)
        assert f"`{name}`" in text or f"`{spot}`" in text, name


@pytest.mark.parametrize("name", ["bar", "fake_driver", "hostile_driver"])
def test_plugin_docs_example_in_process(pytester: pytest.Pytester, name: str) -> None:
    """The example of the page passes as it stands."""
    done = run(pytester, EXAMPLES[f"test_{name}"])
    done.assert_outcomes(
        passed=len(CASES) if name == "hostile_driver" else EXAMPLES[f"test_{name}"].count("def test_")
    )


@pytest.mark.system
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["machine", "card"])
def test_plugin_docs_example_with_a_machine(pytester: pytest.Pytester, name: str) -> None:
    """The example of the page passes as it stands, and leaves nothing."""
    done = run(pytester, EXAMPLES[f"test_{name}"], "--micemu-leftovers")
    done.assert_outcomes(passed=EXAMPLES[f"test_{name}"].count("def test_"))
    assert "left behind" not in done.stdout.str()


@pytest.mark.system
@pytest.mark.timeout(150)
def test_plugin_docs_own_device_on_a_machine(pytester: pytest.Pytester) -> None:
    """The machine finds backend and driver beside the test's file, whatever the working directory."""
    page = (DOCS.parent / "backend.md").read_text()
    there = pytester.mkdir("there")
    for name in ("echo", "echo_driver"):
        found = re.search(rf"`{name}\.py`:\n\n```python\n(.*?)```", page, re.S)
        assert found
        (there / f"{name}.py").write_text(found[1])
    (there / "test_inner.py").write_text(EXAMPLES["test_echo_on_a_card"])
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q", str(there), timeout=100)
    done.assert_outcomes(passed=1)


def test_plugin_costs_nothing_unless_used(pytester: pytest.Pytester) -> None:
    """A run without its fixtures imports neither the native module nor anything of mic_emu but the plugin."""
    done = run(
        pytester,
        """
        import sys
        def test_imports():
            found = sorted(m for m in sys.modules if m.split(".")[0] in ("mic_emu", "_cffi_backend", "posix_ipc", "click"))
            assert found == ["mic_emu", "mic_emu.testing", "mic_emu.testing.plugin", "mic_emu.version"]
        """,
    )
    done.assert_outcomes(passed=1)


def test_plugin_fake_driver_catches_a_device_that_writes_where_it_must_not(pytester: pytest.Pytester) -> None:
    """Behind its room, into readable buffers, after a reset: each is an error that says so."""
    done = run(
        pytester,
        ECHO
        + """
from mic_emu._native import ffi

def raw(view):
    return ffi.cast("uint8_t *", ffi.from_buffer(view))

class Wild(Backend):
    device_type = 42
    def process(self, chain):
        what = chain.read()
        if what == b"behind":
            raw(chain.writable[0])[chain.room] = 1
        if what == b"readable":
            raw(chain.readable[0])[0] = 0
        if what == b"keep":
            self.kept = raw(chain.writable[0])
            return None
        if what == b"late":
            self.kept[0] = 7
        return chain.write(b"ok")

def test_behind(fake_driver):
    fake_driver(Wild()).request(b"behind", room=8)

def test_readable(fake_driver):
    fake_driver(Wild()).request(b"readable", room=8)

def test_late(fake_driver):
    driver = fake_driver(Wild())
    driver.submit(b"keep", room=8)
    driver.until(lambda: hasattr(driver.backend, "kept"), "the chain")
    driver.reset()
    driver.request(b"late", room=8)

def test_in_order(fake_driver):
    driver = fake_driver(Wild())
    assert driver.request(b"", room=8) == b"ok"
    assert driver.in_flight == 0
""",
    )
    done.assert_outcomes(
        passed=2, failed=2, errors=1
    )  # what the last check finds is an error of the fixture's end
    text = done.stdout.str()
    assert "wrote behind the 8 bytes of a writable buffer" in text
    assert "wrote to a readable buffer" in text
    assert "which it had lost with the reset (VOP-57)" in text
    assert "- micemu vrings -" in text
    assert "ring 0: num 128, avail 1, used 1" in text


def test_plugin_hostile_driver_catches_backends_that_do_not_survive(pytester: pytest.Pytester) -> None:
    """A backend that breaks on an odd request, and one that never comes back, fail the cases that show it."""
    done = run(
        pytester,
        ECHO
        + """
import threading
from mic_emu.testing import backend as rig
rig.STOP_LIMIT_S = 2.0

class Touchy(Echo):
    def process(self, chain):
        return chain.write(bytes([chain.read()[0]])) and super().process(chain)

class Stuck(Echo):
    def process(self, chain):
        if chain.read() == b"hostile!":
            threading.Event().wait(8)
        return super().process(chain)

def test_touchy(hostile_driver):
    hostile_driver.attack(Touchy, lambda d: d.request(b"a", room=4))

def test_stuck(hostile_driver):
    hostile_driver.attack(Stuck, good)
""",
        "-k", "only_empty or card_dies or loop",
    )  # fmt: skip
    text = done.stdout.str()
    failed = set(re.findall(r"^FAILED \S+::(\S+)", text, re.M))
    assert failed == {"test_touchy[only_empty_descriptors]", "test_stuck[card_dies]"}
    assert "IndexError" in text
    assert "does not come back from process() within 2 s" in text
    assert "VOP-54 card_dies; again: pytest 'test_inner.py::test_stuck[card_dies]' --micemu-seed=1" in text


def test_plugin_seed_and_cases_can_be_chosen(pytester: pytest.Pytester) -> None:
    """The seed decides the values; a test may name its cases; nonsense is refused with a sentence."""
    text = (
        ECHO
        + """
@pytest.mark.parametrize("hostile_driver", ["loop"], indirect=True)
def test_one(hostile_driver):
    assert hostile_driver.clause == "VOP-44"
    hostile_driver.attack(Echo, good)
    print("seed", hostile_driver.seed)
"""
    )
    done = run(pytester, text, "--micemu-seed", "77", "-s")
    done.assert_outcomes(passed=1)
    assert "seed 77" in done.stdout.str()
    drawn = re.findall(
        r"seed[ =](\d+)", run(pytester, text, "--micemu-seed", "random", "-s", "-v").stdout.str()
    )
    assert len(drawn) >= 2
    assert len(set(drawn)) == 1, "the header and the test show different seeds"
    bad = run(pytester, text, "--micemu-seed", "x")
    assert bad.ret == pytest.ExitCode.USAGE_ERROR
    assert "--micemu-seed x: use a number or 'random'" in bad.stderr.str()


def test_plugin_hostile_driver_skips_what_a_device_cannot_have(pytester: pytest.Pytester) -> None:
    """Without INDIRECT_DESC there are no tables to break."""
    done = run(
        pytester,
        ECHO
        + """
class Plain(Echo):
    features = 0

def test_plain(hostile_driver):
    hostile_driver.attack(Plain, good)
""",
    )
    tables = 9
    done.assert_outcomes(passed=len(CASES) - tables, skipped=tables)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_plugin_failure_has_logs_and_dumps(pytester: pytest.Pytester) -> None:
    """Logs, kernel log, registers, page and vrings are sections of the report, and files with --micemu-keep."""
    done = run(
        pytester,
        """
        import pytest
        pytestmark = pytest.mark.micemu("--disk", "none", "--net", "none", "--memory", "256M")

        def test_fails(card):
            assert card.state == "on fire"

        @pytest.mark.micemu("--memory", "nonsense")
        def test_never_boots(card):
            pass
        """,
        "--micemu-keep", "kept", "--micemu-leftovers", "--junitxml", "report.xml",
    )  # fmt: skip
    done.assert_outcomes(failed=1, errors=1)
    text = done.stdout.str()
    for title in ("log.jsonl", "dump log mic0", "dump registers mic0", "dump page mic0", "dump vring mic0"):
        assert f"- micemu {title} -" in text, title
    assert "card is up" in text
    assert "nonsense" in text
    assert "left behind" not in text
    (kept,) = pytester.path.glob("kept/*test_fails*")
    assert "card is up" in (kept / "log.jsonl").read_text()
    assert (kept / "mic0" / "console.log").exists()
    assert "virtio3" in (kept / "micemu-dump-vring-mic0.txt").read_text()
    assert ET.parse(pytester.path / "report.xml").getroot().find(".//failure") is not None


@pytest.mark.system
@pytest.mark.timeout(300)
def test_plugin_leftovers_fail_the_run(pytester: pytest.Pytester) -> None:
    """A machine that nobody closed is found at the end of the run, by its processes and its folder."""
    done = run(
        pytester,
        """
        from mic_emu.testing.machine import Machine
        import mic_emu.testing.plugin as plugin
        plugin.LEFTOVERS_S = 0.2

        def test_leaks():
            m = Machine()
            m.boot("--disk", "none", "--net", "none", "--memory", "256M")
            print("home", m.home)
        """,
        "--micemu-leftovers", "-s",
    )  # fmt: skip
    try:
        assert done.ret == pytest.ExitCode.TESTS_FAILED
        text = done.stdout.str()
        done.assert_outcomes(passed=1)
        assert re.search(r"^process \d+ mic0-board", text, re.M)
        assert re.search(r"^folder /tmp/mt-", text, re.M)
    finally:
        home = re.search(r"home (\S+)", done.stdout.str())
        assert home
        env = {**os.environ, "XDG_RUNTIME_DIR": f"{home[1]}/run", "XDG_STATE_HOME": f"{home[1]}/state"}
        subprocess.run(
            [sys.executable, "-m", "mic_emu.cli", "stop", "--force"], env=env, check=False, timeout=60
        )
        eventually(lambda: not Path(home[1], "run/micemu/default").exists(), 30, "the end of the instance")
        subprocess.run(["rm", "-rf", home[1]], check=True)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_plugin_works_under_xdist(pytester: pytest.Pytester) -> None:
    """Two workers, a machine each at the same time; one seed for both, one report, nothing left."""
    done = run(
        pytester,
        ECHO
        + """
@pytest.mark.micemu("--disk", "none", "--net", "none", "--memory", "128M")
@pytest.mark.parametrize("n", range(2))
def test_cards(card, n):
    assert card.shell("echo $MICEMU_NODE") == "1\\n"
    assert n == 0, "on purpose"

@pytest.mark.parametrize("hostile_driver", ["loop", "card_dies"], indirect=True)
def test_seed(hostile_driver):
    hostile_driver.attack(Echo, good)
    with open(f"seed-{hostile_driver.name}", "w") as f:
        f.write(str(hostile_driver.seed))
""",
        "-n", "2", "--micemu-seed", "random", "--micemu-leftovers",
    )  # fmt: skip
    done.assert_outcomes(passed=3, failed=1)
    seeds = [(pytester.path / f"seed-{name}").read_text() for name in ("loop", "card_dies")]
    assert seeds[0] == seeds[1]
    text = done.stdout.str()
    assert "left behind" not in text
    assert "- micemu dump vring mic0 -" in text
