"""The ring library against an independent model: any size, wrap-around, both sides interleaved."""

from __future__ import annotations

import errno
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mic_emu._native import lib
from mic_emu.testing.rings import EVENT_IDX, INDIRECT_DESC, Chain, FakeDevice, FakeDriver, Rig

SEGS = st.lists(st.tuples(st.integers(0, 0xFFFFF), st.integers(1, 0xFFFF)), max_size=5)


class RingModel(RuleBasedStateMachine):
    """What a ring promises, in Python's own containers."""

    @initialize(
        num=st.sampled_from([1, 2, 4, 8, 32, 128]),
        features=st.sampled_from([0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC]),
        warm=st.sampled_from([0, 5, 65500, 65530, 65535]),
    )
    def build(self, num: int, features: int, warm: int) -> None:
        self.rig = Rig(num, features=features, gddr_size=8 << 20, host_size=1 << 20)
        self.drv, self.dev = FakeDriver(self.rig), FakeDevice(self.rig)
        self.indirect = bool(features & INDIRECT_DESC)
        self.num, self.token = num, 0
        self.free, self.since_push = num, 0
        self.available: deque[tuple[int, list[tuple[int, int]], list[tuple[int, int]]]] = deque()
        self.popped: list[tuple[int, int, list[tuple[int, int]], list[tuple[int, int]]]] = []
        self.used: deque[tuple[int, int, int]] = deque()
        self.cost: dict[int, int] = {}
        self.kicks_wanted = self.interrupts_wanted = False
        self.event_idx = bool(features & EVENT_IDX)
        self.start_at(warm)
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
        cost = 1 if self.indirect and n > 1 else n
        self.token += 1
        if n == 0 or cost > self.free or cost > self.num:
            with pytest.raises(OSError) as e:
                self.drv.add(readable, writable, self.token)
            assert e.value.errno == (errno.EINVAL if n == 0 or cost > self.num else errno.ENOSPC)
            return
        self.drv.add(readable, writable, self.token)
        self.free -= cost
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
        self.since_push += 1

    @precondition(lambda self: getattr(self, "since_push", 0))
    @rule()
    def unpop(self) -> None:
        """Defined for what was popped since the last completion."""
        self.since_push -= 1
        lib.mic_vq_unpop(self.dev.vq[0], 1)
        _, token, readable, writable = self.popped.pop()
        self.available.appendleft((token, readable, writable))

    @precondition(lambda self: self.popped)
    @rule(data=st.data(), fill=st.integers(0, 1 << 20))
    def push(self, data: st.DataObject, fill: int) -> None:
        head, token, _, writable = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        self.since_push = 0
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

    @invariant()
    def looks_agree(self) -> None:
        if not hasattr(self, "dev"):
            return
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
@pytest.mark.timeout(3600)
class TestRingModelSoak(RingModel.TestCase):  # type: ignore[name-defined,misc]
    """Millions of steps."""

    settings = steps(10000, 200)
