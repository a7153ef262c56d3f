"""Tools that people run their SCIF programs under: memcheck, AddressSanitizer, gdb. No report is ours."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from scif_server import HERE, PACKAGE, Server

# Tests of c/ that use every part of the library, threads and a peer process included, and run to their end.
CASES = {
    "connect": [
        "scif_29_39_connect_returns_the_port_that_accept_reports",
        "scif_40_42_43_nonblocking_connect",
    ],
    "descriptors": ["scif_15_a_plain_close_loses_no_memory"],
    "messages": ["scif_60_a_mebibyte_arrives_intact", "scif_63_64_73_132_unread_data_is_drained_then_reset"],
    "windows": [
        "scif_84_86_87_109_111_window_is_live_and_survives_munmap",
        "scif_85_the_same_memory_in_several_windows",
        "scif_85_pages_of_the_heap_with_freed_blocks",
        "scif_16_fork_after_register_leaves_each_its_own_copy",
        "scif_86_register_loses_no_racing_write",
    ],
    "mmap": [
        "scif_93_mapping_is_live_in_both_directions",
        "scif_91_98_unregister_of_a_mapped_window_lingers",
    ],
    "rma": ["scif_108_110_v_calls_and_the_callers_memory", "scif_117_118_marks_and_waits"],
    "marks": ["scif_118_marks_of_several_threads_on_one_endpoint"],
    "poll": ["scif_77_a_mixture_of_descriptors"],
}
ROUTE = "0-1"
# All registers: a thread that stores into memory while another registers it waits in a SIGSEGV handler (docs/scif.md).
MEMCHECK = [
    "valgrind", "--quiet", "--leak-check=full", "--show-leak-kinds=definite",
    "--vex-iropt-register-updates=allregs-at-mem-access",
]  # fmt: skip
SOURCES = "|".join(path.name for path in (PACKAGE.parent / "native/libscif").glob("*.c"))
OURS = re.compile(rf"\(({SOURCES}):\d+\)")


def build(where: Path, name: str, *flags: str) -> Path:
    """A program of c/ as its author would build it for a tool."""
    sources = [str(HERE / "c" / f"{name}.c"), str(HERE / "c" / "main.c")]
    library = [f"-I{PACKAGE / 'include'}", f"-L{PACKAGE / 'lib'}", "-lscif", f"-Wl,-rpath,{PACKAGE / 'lib'}"]
    out = where / name
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", "-g", "-pthread", *flags, *sources, *library, "-o", out], check=True
    )
    return out


def run(server: Server, *command: object, **env: str) -> str:
    """What it said, on both outputs; it must end well."""
    done = subprocess.run(
        [str(word) for word in command], env={**server.env(ROUTE), **env}, timeout=110, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.mark.peer("valgrind")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_valgrind_has_nothing_to_say(server: Server, tmp_path: Path, name: str) -> None:
    """memcheck: no bad access, no use of what was never written, nothing of the library's lost; also in the
    processes that the program forks."""
    program = build(tmp_path, name)
    for case in CASES[name]:
        said = run(server, *MEMCHECK, program, case)
        reports = re.split(r"^==\d+== $", said, flags=re.M)
        # What the program itself loses when it exits is no affair of the library's.
        ours = [r for r in reports if "==" in r and ("definitely lost" not in r or OURS.search(r))]
        assert not ours, said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_a_program_with_address_sanitizer(server: Server, tmp_path: Path, name: str) -> None:
    """Built with -fsanitize=address: no report, leaks included."""
    program = build(tmp_path, name, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for case in CASES[name]:
        said = run(server, program, case, ASAN_OPTIONS="detect_leaks=1:abort_on_error=0")
        assert "Sanitizer" not in said, said


@pytest.mark.peer("gdb")
@pytest.mark.timeout(300)
def test_gdb_stops_in_a_call_and_goes_on(server: Server, tmp_path: Path) -> None:
    """A breakpoint in the library, a backtrace into the program, and the program still ends well: no stray signal."""
    program = build(tmp_path, "windows")
    commands = ["set pagination off", "break scif_register", "run", "backtrace", "delete", "continue"]
    words = [word for command in commands for word in ("-ex", command)]
    case = "scif_84_86_87_109_111_window_is_live_and_survives_munmap"
    said = run(server, "gdb", "-batch", "-nx", *words, "--args", program, case)
    assert "in scif_register" in said or "scif_register (" in said, said
    assert f"test_{case}" in said, said
    assert "exited normally" in said, said
    assert "received signal" not in said, said
