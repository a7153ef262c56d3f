"""First code of a started image: finds its own extension module, then the card OS's ``main``.

``sys.argv`` is ``[..., payload descriptor, folders of extensions, installed, arguments of main...]``. The zip
is ``sys.path[0]`` already; the native module is loaded from the downloaded bytes, not from the
host's installation.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from typing import NoReturn
from zipimport import zipimporter

# Descriptor of the zip that modules are imported from, -1 when this is no started image.
archive_fd = -1
# Folders of the host with this package and its interpreter: programs use libscif and the Python API.
installed: list[str] = []


def load_native(archive: str) -> None:
    """Make ``mic_emu._native`` importable from the image's bytes. Raises OSError, ImportError."""
    content = zipimporter(archive).get_data("mic_emu/_native.abi3.so")
    fd = os.memfd_create("micos-native")
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        path = f"/proc/self/fd/{fd}"
        loader = ExtensionFileLoader("mic_emu._native", path)
        spec = spec_from_file_location("mic_emu._native", path, loader=loader)
        if spec is None:
            raise ImportError("the image's native module cannot be loaded")
        module = module_from_spec(spec)
        loader.exec_module(module)
    finally:
        os.close(fd)
    sys.modules["mic_emu._native"] = module
    sys.modules["mic_emu"]._native = module  # type: ignore[attr-defined]


def start() -> NoReturn:
    """Set up what ``start_command`` promised and run ``main``; its result is the exit status."""
    global archive_fd, installed
    archive_fd = int(sys.argv[1])
    archive, extensions = f"/proc/self/fd/{archive_fd}", sys.argv[2]
    os.set_inheritable(archive_fd, False)
    installed = sys.argv[3].split(os.pathsep)
    sys.argv = ["micos", *sys.argv[4:]]
    sys.path += extensions.split(os.pathsep)
    load_native(archive)
    sys.exit(import_module("mic_emu.card.os.main").main())
