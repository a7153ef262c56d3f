"""micos images: what the host downloads and the board starts.

An image is a 4096-byte header and a payload. The payload is a zip (stored) with the compiled
modules that the card needs and the native extension, so the code that runs on the card really is
the bytes that were downloaded. The host patches the ramdisk's address and size into the header
(HW-40), as into an x86 boot header; the checksum therefore covers the payload only.

The package's own image is built on first use and cached under the hash of what goes into it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import marshal
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mic_emu import layout
from mic_emu.errors import MicemuError
from mic_emu.rundir import base_dir

MAGIC = b"MICOS1\0\0"
VERSION = 1
HEADER_SIZE = 4096
LOG_LEN_OFFSET = layout.CONSTANTS["CARD_LOG"]  # card physical: u32 length in bytes, then the text
LOG_TEXT_OFFSET = LOG_LEN_OFFSET + 4
LOG_CAPACITY = layout.CONSTANTS["CARD_LOG_SIZE"] - 4
KEEP_IMAGES = 8

# magic, version, header size, payload offset, payload length, SHA-256 of the payload, GDDR offsets of
# the log's length word and text, room for text, Python's bytecode magic, Python's tag.
_HEADER = struct.Struct("<8sIIQQ32sQQI4s32s")
_RAMDISK = struct.Struct("<II")
_PACKAGES = ("", "scif", "cosm", "vop", "virtio")
_STUB = (
    "import sys; sys.path.insert(0, '/proc/self/fd/' + sys.argv[1]); "
    "from mic_emu.card.os.bootstrap import start; start()"
)


class ImageError(MicemuError):
    """The bytes are no image that this board can start (ENOEXEC)."""

    def __init__(self, why: str) -> None:
        super().__init__(why, 8)


@dataclass(frozen=True)
class ImageHeader:
    """Fields of a micos header. Offsets and lengths in bytes; log offsets are card physical."""

    payload_offset: int
    payload_len: int
    sha256: bytes
    log_len_offset: int
    log_text_offset: int
    log_capacity: int
    pyc_magic: bytes
    python: str
    ramdisk_addr: int = 0
    ramdisk_len: int = 0

    def pack(self) -> bytes:
        """The header's 4096 bytes."""
        head = bytearray(HEADER_SIZE)
        _HEADER.pack_into(
            head,
            0,
            MAGIC,
            VERSION,
            HEADER_SIZE,
            self.payload_offset,
            self.payload_len,
            self.sha256,
            self.log_len_offset,
            self.log_text_offset,
            self.log_capacity,
            self.pyc_magic,
            self.python.encode(),
        )
        _RAMDISK.pack_into(head, layout.CONSTANTS["BOOT_RAMDISK_IMAGE"], self.ramdisk_addr, self.ramdisk_len)
        return bytes(head)

    def check_payload(self, payload: bytes | memoryview) -> None:
        """Raises ImageError when the checksum is wrong."""
        if hashlib.sha256(payload).digest() != self.sha256:
            raise ImageError("the image is corrupt: its checksum does not match its content")


