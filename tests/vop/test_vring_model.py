"""The ring library against an independent model: any size, wrap-around, both sides interleaved."""

from __future__ import annotations

import errno
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mic_emu import layout
from mic_emu._native import lib
from mic_emu.testing.rings import EVENT_IDX, INDIRECT_DESC, Chain, FakeDevice, FakeDriver, Rig

SEG = st.tuples(st.integers(0, 0xFFFFF), st.integers(1, 0xFFFF))
# Mostly short chains; now and then one that no indirect table, or no ring, can hold.
SEGS = st.one_of(st.lists(SEG, max_size=5), st.builds(lambda s, n: [s] * n, SEG, st.integers(6, 130)))


class RingModel(RuleBasedStateMachine):
    """What a ring promises, in Python's own containers. ``steps``: of all runs."""

    steps = 0

    @initialize(
        num=st.sampled_from([1 << k for k in range(8)]),  # every size that VOP 3 allows
        features=st.sampled_from([0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC]),
        warm=st.one_of(st.sampled_from([0, 65500, 65535]), st.integers(0, 65535)),
    )
    def build(self, num: int, features: int, warm: int) -> None:
        self.rig = Rig(num, features=features, gddr_size=8 << 20, host_size=1 << 20)
        self.drv, self.dev = FakeDriver(self.rig), FakeDevice(self.rig)
        self.indirect = bool(features & INDIRECT_DESC)
        self.event_idx = bool(features & EVENT_IDX)
        self.num, self.token = num, 0
        self.empty(warm)

    def empty(self, index: int) -> None:
        """Nothing is in flight; all indices of both sides stand at ``index``."""
        self.added = self.pushed = index
        self.free = self.num
        self.available: deque[tuple[int, list[tuple[int, int]], list[tuple[int, int]]]] = deque()
        self.popped: list[tuple[int, int, list[tuple[int, int]], list[tuple[int, int]]]] = []
        self.used: deque[tuple[int, int, int]] = deque()
        self.cost: dict[int, int] = {}
        self.kicks_wanted = self.interrupts_wanted = False
        self.start_at(index)
        lib.mic_vq_disable_kick(self.dev.vq[0])
        lib.mic_dq_disable_interrupt(self.drv.dq[0])

    def start_at(self, index: int) -> None:
        """All indices of both halves, so that the wrap-around is near."""
        dq, vq = self.drv.dq[0], self.dev.vq[0]
        dq.avail_idx = dq.last_used = dq.kicked = index
        vq.last_avail = vq.used_idx = vq.signalled = index
        self.drv.set_avail_idx(index)
        self.rig.bus.gddr.store(self.rig.used[0] + 2, 2, index)

    @rule(readable=SEGS, writable=SEGS)
    def add(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> None:
        n = len(readable) + len(writable)
        table = self.indirect and 1 < n <= lib.MIC_DQ_TABLE
        cost = 1 if table else n
        self.token += 1
        if n == 0 or cost > self.free or cost > self.num:
            with pytest.raises(OSError) as e:
                self.drv.add(readable, writable, self.token)
            assert e.value.errno == (errno.EINVAL if n == 0 or cost > self.num else errno.ENOSPC)
            return
        self.drv.add(readable, writable, self.token)
        self.free -= cost
        self.added += 1
        self.cost[self.token] = cost
        self.available.append((self.token, readable, writable))
        kick = lib.mic_dq_should_kick(self.drv.dq[0])
        if self.kicks_wanted:
            assert kick, "the device sleeps and nobody wakes it"
            self.kicks_wanted = False
            lib.mic_vq_disable_kick(self.dev.vq[0])
        elif not self.event_idx:  # an event index left behind may ring once per wrap-around
            assert not kick, "a kick that nobody asked for"

    @rule()
    def pop(self) -> None:
        chain: Chain | None = self.dev.pop()
        if not self.available:
            assert chain is None
            return
        token, readable, writable = self.available.popleft()
        assert chain is not None
        assert list(chain.readable) == readable
        assert list(chain.writable) == writable
        self.popped.append((chain.head, token, readable, writable))

    @precondition(lambda self: self.popped)
    @rule(data=st.data(), fill=st.integers(0, 1 << 20))
    def push(self, data: st.DataObject, fill: int) -> None:
        head, token, _, writable = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        self.pushed += 1
        self.dev.push(head, fill)
        room = sum(n for _, n in writable)
        self.used.append((token, min(fill, room), head))
        interrupt = lib.mic_vq_should_interrupt(self.dev.vq[0])
        if self.interrupts_wanted:
            assert interrupt, "the driver sleeps and nobody wakes it"
            self.interrupts_wanted = False
            lib.mic_dq_disable_interrupt(self.drv.dq[0])
        elif not self.event_idx:
            assert not interrupt, "an interrupt that nobody asked for"

    @rule()
    def get(self) -> None:
        got = self.drv.get()
        if not self.used:
            assert got is None
            return
        token, length, _ = self.used.popleft()
        assert got == (token, length)
        self.free += self.cost.pop(token)

    @rule()
    def device_sleeps(self) -> None:
        assert lib.mic_vq_enable_kick(self.dev.vq[0]) == bool(self.available)
        if self.available:
            lib.mic_vq_disable_kick(self.dev.vq[0])
            self.kicks_wanted = False
        else:
            self.kicks_wanted = True

    @rule()
    def driver_sleeps(self) -> None:
        assert lib.mic_dq_enable_interrupt(self.drv.dq[0]) == bool(self.used)
        if self.used:
            lib.mic_dq_disable_interrupt(self.drv.dq[0])
            self.interrupts_wanted = False
        else:
            self.interrupts_wanted = True

    @rule(index=st.integers(0, 65535))
    def reset(self, index: int) -> None:
        """VOP-57: both halves begin again, whatever was in flight; nothing of it comes up later."""
        self.drv.reset()
        self.dev.reset()
        self.empty(index)

    @invariant()
    def looks_agree(self) -> None:
        if not hasattr(self, "dev"):
            return
        RingModel.steps += 1
        # The shared words, read by the model itself (VOP 9.1).
        avail = self.rig.blocks[0] + layout.VRING_DESC.size * self.num
        assert self.rig.bus.host.load(avail + 2, 2) == self.added & 0xFFFF
        assert self.rig.bus.gddr.load(self.rig.used[0] + 2, 2) == self.pushed & 0xFFFF
        assert lib.mic_vq_has_work(self.dev.vq[0]) == bool(self.available)
        assert lib.mic_dq_has_completion(self.drv.dq[0]) == bool(self.used)
        assert self.drv.dq[0].free_num == self.free

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.drv.close()
            self.dev.close()
            self.rig.close()


def steps(examples: int, each: int) -> settings:
    """So many runs of the machine, of up to so many steps."""
    return settings(
        max_examples=examples,
        stateful_step_count=each,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


class TestRingModel(RingModel.TestCase):  # type: ignore[name-defined,misc]
    """The short form, for every run."""

    settings = steps(100, 60)


@pytest.mark.soak
@pytest.mark.timeout(7200)
class TestRingModelSoak(RingModel.TestCase):  # type: ignore[name-defined,misc]
    """Millions of steps."""

    settings = steps(15000, 200)

    def runTest(self) -> None:
        before = RingModel.steps
        super().runTest()
        assert RingModel.steps - before >= 2_000_000
