"""The pytest plugin (entry point ``micemu``): fixtures for tests of backends, drivers and whole machines.

It costs a test run that uses none of it nothing: everything else is imported by the fixtures. User's guide:
docs/testing.md.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mic_emu.bar import Bus
    from mic_emu.testing.backend import BackendRig
    from mic_emu.testing.card import Card
    from mic_emu.testing.leftovers import Leftovers
    from mic_emu.testing.machine import Machine
    from mic_emu.vop.backend import Backend

Sections = list[tuple[str, str]]
WITNESSES = pytest.StashKey[list[Callable[[], Sections]]]()
KEPT: pytest.StashKey[list[Machine]] = pytest.StashKey()
FAILED = pytest.StashKey[bool]()
BEFORE: pytest.StashKey[Leftovers] = pytest.StashKey()
LEFTOVERS_S = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, all with ``--micemu-`` in front."""
    group = parser.getgroup("micemu", "micemu: cards under test")
    group.addoption(
        "--micemu-seed", metavar="N", default="1",
        help="Seed of the values that hostile_driver draws; 'random' takes and shows one. Default: 1.",
    )  # fmt: skip
    group.addoption(
        "--micemu-keep", metavar="DIR", default=None,
        help="Copy the run directory of a failing test's machine to DIR/TEST, with its dumps.",
    )  # fmt: skip
    group.addoption(
        "--micemu-leftovers", action="store_true",
        help="At the end look for processes, shared memory and folders of machines; fail when there are any.",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Markers and options."""
    config.addinivalue_line("markers", "micemu(*words): words for `micemu boot` of the fixture card")
    if config.option.micemu_seed == "random":  # xdist hands the drawn one on to its workers
        config.option.micemu_seed = str(random.SystemRandom().randrange(1 << 32))
    if not config.option.micemu_seed.isdecimal():
        raise pytest.UsageError(f"--micemu-seed {config.option.micemu_seed}: use a number or 'random'")


def pytest_report_header(config: pytest.Config) -> str | None:
    """The seed, when it is not the usual one."""
    seed = config.option.micemu_seed
    return None if seed == "1" else f"micemu: --micemu-seed={seed}"


# --- failures --------------------------------------------------------------------------------------


def _witness(request: pytest.FixtureRequest, sections: Callable[[], Sections]) -> None:
    request.node.stash.setdefault(WITNESSES, []).append(sections)


def _own(item: pytest.Item) -> Iterator[Callable[[], Sections]]:
    """What our fixtures left, and machines that fixtures of the user's made."""
    seen = item.stash.get(WITNESSES, [])
    yield from seen
    for value in getattr(item, "funcargs", {}).values():
        if type(value).__module__ == "mic_emu.testing.machine" and value.failure_sections not in seen:
            yield value.failure_sections


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Attach logs and dumps to a failure, while what they tell of still exists."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "teardown" or not report.failed:
        return
    item.stash[FAILED] = True
    found: Sections = []
    for sections in _own(item):
        try:
            found += sections()
        except Exception as e:  # the test's own failure must be seen, whatever a witness says
            found.append(("micemu", f"no report: {e!r}"))
    report.sections += found
    if item.config.option.micemu_keep:
        _keep(item, Path(item.config.option.micemu_keep), found)


def _keep(item: pytest.Item, where: Path, found: Sections) -> None:
    """Files of the run directories, and the sections as files, under DIR/TEST."""
    where /= re.sub(r"[^\w.-]+", "_", item.nodeid)
    for machine in item.stash.get(KEPT, []):
        machine.keep(where)
    for title, text in found:
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{re.sub(r'[^a-z0-9.]+', '-', title.lower())}.txt").write_text(text)


# --- fixtures ----------------------------------------------------------------------------------------


@pytest.fixture
def bar(request: pytest.FixtureRequest) -> Iterator[Bus]:
    """A card's memories in this process: 64 MiB of GDDR, registers at their reset values, host memory."""
    from mic_emu.testing.bar import describe, new_card

    with new_card() as bus:
        _witness(request, lambda: [("micemu registers", describe(bus))])
        yield bus


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """An emulator of the test's own: no card is booted yet; afterwards nothing of it may be left. It finds modules beside the
    test's file, as the test does."""
    from mic_emu.testing.machine import Machine

    with Machine() as m:
        places = [str(request.path.parent), os.environ.get("PYTHONPATH", "")]
        m.env["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        _witness(request, m.failure_sections)
        request.node.stash.setdefault(KEPT, []).append(m)
        yield m


@pytest.fixture
def card(request: pytest.FixtureRequest, machine: Machine) -> Iterator[Card]:
    """mic0 of a machine of its own, booted with the words of ``@pytest.mark.micemu(...)``."""
    from mic_emu.testing.card import Card

    mark = request.node.get_closest_marker("micemu")
    machine.boot(*(mark.args if mark else ()))
    with Card(machine) as c:
        yield c


class FakeDrivers:
    """Call it with a backend: it runs, and what comes back is the driver on the card's side of its rings."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self._rigs: list[BackendRig] = []

    def __call__(self, backend: Backend, *, accept: int = ~0) -> BackendRig:
        """``accept``: feature bits that the driver takes of those offered."""
        from mic_emu.testing.backend import BackendRig

        rig = BackendRig(backend, accept=accept)
        _witness(self._request, lambda: [("micemu vrings", rig.report())])
        self._rigs.append(rig.__enter__())
        return rig

    def close(self, failed: bool) -> None:
        """End all; after a test that passed each must also be found in order."""
        while self._rigs:
            rig = self._rigs.pop()
            if failed:
                rig.close()
            else:
                rig.__exit__(None)


@pytest.fixture
def fake_driver(request: pytest.FixtureRequest) -> Iterator[FakeDrivers]:
    """``fake_driver(Backend())``: the card's half of the backend's rings, in this process."""
    drivers = FakeDrivers(request)
    yield drivers
    drivers.close(request.node.stash.get(FAILED, False))


class HostileDriver:
    """One malformation or race by name; ``attack`` tries it on a backend."""

    def __init__(self, request: pytest.FixtureRequest, name: str, seed: int) -> None:
        from mic_emu.testing.races import CASES

        if name not in CASES:
            raise pytest.UsageError(f"hostile_driver has no case {name!r}: {', '.join(CASES)}")
        self._request = request
        self._case = CASES[name]
        self.name = name
        self.clause = self._case.clause
        self.seed = seed

    def attack(self, make: Callable[[], Backend], request: Callable[[BackendRig], object]) -> None:
        """Play the case on ``make()``. ``request`` sends a good request and asserts its answer: it must work
        before and afterwards. Skips the test when the backend's shape leaves no room for the case."""
        from mic_emu.testing.races import NotPossible, try_on

        def watch(rig: BackendRig) -> None:
            _witness(self._request, lambda: [(f"micemu vrings after {self.name}", rig.report())])

        try:
            try_on(make, self._case, self.seed, request, watch)
        except NotPossible as e:
            pytest.skip(str(e))

    def again(self) -> Sections:
        """How to repeat a failure."""
        node = self._request.node.nodeid
        return [
            (
                "micemu hostile driver",
                f"{self.clause} {self.name}; again: pytest '{node}' --micemu-seed={self.seed}",
            )
        ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``hostile_driver`` runs once for each case, unless it names its own."""
    if "hostile_driver" not in metafunc.fixturenames:
        return
    marks = metafunc.definition.iter_markers("parametrize")
    if any(
        "hostile_driver" in str(mark.args[0] if mark.args else mark.kwargs.get("argnames")) for mark in marks
    ):
        return
    from mic_emu.testing.races import CASES

    metafunc.parametrize("hostile_driver", list(CASES), indirect=True)


@pytest.fixture
def hostile_driver(request: pytest.FixtureRequest) -> HostileDriver:
    """A card's driver that breaks the rules in one way; see ``mic_emu.testing.races.CASES`` for the names."""
    hostile = HostileDriver(request, request.param, int(request.config.option.micemu_seed))
    _witness(request, hostile.again)
    return hostile


# --- leftovers ---------------------------------------------------------------------------------------


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")  # of pytest-xdist


def pytest_sessionstart(session: pytest.Session) -> None:
    """With ``--micemu-leftovers``: note what there is, and mark what this run starts."""
    if not session.config.option.micemu_leftovers or _is_worker(session.config):
        return
    from mic_emu.testing.leftovers import SESSION, Leftovers

    os.environ[SESSION] = secrets.token_hex(4)
    session.config.stash[BEFORE] = Leftovers.now()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With ``--micemu-leftovers``: the run fails when something of it is left."""
    before = session.config.stash.get(BEFORE, None)
    if before is None:
        return
    from mic_emu.testing.leftovers import SESSION, left_behind

    mark, deadline = os.environ.pop(SESSION), time.monotonic() + LEFTOVERS_S
    while (left := left_behind(mark, before)) and time.monotonic() < deadline:
        time.sleep(0.1)  # processes of others: no descriptor tells when they are gone
    if not left:
        return
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    terminal: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal:
        terminal.section("micemu: left behind", red=True)
        for line in left:
            terminal.line(line)
