"""Net backend: a TAP or a user-space responder on one side, the rings on the other; frames move in C."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict
from typing import Any

from mic_emu import layout as L
from mic_emu import netif, netns
from mic_emu._native import lib
from mic_emu.host.backends.common import BackendProcess, serve
from mic_emu.virtio import net

C = L.CONSTANTS


class Net(BackendProcess):
    """virtio-net; queue 0 to the card, queue 1 from it."""

    kind = C["VIRTIO_ID_NET"]
    num_vq = 2

    def __init__(self, args: dict[str, Any], fds: list[int]) -> None:
        super().__init__(args, fds)
        self.tap: netif.Tap | None = None
        self.responder: net.Responder | None = None
        self.dev: net.NetDevice | None = None
        self.capture: net.Capture | None = None
        self.capture_fd = -1
        if args["mode"] == "responder":
            self.responder = net.Responder(args["host_mac"], args["address"], args["lease"])
        else:
            if args["mode"] == "ns":
                netns.enter(*self.extra)  # one thread still: the C loop starts later
                netif.loopback_up()
                try:
                    netif.forward_ipv4()
                except OSError as e:
                    self.log.warning(f"cards do not reach each other through the host: {e}")
            self.tap = netif.open_tap(args["name"])
            netif.configure(args["name"], address=args["address"], mac=args["host_mac"])

    def features(self) -> int:
        return net.offered_features(self.args["personality"], offload=self.tap is not None)

    def config(self) -> bytes:
        return net.pack_config(self.args["mac"])

    def opened(self) -> None:
        if self.tap:
            net.prepare_tap(self.tap, self.features(), card=False)
        local = self.tap.fd if self.tap else self.responder
        assert local is not None
        self.dev = net.NetDevice(self.vdev, local)

    def handshake(self) -> None:
        offered = self.bottom.rings_offered
        super().handshake()
        if offered and self.rings_ready:
            self._negotiated()

    def _negotiated(self) -> None:
        """Follow what the card accepted of our features (VOP 4.4): it was written before the rings."""
        assert self.dev
        features = self.bottom.accepted_features()
        self.dev.accepted(features)
        if self.tap:
            net.prepare_tap(self.tap, features, card=False)

    def loop(self) -> int:
        assert self.dev
        return self.dev.run()

    def returned(self, rc: int) -> None:
        if rc == lib.MIC_RUN_LOCAL and self.dev:
            self.event(f"the TAP failed: {os.strerror(self.dev.error)}")
            self.done = True

    def stats(self) -> dict[str, Any]:
        counters = asdict(self.dev.stats()) if self.dev else {}
        if self.capture:
            counters["capture"] = self.capture.stats()
        return counters

    def request(self, op: str, msg: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if op == "pcap":
            return self._pcap(fds)
        if op == "ping":
            return self._ping(msg)
        return super().request(op, msg, fds)

    def _pcap(self, fds: list[int]) -> dict[str, Any]:
        """Capture into the descriptor that came along, or stop when none did."""
        assert self.dev
        result: dict[str, Any] = {}
        if self.capture:
            self.dev.capture(None)
            result = self.capture.stats()
            result["file_errno"] = result.pop("error")
            self.capture.close()
            os.close(self.capture_fd)
            self.capture = None
        if fds:
            self.capture_fd = fds[0]
            self.capture = net.Capture(fds[0])
            self.dev.capture(self.capture)
        return result

    def _ping(self, msg: dict[str, Any]) -> dict[str, Any]:
        """Ping from the responder, in a thread, because the loop must run meanwhile."""
        if self.responder is None:
            return {"error": "this network has a TAP: ping it with the system's ping"}
        responder, ident = self.responder, msg["id"]

        def work() -> None:
            try:
                got = responder.ping(
                    msg["target"], msg["count"], interval_s=msg["interval"], timeout_s=msg["timeout"]
                )
                self.channel.send({"reply": ident, "sent": got.sent, "rtts": got.rtts_s})
            except OSError as e:
                self.channel.send({"reply": ident, "error": str(e)})

        del msg["id"]  # the thread answers
        threading.Thread(target=work, daemon=True).start()
        return {}

    def close(self) -> None:
        if self.dev:
            self.dev.close()
        if self.capture:
            self.capture.close()
        if self.responder:
            self.responder.close()
        if self.tap:
            self.tap.close()


def main(args: dict[str, Any], fds: list[int]) -> int:
    """Entry point in the process that init forked."""
    return serve(Net, args, fds)