def parse_header(image: bytes | memoryview, image_len: int | None = None) -> ImageHeader:
    """Check an image and return its header.

    image:      the image from its first byte; with ``image_len`` (its whole length) only the header is
                needed, and the payload's checksum is not looked at
    Raises ImageError, one sentence for each thing that can be wrong.
    """
    head = bytes(image[:HEADER_SIZE])
    total = len(image) if image_len is None else image_len
    if head[:4] == b"\x7fELF":
        raise ImageError("an ELF kernel is not supported by this version: use a micos image (the default)")
    if len(head) < HEADER_SIZE:
        raise ImageError(f"the image is too short: {len(head)} bytes, its header alone has {HEADER_SIZE}")
    (magic, version, size, off, length, digest, log_len, log_text, log_room, pyc, tag) = _HEADER.unpack_from(
        head
    )
    if magic != MAGIC:
        raise ImageError(f"not a micos image: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION or size != HEADER_SIZE:
        raise ImageError(
            f"the image has format {version}, this version of micemu starts format {VERSION} only"
        )
    if off < HEADER_SIZE or length == 0 or off + length > total:
        raise ImageError(f"the image is truncated: {total} bytes, its header says {off + length}")
    python = tag.rstrip(b"\0").decode("ascii", "replace")
    ramdisk_addr, ramdisk_len = _RAMDISK.unpack_from(head, layout.CONSTANTS["BOOT_RAMDISK_IMAGE"])
    header = ImageHeader(
        off, length, digest, log_len, log_text, log_room, pyc, python, ramdisk_addr, ramdisk_len
    )
    if pyc != importlib.util.MAGIC_NUMBER:
        raise ImageError(
            f"the image was built for {python or 'another Python'}, "
            f"this is {sys.implementation.cache_tag}: build it again with this Python"
        )
    if image_len is None:
        header.check_payload(memoryview(image)[off : off + length])
    return header


# --- Build -------------------------------------------------------------------------------------


def _origin(module: str) -> Path:
    """The file of an importable module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MicemuError(f"{module} is not installed: run make build")
    return Path(spec.origin)


def _sources() -> Iterator[tuple[str, Path]]:
    """(name in the zip, file) of everything that goes into the payload, sorted per folder."""
    shared, card, native = (_origin(name) for name in ("mic_emu", "mic_emu.card", "mic_emu._native"))
    shared, card = shared.parent, card.parent
    for package in _PACKAGES:
        for path in sorted((shared / package).glob("*.py")):
            yield str(Path("mic_emu", package, path.name)), path
    for path in sorted(card.rglob("*.py")):
        yield str(Path("mic_emu/card") / path.relative_to(card)), path
    yield "mic_emu/_native.abi3.so", native


def _compiled(source: bytes, path: Path) -> bytes:
    """A .pyc that is never checked against a source file."""
    code: bytes | None = None
    try:
        cached = Path(importlib.util.cache_from_source(str(path))).read_bytes()
        st = path.stat()
        stamp = struct.pack("<III", 0, int(st.st_mtime) & 0xFFFFFFFF, st.st_size & 0xFFFFFFFF)
        if cached[:4] == importlib.util.MAGIC_NUMBER and cached[4:16] == stamp:
            code = cached[16:]
    except (OSError, NotImplementedError):
        pass
    if code is None:
        code = marshal.dumps(compile(source, str(path), "exec", dont_inherit=True))
    return importlib.util.MAGIC_NUMBER + struct.pack("<I", 1) + importlib.util.source_hash(source) + code


def _payload(files: Sequence[tuple[str, Path, bytes]]) -> bytes:
    import zipfile

    main = b"from mic_emu.card.os.bootstrap import start\nstart()\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for name, path, content in [*files, ("__main__.py", Path("micos/__main__.py"), main)]:
            if name.endswith(".py"):
                name, content = name + "c", _compiled(content, path)
            z.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def pack_image(payload: bytes) -> bytes:
    """Header and payload of a micos image for this Python."""
    header = ImageHeader(
        payload_offset=HEADER_SIZE,
        payload_len=len(payload),
        sha256=hashlib.sha256(payload).digest(),
        log_len_offset=LOG_LEN_OFFSET,
        log_text_offset=LOG_TEXT_OFFSET,
        log_capacity=LOG_CAPACITY,
        pyc_magic=importlib.util.MAGIC_NUMBER,
        python=sys.implementation.cache_tag or "",
    )
    return header.pack() + payload


def cache_dir(fallback: Path) -> Path:
    """``$XDG_CACHE_HOME/micemu`` or ``~/.cache/micemu`` where we may write, else ``fallback``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for path in (Path(base) / "micemu", fallback):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(path, os.W_OK | os.X_OK) and path.stat().st_uid == os.geteuid():
            return path
    raise MicemuError(f"neither {base} nor {fallback} can hold the card's image: set XDG_CACHE_HOME")


def built_in(fallback: Path | None = None) -> Path:
    """Path of the package's own image, built now if there is none for this code yet.

    fallback: directory for it when there is no writable cache directory (default: among the run
              directories)
    Builders may race; each sees a whole image. Raises MicemuError, OSError (ENOSPC).
    """
    files = [(name, path, path.read_bytes()) for name, path in _sources()]
    h = hashlib.sha256(f"{VERSION} {sys.version}".encode())
    for name, path, content in files:
        h.update(f"\0{name}\0{path}\0{len(content)}\0".encode())
        h.update(content)
    where = cache_dir(fallback or base_dir() / ".cache")
    path = where / f"micos-{h.hexdigest()[:32]}.img"
    try:
        with path.open("rb") as f:
            parse_header(f.read(HEADER_SIZE), os.fstat(f.fileno()).st_size)
        os.utime(path)
        return path
    except (FileNotFoundError, ImageError):
        pass
    new = where / f".{path.name}.{os.getpid()}.{time.monotonic_ns()}"
    try:
        new.write_bytes(pack_image(_payload(files)))
        new.rename(path)
    except OSError as e:
        new.unlink(missing_ok=True)
        raise OSError(e.errno, f"cannot write the card's image: {e.strerror}", str(path)) from e
    _prune(where)
    return path


def _prune(where: Path) -> None:
    """Keep the images that were used last; drop what builders that died left an hour ago."""
    ages: list[tuple[float, Path]] = []
    for p in [*where.glob("micos-*.img"), *where.glob(".micos-*")]:
        try:
            ages.append((p.stat().st_mtime, p))
        except FileNotFoundError:
            continue
    ages.sort(reverse=True)
    images = [p for _, p in ages if not p.name.startswith(".")]
    dead = [p for age, p in ages if p.name.startswith(".") and age < time.time() - 3600]
    for p in [*images[KEEP_IMAGES:], *dead]:
        p.unlink(missing_ok=True)


# --- Start -------------------------------------------------------------------------------------


def payload_memfd(payload: bytes | memoryview) -> int:
    """A sealed memory file with the payload; inheritable, for ``start_command``."""
    import fcntl

    fd = os.memfd_create("micos", os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(payload)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, 1033, 0x1 | 0x2 | 0x4 | 0x8)  # F_ADD_SEALS: seal, shrink, grow, write
    except BaseException:
        os.close(fd)
        raise
    return fd


def start_command(
    payload_fd: int, args: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> tuple[str, list[str], dict[str, str]]:
    """What the board executes: ``os.execve(*start_command(...))``.

    payload_fd:  from ``payload_memfd``; it must be inherited, as must descriptors named in ``args``
    args:        become ``sys.argv[1:]`` of ``mic_emu.card.os.main.main``
    The interpreter, its standard library, ``_cffi_backend`` and ``posix_ipc`` are the host's.
    """
    extensions = os.pathsep.join(
        dict.fromkeys(str(_origin(m).parent) for m in ("_cffi_backend", "posix_ipc"))
    )
    installed = os.pathsep.join((os.path.dirname(os.path.dirname(os.path.abspath(__file__))), sys.prefix))
    argv = [sys.executable, "-I", "-S", "-B", "-c", _STUB, str(payload_fd), extensions, installed, *args]
    return sys.executable, argv, dict(os.environ if env is None else env)
