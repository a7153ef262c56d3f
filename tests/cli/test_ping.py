"""``micemu ping``: what it makes of ping(8)."""

from __future__ import annotations

import pytest

from mic_emu.cli import ping

IPUTILS = "64 bytes from 172.31.1.1: icmp_seq={} ttl=64 time={} ms{}\n"
BUSYBOX = "64 bytes from 172.31.1.1: seq={} ttl=64 time={} ms{}\n"


@pytest.mark.parametrize(
    ("form", "answers", "found"),
    [
        (IPUTILS, [(1, 0.5, ""), (2, 12, ""), (3, 1000, "")], [0.0005, 0.012, 1.0]),
        (BUSYBOX, [(0, 0.5, ""), (1, 12, "")], [0.0005, 0.012]),
        (IPUTILS, [(1, 1, ""), (1, 1, " (DUP!)"), (3, 1, ""), (4, 1, "")], [0.001, 0.001]),
        (IPUTILS, [], []),
    ],
)
def test_answers_of_the_requests_that_were_asked_for(
    form: str, answers: list[tuple[int, float, str]], found: list[float]
) -> None:
    """Once each, whichever ping it is; what it asked beyond the count, because one was lost, does not replace that."""
    text = "PING 172.31.1.1\n" + "".join(form.format(*a) for a in answers) + "--- statistics, time 400ms\n"
    assert ping.parse(text, 3) == found
