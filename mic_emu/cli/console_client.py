"""``micemu console``: attach the caller's terminal to a card's console.

The backend sends the card's bytes as they are; it takes messages of type u8, length u16 (little
endian) and that many bytes, as in ``native/include/mic/console.h``.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import string
import struct
from contextlib import ExitStack
from typing import Protocol

from mic_emu.cli import terminal
from mic_emu.errors import UsageError

_INPUT, _SIZE = 1, 2
_LINGER_MS = 500  # how long the card may be silent after the end of piped input
_KEY_NAMES = {"]": "Ctrl-]", "\\": "Ctrl-\\", "[": "Ctrl-[", "^": "Ctrl-^", "_": "Ctrl-_", "@": "Ctrl-@"}


def parse_key(text: str) -> bytes:
    """Detach key: ``^]`` or ``ctrl-]`` (any letter or one of ``@[\\]^_``), or ``none``.

    Raises UsageError.
    """
    word = text.strip().lower()
    if word == "none":
        return b""
    for prefix in ("ctrl-", "ctrl+", "c-", "^"):
        rest = word.removeprefix(prefix)
        if rest != word and len(rest) == 1 and (rest in string.ascii_letters or rest in "@[\\]^_"):
            return bytes([ord(rest.upper()) & 0x1F])
    raise UsageError(f"detach key {text!r}: use ^ and a letter or one of @[\\]^_, or none")


def key_name(key: bytes) -> str:
    """``Ctrl-]`` for b"\\x1d"."""
    letter = chr(key[0] | 0x40)
    return _KEY_NAMES.get(letter, f"Ctrl-{letter}")


def frames(kind: int, content: bytes) -> bytes:
    """Messages for the backend."""
    pieces = [content[i : i + 0xFFFF] for i in range(0, len(content), 0xFFFF)]
    return b"".join(struct.pack("<BH", kind, len(p)) + p for p in pieces)


class Watch(Protocol):
    """Of the card behind the console; ``look`` ends everything by an exception."""

    def fileno(self) -> int: ...
    def look(self) -> None: ...


def attach(sock: socket.socket, name: str, detach: bytes = b"\x1d", watch: Watch | None = None) -> bool:
    """Relay until the user detaches (True) or the console goes away (False).

    sock:    connected to the console backend; closed afterwards
    detach:  the key that ends it, b"" for none
    watch:   is asked to look when its descriptor is readable; what it raises comes out here
    The terminal is restored, whatever happens.
    """
    with sock, ExitStack() as stack:
        signals = stack.enter_context(
            terminal.caught((signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT, signal.SIGINT))
        )
        interactive = terminal.is_terminal(0)
        if interactive:
            how = f"detach with {key_name(detach)}" if detach else "no detach key"
            _say(f"Attached to the console of {name}, {how}.")
            # Undone first, so that the last line is printed in the mode it expects.
            stack.callback(_say, f"\nDetached from {name}.")
            raw = stack.enter_context(terminal.Raw(0))
        relay = _Relay(sock, signals, detach if interactive else b"", raw if interactive else None, watch)
        return relay.run()


def _say(text: str) -> None:
    poller = select.poll()
    poller.register(2, select.POLLOUT)
    if not poller.poll(0):
        return  # nobody reads the terminal: no reason to stay
    try:
        os.write(2, text.encode() + b"\n")  # unbuffered: nothing is left to fail at exit
    except OSError:
        pass  # the terminal has gone


class _Relay:
    def __init__(
        self, sock: socket.socket, signals: int, detach: bytes, raw: terminal.Raw | None, watch: Watch | None
    ) -> None:
        self.sock = sock
        self.signals = signals
        self.detach = detach
        self.raw = raw
        self.watch = watch
        self.output = b""  # messages that the backend did not take yet
        self.reading = True
        self.lost = False

    def run(self) -> bool:
        self.sock.setblocking(False)
        self.send_size()
        while True:
            events = self.poll()
            if not events and not self.reading:
                return True  # piped input ended and the card has nothing more to say
            if self.signals in events and self.on_signals():
                return True
            if self.watch and self.watch.fileno() in events:
                self.watch.look()
            if 0 in events and self.reading and self.on_input():
                return True
            if self.sock.fileno() in events and not self.on_socket():
                return self.lost

    def poll(self) -> set[int]:
        poller = select.poll()
        poller.register(self.signals, select.POLLIN)
        poller.register(self.sock, select.POLLIN | (select.POLLOUT if self.output else 0))
        if self.reading and len(self.output) < 0x10000:
            poller.register(0, select.POLLIN)
        if self.watch and self.watch.fileno() >= 0:
            poller.register(self.watch.fileno(), select.POLLIN)
        return {fd for fd, _ in poller.poll(None if self.reading or self.output else _LINGER_MS)}

    def on_signals(self) -> bool:
        """True when we are told to end."""
        for number in terminal.read_signals(self.signals):
            if number == signal.SIGWINCH:
                self.send_size()
            elif number == signal.SIGCONT:
                if self.raw:
                    self.raw.again()
                self.send_size()
            else:
                return True
        return False

    def send_size(self) -> None:
        rows, cols = terminal.window_size(0)
        if rows and cols:
            self.output += frames(_SIZE, struct.pack("<HH", cols, rows))

    def on_input(self) -> bool:
        """True when the user detaches or the terminal has gone."""
        try:
            typed = os.read(0, 4096)
        except OSError:
            typed = b""
        if not typed:
            self.reading = False
            return self.raw is not None
        keep, key, _ = typed.partition(self.detach) if self.detach else (typed, b"", b"")
        self.output += frames(_INPUT, keep)
        if key:
            self.flush()
        return bool(key)

    def on_socket(self) -> bool:
        """Move bytes; False when the backend has gone, or our terminal (``lost``)."""
        if not self.flush():
            return False
        try:
            shown = self.sock.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        try:
            with terminal.interruptible():
                terminal.write_all(1, shown)
        except terminal.Interrupted:
            return True  # the signal's turn comes now
        except OSError:
            self.lost = True
        return bool(shown) and not self.lost

    def flush(self) -> bool:
        try:
            while self.output:
                self.output = self.output[self.sock.send(self.output) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True
