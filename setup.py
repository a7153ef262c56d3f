"""Build hook: the cffi module from native/, and libscif.so.0 from native/libscif."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "native"
LIBRARY = "libscif.so.0.0.1"
NAMES = ("libscif.so.0", "libscif.so")  # copies: a wheel cannot hold symbolic links
CFLAGS = [
    "-std=gnu11",
    "-O2",
    "-g",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wshadow",
]


PKG_CONFIG = """prefix=${pcfiledir}/..
Name: libscif
Description: SCIF, the Symmetric Communication Interface (emulated)
Version: 0.0.1
Cflags: -I${prefix}/include
Libs: -L${prefix}/lib -lscif -Wl,-rpath,${prefix}/lib
"""


class BuildExt(build_ext):
    """Also builds the C library into mic_emu/lib and copies its header to mic_emu/include."""

    def run(self) -> None:
        super().run()
        package = ROOT / "mic_emu" if self.inplace or self.editable_mode else Path(self.build_lib) / "mic_emu"
        lib, include = package / "lib", package / "include"
        lib.mkdir(parents=True, exist_ok=True)
        include.mkdir(parents=True, exist_ok=True)
        shutil.copy2(NATIVE / "include" / "scif.h", include / "scif.h")
        (lib / "libscif.pc").write_text(PKG_CONFIG)  # PKG_CONFIG_PATH=<package>/lib
        target = lib / LIBRARY
        fresh = lib / (LIBRARY + ".new")  # programs may have the old one mapped: replace, never overwrite
        sources = sorted(str(p) for p in (NATIVE / "libscif").glob("*.c"))
        command = ["cc", *CFLAGS, "-shared", f"-I{NATIVE / 'include'}", "-Wl,-soname,libscif.so.0"]
        command += [
            f"-Wl,--version-script={NATIVE / 'libscif' / 'libscif.map'}",
            "-Wl,-z,defs,-z,now,-z,nodelete",
        ]
        command += ["-o", str(fresh), *sources, "-pthread"]
        subprocess.run(command, check=True)
        fresh.replace(target)
        for name in NAMES:
            shutil.copy2(target, lib / (name + ".new"))
            (lib / (name + ".new")).replace(lib / name)


setup(cffi_modules=["native/build_native.py:ffi"], cmdclass={"build_ext": BuildExt})
