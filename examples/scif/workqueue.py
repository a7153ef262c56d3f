"""A work queue between host and card: jobs go out as messages, results come back through a window.

workqueue.py worker PORT           for example: micemu run mic0 -- python3 workqueue.py worker 3000
workqueue.py master NODE PORT      on the host; node 1 is mic0
"""

from __future__ import annotations

import errno
import struct
import sys

from mic_emu import scif

JOBS = 100
RESULT = struct.Struct("<Q")
JOB = struct.Struct("<QQ")


def worker(port: int) -> None:
    """Square numbers until the master closes; each result goes straight into the master's memory."""
    with scif.Endpoint() as listener:
        listener.bind(port)
        listener.listen()
        conn, peer = listener.accept()
    with conn:
        (window,) = RESULT.unpack(conn.recv(8))
        done = 0
        while len(job := _receive(conn)) == JOB.size:
            slot, number = JOB.unpack(job)
            conn.vwriteto(RESULT.pack(number * number), window + slot * RESULT.size)
            conn.send(b"d")
            done += 1
    print(f"{done} jobs for node {peer.node}")


def _receive(conn: scif.Endpoint) -> bytes:
    try:
        return conn.recv(JOB.size)
    except scif.ScifError:
        return b""


def master(node: int, port: int) -> None:
    """Hand out all jobs, wait for all results."""
    memory = scif.alloc(JOBS * RESULT.size)
    with scif.Endpoint() as conn:
        while True:
            try:
                conn.connect((node, port))
                break
            except scif.ScifError as e:
                if e.errno != errno.ECONNREFUSED:  # else nobody listens yet
                    raise
        window = conn.register(memory)
        conn.send(RESULT.pack(window.offset))
        for i in range(JOBS):
            conn.send(JOB.pack(i, i + 1))
        conn.recv(JOBS)
        results = [RESULT.unpack_from(memory, i * RESULT.size)[0] for i in range(JOBS)]
    assert results == [(i + 1) ** 2 for i in range(JOBS)]
    print(f"sum of {JOBS} squares: {sum(results)}")


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(int(sys.argv[2]))
    else:
        master(int(sys.argv[2]), int(sys.argv[3]))
