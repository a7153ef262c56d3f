"""Memory that programs registered, and have freed, comes back to the node."""

from __future__ import annotations

import subprocess
import sys

from scif_server import Server

PAGE = 4096
PROGRAM = """
import sys, threading
from mic_emu import scif
l = scif.Endpoint(); port = l.bind(); l.listen()
c = scif.Endpoint()
t = threading.Thread(target=lambda: c.connect((0, port))); t.start()
a, _ = l.accept(); t.join()
for _ in range(1000):
    memory = scif.alloc(4096)
    c.register(memory).unregister()
    del memory
print("done", flush=True); sys.stdin.read()
"""


def used(server: Server) -> int:
    state = server.ask("state")
    assert isinstance(state, list)
    return int(state[0]["used"])


def test_scif_82_pages_of_unmapped_windows_come_back_within_a_bounded_number_of_registers(
    server: Server,
) -> None:
    """Of 1000 pages that were registered and freed one after the other the node holds the latest at most: the
    program looks for what it has freed after every 64 registrations, or an eighth of its mappings."""
    before = used(server)
    env = {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / "node0.sock")}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "done\n"
            assert used(server) - before < 300 * PAGE  # the connection's own pages among them
        finally:
            program.communicate(timeout=20)
    assert program.returncode == 0
