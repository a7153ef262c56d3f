"""Build script of the cffi module ``mic_emu._native``.

Every header of ``native/include/mic`` may mark what Python is allowed to call with
``/* cffi-begin */ ... /* cffi-end */``; these sections are declared to cffi, so C and Python
share one prototype. ``bus.h`` comes first because the others use its types.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

NATIVE = Path(__file__).resolve().parent
INCLUDE = NATIVE / "include" / "mic"
SECTION = re.compile(r"/\* cffi-begin \*/(.*?)/\* cffi-end \*/", re.S)
FIRST = ("bus.h", "vring.h")

CFLAGS = [
    "-std=gnu11",
    "-O2",
    "-g",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-fvisibility=hidden",
]
SANITIZE = os.environ.get("MICEMU_SANITIZE", "")


def headers() -> list[Path]:
    """Headers with a cffi section, in declaration order."""
    have = [p for p in sorted(INCLUDE.glob("*.h")) if SECTION.search(p.read_text())]
    return sorted(have, key=lambda p: (FIRST.index(p.name) if p.name in FIRST else len(FIRST), p.name))


def sources() -> list[str]:
    """C files of the module, relative to the project's root (libscif too: the Python API calls it)."""
    root = NATIVE.parent
    folders = (NATIVE / "src", NATIVE / "libscif", NATIVE / "bench")
    return [str(p.relative_to(root)) for folder in folders for p in sorted(folder.glob("*.c"))]


ffi = FFI()
ffi.cdef("struct iovec { void *iov_base; size_t iov_len; };")  # from <sys/uio.h>
for header in headers():
    for text in SECTION.findall(header.read_text()):
        ffi.cdef(text)
flags = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []
ffi.set_source(
    "mic_emu._native",
    "".join(f'#include "mic/{h.name}"\n' for h in headers()),
    sources=sources(),
    include_dirs=["native/include"],
    depends=[str(p.relative_to(NATIVE.parent)) for p in INCLUDE.glob("*.h")],
    extra_compile_args=CFLAGS + flags,
    extra_link_args=["-pthread", *flags],
)
