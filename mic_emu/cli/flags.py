"""Compiler and linker flags for programs that use the package's C libraries"""

from __future__ import annotations

from pathlib import Path

import mic_emu
from mic_emu.errors import MicemuError


def package_folder(name: str) -> Path:
    """``include`` or ``lib`` of the installed package. Raises MicemuError when it was not built."""
    path = Path(mic_emu.__file__).resolve().parent / name
    if not path.is_dir():
        raise MicemuError(f"{path} is missing: build the package (make build)")
    return path


def compiler_flags(library: str, cflags: bool, libs: bool) -> list[str]:
    """Words for the compiler's command line; the program finds the library where it is now."""
    words = [f"-I{package_folder('include')}"] if cflags else []
    if libs:
        folder = package_folder("lib")
        words += [f"-L{folder}", f"-l{library}", f"-Wl,-rpath,{folder}"]
    return words
