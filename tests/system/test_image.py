"""micos images: building, checking, starting."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mic_emu import image
from mic_emu.image import HEADER_SIZE, ImageError, ImageHeader, parse_header


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The package's own image."""
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return image.built_in(Path("/nonexistent")).read_bytes()


def rehead(built: bytes, change: Callable[[ImageHeader], ImageHeader]) -> bytes:
    return change(parse_header(built)).pack() + built[HEADER_SIZE:]


def test_built_image_is_accepted_and_holds_what_the_card_needs(built: bytes) -> None:
    """The payload is a stored zip with compiled modules and the native extension, and no host code."""
    h = parse_header(built)
    assert h.payload_offset == HEADER_SIZE
    assert h.payload_len == len(built) - HEADER_SIZE
    with zipfile.ZipFile(io.BytesIO(built[HEADER_SIZE:])) as z:
        names = z.namelist()
        assert all(i.compress_type == zipfile.ZIP_STORED for i in z.infolist())
    assert {"__main__.pyc", "mic_emu/__init__.pyc", "mic_emu/card/os/bootstrap.pyc"} <= set(names)
    assert "mic_emu/_native.abi3.so" in names
    assert not [n for n in names if n.startswith(("mic_emu/host", "mic_emu/cli", "mic_emu/testing"))]
    assert not [n for n in names if n.endswith(".py")]


def test_hw_40_patched_ramdisk_words_do_not_break_the_checksum(built: bytes) -> None:
    """HW-40: the host patches 0x218 and 0x21C; the header reads them and the image stays valid."""
    patched = bytearray(built)
    patched[0x218:0x220] = (0x0800_0000).to_bytes(4, "little") + (4711).to_bytes(4, "little")
    h = parse_header(bytes(patched))
    assert (h.ramdisk_addr, h.ramdisk_len) == (0x0800_0000, 4711)
    assert parse_header(built).ramdisk_len == 0


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda b: b[:100], "the image is too short: 100 bytes, its header alone has 4096"),
        (lambda b: b"", "the image is too short: 0 bytes, its header alone has 4096"),
        (
            lambda b: b"BZh91AY&" + b[8:],
            "not a micos image: it begins with b'BZh91AY&', not b'MICOS1\\x00\\x00'",
        ),
        (lambda b: b[:-1], "the image is truncated: {short} bytes, its header says {whole}"),
        (
            lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            "the image is corrupt: its checksum does not match its content",
        ),
        (
            lambda b: b"\x7fELF" + b[4:],
            "an ELF kernel is not supported by this version: use a micos image (the default)",
        ),
        (
            lambda b: rehead(b, lambda h: replace(h, pyc_magic=b"\1\2\r\n", python="cpython-39")),
            f"the image was built for cpython-39, this is {sys.implementation.cache_tag}: "
            "build it again with this Python",
        ),
        (
            lambda b: b[:8] + b"\x09" + b[9:],
            "the image has format 9, this version of micemu starts format 1 only",
        ),
    ],
)
def test_bad_images_get_one_sentence(built: bytes, damage: Callable[[bytes], bytes], sentence: str) -> None:
    """Each thing that can be wrong with an image has its own sentence."""
    with pytest.raises(ImageError) as e:
        parse_header(damage(built))
    assert str(e.value) == sentence.format(short=len(built) - 1, whole=len(built))


@pytest.mark.parametrize("field", range(8, 88))
def test_any_wrong_header_byte_is_refused_or_harmless(built: bytes, field: int) -> None:
    """No header byte can make the checks fail in an unforeseen way."""
    for value in (0x00, 0x7F, 0xFF):
        bad = bytearray(built)
        bad[field] = value
        try:
            h = parse_header(bytes(bad))
        except ImageError:
            continue
        assert h.payload_offset + h.payload_len <= len(built)


def test_image_is_cached_by_content_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second build is the first one's file; a damaged cache entry is rebuilt; few are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = image.built_in(Path("/nonexistent"))
    ino = first.stat().st_ino
    assert image.built_in(Path("/nonexistent")) == first
    assert first.stat().st_ino == ino
    for n in range(image.KEEP_IMAGES + 5):
        old = first.with_name(f"micos-{n:032}.img")
        old.write_bytes(b"")
        os.utime(old, (n, n))
    first.write_bytes(first.read_bytes()[:5000])
    assert image.built_in(Path("/nonexistent")) == first
    parse_header(first.read_bytes())
    assert len(list(first.parent.iterdir())) == image.KEEP_IMAGES


def test_unwritable_cache_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache directory the image lies in the fallback directory."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert image.built_in(tmp_path / "run").parent == tmp_path / "run"


def test_concurrent_builders_all_get_a_whole_image(tmp_path: Path) -> None:
    """Eight processes that build at once each read a valid image and leave one file."""
    code = (
        "from pathlib import Path; from mic_emu import image; "
        "p = image.built_in(Path('/nonexistent')); image.parse_header(p.read_bytes()); print(p)"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    with ThreadPoolExecutor(8) as pool:
        runs = [
            pool.submit(subprocess.run, [sys.executable, "-c", code], env=env, capture_output=True, text=True)
            for _ in range(8)
        ]
    assert {r.result().returncode for r in runs} == {0}, [r.result().stderr for r in runs]
    assert len({r.result().stdout for r in runs}) == 1
    assert len(list((tmp_path / "micemu").iterdir())) == 1


PROBE = b"""
import sys
def main():
    import mic_emu, mic_emu._native
    from mic_emu.memory import PAGE
    print(mic_emu.__file__, mic_emu._native.__file__, sys.argv[1], PAGE)
    return 7
"""


def test_the_card_runs_the_downloaded_bytes(built: bytes) -> None:
    """Modules and native code come from the image in memory; main gets its arguments."""
    with zipfile.ZipFile(io.BytesIO(built[HEADER_SIZE:])) as z:
        files = [
            (n, z.read(n)) for n in z.namelist() if n not in ("__main__.pyc", "mic_emu/card/os/main.pyc")
        ]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in files:
            z.writestr(name, content)
        z.writestr("mic_emu/card/os/main.py", PROBE)
    img = image.pack_image(out.getvalue())
    h = parse_header(img)
    fd = image.payload_memfd(memoryview(img)[h.payload_offset :])
    assert hashlib.sha256(os.pread(fd, h.payload_len, 0)).digest() == h.sha256
    with pytest.raises(OSError, match="not permitted"):
        os.write(fd, b"x")
    path, argv, env = image.start_command(fd, ["hello"])
    run = subprocess.run(argv, executable=path, env=env, pass_fds=[fd], capture_output=True, text=True)
    os.close(fd)
    assert run.returncode == 7, run.stderr
    package, native, arg, page = run.stdout.split()
    assert package == f"/proc/self/fd/{fd}/mic_emu/__init__.pyc"
    assert native.startswith("/proc/self/fd/")
    assert (arg, page) == ("hello", "4096")


def test_image_file_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache directory is the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert stat.S_IMODE(image.built_in(Path("/x")).parent.stat().st_mode) == 0o700
