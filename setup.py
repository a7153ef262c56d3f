"""Build hook: the cffi module from native/, and the C libraries libscif and libmicvop."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "native"
CFLAGS = [
    "-std=gnu11",
    "-O2",
    "-g",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-ffunction-sections",
    "-Wall",
    "-Wextra",
    "-Wshadow",
]


@dataclass(frozen=True)
class Library:
    """A C library of the package: ``lib<name>.so`` in mic_emu/lib, headers in mic_emu/include."""

    name: str
    what: str
    headers: tuple[str, ...]  # below native/include
    folder: str  # its own sources, and its version script
    sources: tuple[str, ...] = ()  # of native/src, which it shares with the cffi module

    def command(self, target: Path, *more: str) -> list[str]:
        """Compile and link, with ``more`` flags; what is not reached from a public call is left out."""
        own = sorted(str(p) for p in (NATIVE / self.folder).glob("*.c"))
        shared = [str(NATIVE / "src" / f"{name}.c") for name in self.sources]
        script = NATIVE / self.folder / f"lib{self.name}.map"
        return [
            "cc", *CFLAGS, *more, "-shared", f"-I{NATIVE / 'include'}", f"-Wl,-soname,lib{self.name}.so.0",
            f"-Wl,--version-script={script}", "-Wl,-z,defs,-z,now,-z,nodelete,--gc-sections", "-o", str(target),
            *own, *shared, "-pthread",
        ]  # fmt: skip

    def pkg_config(self) -> str:
        """For PKG_CONFIG_PATH=<package>/lib."""
        return PKG_CONFIG.format(name=self.name, what=self.what, version=VERSION)


VERSION = "0.0.1"
LIBRARIES = (
    Library("scif", "SCIF, the Symmetric Communication Interface (emulated)", ("scif.h",), "libscif"),
    Library(
        "micvop", "Backends of virtio devices for an emulated MIC X100", ("mic_vop.h", "mic/layout_gen.h"), "libmicvop",
        ("bus", "bus_irq", "bus_dma", "shm", "spin", "vdev", "vring_dev", "vring_drv", "copy_desc",
            "dma_drv", "dma_submit", "dma_desc", "fault", "fault_late"),
    ),
)  # fmt: skip
PKG_CONFIG = """prefix=${{pcfiledir}}/..
Name: lib{name}
Description: {what}
Version: {version}
Cflags: -I${{prefix}}/include
Libs: -L${{prefix}}/lib -l{name} -Wl,-rpath,${{prefix}}/lib
"""


class BuildExt(build_ext):
    """Also builds the C libraries into mic_emu/lib and copies their headers to mic_emu/include."""

    def run(self) -> None:
        super().run()
        package = ROOT / "mic_emu" if self.inplace or self.editable_mode else Path(self.build_lib) / "mic_emu"
        for library in LIBRARIES:
            self.build_library(library, package)

    def build_library(self, library: Library, package: Path) -> None:
        """One library, its header and its pkg-config file."""
        lib, include = package / "lib", package / "include"
        lib.mkdir(parents=True, exist_ok=True)
        for header in library.headers:
            (include / header).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(NATIVE / "include" / header, include / header)
        (lib / f"lib{library.name}.pc").write_text(library.pkg_config())
        target = lib / f"lib{library.name}.so.{VERSION}"
        fresh = lib / (target.name + ".new")  # programs may have the old one mapped: replace, never overwrite
        subprocess.run(library.command(fresh), check=True)
        fresh.replace(target)
        # Copies: a wheel cannot hold symbolic links.
        for name in (f"lib{library.name}.so.0", f"lib{library.name}.so"):
            shutil.copy2(target, lib / (name + ".new"))
            (lib / (name + ".new")).replace(lib / name)


if __name__ == "__main__":  # tests build a library with flags of their own
    setup(cffi_modules=["native/build_native.py:ffi"], cmdclass={"build_ext": BuildExt})
