"""The emulator's own network on the host side: which mode works here, and its namespaces."""

from __future__ import annotations

import errno
import os
from typing import Any

from mic_emu import netif, netns
from mic_emu.errors import MicemuError
from mic_emu.log import Log
from mic_emu.netif import NetError
from mic_emu.virtio.net import card_address, host_address


class Network:
    """One per instance; the namespaces are made when the first card needs them.

    Modes, best first: ``ns`` (TAPs in namespaces of our own), ``responder`` (a user-space host on each
    side), and on request ``tap`` (a TAP in the real network).
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self._ns: netns.Namespaces | None = None
        self._probe: netns.Probe | None = None

    def prepare(self, index: int, wanted: str) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
        """Arguments, descriptors and facts for the net backend of card ``index``.

        Raises MicemuError when the wanted mode cannot work, with the fix.
        """
        mode, why = self._mode(wanted)
        args = {
            "mode": mode, "name": f"mic{index}", "address": host_address(index), "lease": card_address(index),
            "mac": card_mac(index), "host_mac": host_mac(index),
        }  # fmt: skip
        facts: dict[str, Any] = {"mode": mode}
        if why:
            facts["why"] = why
        fds: list[int] = []
        if mode == "ns":
            try:
                namespaces = self._namespaces()
            except NetError as e:
                raise MicemuError(f"mic{index}: --net ns: {e.strerror}", e.errno or errno.EIO) from e
            fds = [os.dup(namespaces.user_fd), os.dup(namespaces.net_fd)]
        return args, fds, facts

    def check(self, index: int, wanted: str) -> None:
        """Raise MicemuError when mode ``wanted`` cannot work for card ``index``, with the fix."""
        if wanted != "tap":
            self._mode(wanted)
            return
        try:
            netif.open_tap(f"mic{index}").close()
        except NetError as e:
            raise MicemuError(f"mic{index}: --net tap: {e.strerror}", e.errno or errno.EIO) from e

    def _mode(self, wanted: str) -> tuple[str, str]:
        if wanted in ("responder", "tap"):
            return wanted, ""
        if self._probe is None:
            self._probe = netns.probe()
        if self._probe.mode == "ns":
            return "ns", ""
        if wanted == "ns":
            raise MicemuError(f"--net ns does not work here: {self._probe.reason}", self._probe.errno)
        return "responder", self._probe.reason

    def _namespaces(self) -> netns.Namespaces:
        if self._ns is None:
            self._ns = netns.create()
        return self._ns

    def namespace_fds(self) -> list[int]:
        """Descriptors of the user and net namespace, for ``micemu run host``; none without them."""
        return [self._ns.user_fd, self._ns.net_fd] if self._ns else []

    def close(self) -> None:
        """The namespaces go with the last process inside."""
        if self._ns:
            self._ns.close()
            self._ns = None


def addresses(index: int) -> dict[str, str]:
    """Both ends of a card's network, as ``status --json`` shows them."""
    return {
        "host": host_address(index).partition("/")[0], "card": card_address(index).partition("/")[0],
        "host_mac": host_mac(index), "card_mac": card_mac(index),
    }  # fmt: skip


def card_mac(index: int) -> str:
    """The card's hardware address: locally administered, the same at every boot."""
    return f"02:4d:49:43:{index:02x}:01"


def host_mac(index: int) -> str:
    """The host end's hardware address."""
    return f"02:4d:49:43:{index:02x}:fe"
