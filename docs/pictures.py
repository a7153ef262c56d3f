"""Draws docs/pictures/*.svg from an emulator that it boots: ``make pictures``.

Positions and words are ours; times, addresses, indices and offsets are what the running system said.
"""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mic_emu.testing.machine import Machine, eventually

OUT = Path(__file__).parent / "pictures"
INK, PAPER, HOST, CARD, LINK = "#1f2933", "#ffffff", "#dbeafe", "#dcfce7", "#b45309"

WINDOW_OWNER = """
from mic_emu import scif
with scif.Endpoint() as listener:
    listener.bind(2500)
    listener.listen()
    conn, _ = listener.accept()
    with conn:
        windows = [conn.register(scif.alloc(4096 * pages)) for pages in (2, 1)]
        conn.send(b"r")
        try:
            conn.recv(1)
        except scif.ScifError:  # the user has gone
            pass
"""
WINDOW_USER = """
import sys
from mic_emu import scif
ep = scif.Endpoint()
while True:
    try:
        ep.connect((1, 2500))
        break
    except scif.ScifError:  # nobody listens yet
        pass
ep.recv(1)
mapping = ep.mmap(0x4000000000000000, 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


class Svg:
    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.items: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str, label: str = "") -> None:
        self.items.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" fill="{fill}" stroke="{INK}"/>'
        )
        if label:
            self.text(x + w / 2, y + h / 2 + 4, label, "middle")

    def text(self, x: float, y: float, words: str, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.items.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{html.escape(words)}</text>')

    def line(
        self, x1: float, y1: float, x2: float, y2: float, arrow: bool = False, dashed: bool = False
    ) -> None:
        extra = ' marker-end="url(#a)"' if arrow else ""
        extra += ' stroke-dasharray="3 3"' if dashed else ""
        colour = LINK if arrow else INK
        self.items.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"{extra}/>')

    def save(self, name: str, title: str) -> None:
        width, height = self.size
        marker = '<marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        marker += f'<path d="M0,0 L8,4 L0,8 z" fill="{LINK}"/></marker>'
        (OUT / f"{name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="12" fill="{INK}" role="img">\n<title>{html.escape(title)}</title>\n<defs>{marker}</defs>\n'
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>\n'
            + "\n".join(self.items)
            + "\n</svg>\n"
        )


def _device(record: dict[str, Any]) -> str:
    name = str(record.get("device", ""))
    return "" if record["message"].startswith(name) else name


def boot(machine: Machine) -> None:
    """Who did what when, from the log of the boot."""
    records = [json.loads(line) for line in machine.micemu("log", "--json").stdout.splitlines()]
    start = next(r["time"] for r in records if r.get("event") == "state")
    rows = [r for r in records if r["time"] >= start and "Command line" not in r["message"]]
    svg = Svg(860, 70 + 26 * len(rows))
    lanes = {"host": 200.0, "micos": 560.0}
    for name, words in (("host", "host process (node 0)"), ("micos", "card OS (node 1)")):
        svg.text(lanes[name], 24, words, "middle", bold=True)
        svg.line(lanes[name], 34, lanes[name], 50 + 26 * len(rows), dashed=True)
    for i, record in enumerate(rows):
        y = 54 + 26 * i
        lane = lanes.get(record["process"], 200.0)
        words = " ".join(w for w in (_device(record), record["message"]) if w).split(", NBD at")[0]
        svg.text(56, y + 4, f"{(record['time'] - start) * 1000:.0f} ms", "end")
        svg.items.append(f'<circle cx="{lane}" cy="{y}" r="4" fill="{LINK}"/>')
        svg.text(lane + 10, y + 4, words)
    svg.save("boot", "The log of a boot, in milliseconds")


def vring(machine: Machine) -> None:
    """The receive ring of the network device: descriptors in host memory, buffers and used ring in card memory."""
    rings = json.loads(machine.micemu("dump", "vring", "mic0", "--json").stdout)
    ring = next(r for r in rings if r["device"].startswith("virtio1") and r["ring"] == 0)
    shown = ring["pending"][:6]
    svg = Svg(860, 330)
    svg.box(20, 40, 500, 270, HOST)
    svg.text(30, 60, f"host memory: ring block at {ring['block']:#x}", bold=True)
    svg.box(560, 40, 280, 270, CARD)
    svg.text(570, 60, "card memory (GDDR)", bold=True)
    svg.text(30, 84, "descriptor table")
    svg.text(30, 262, f"available ring: idx {ring['avail_idx']}, written by the card's driver")
    svg.text(30, 286, f"device has taken {ring['used_idx']}, {len(ring['pending'])} buffers wait for packets")
    for i, chain in enumerate(shown):
        d, y = chain[0], 92 + 25 * i
        svg.box(
            30, y, 280, 22, PAPER, f"[{d['index']}] addr {d['addr']:#x} len {d['len']} flags {d['flags']}"
        )
        svg.box(570, y, 180, 22, PAPER, f"buffer, {d['len']} bytes")
        svg.line(310, y + 11, 568, y + 11, arrow=True)
    svg.box(570, 262, 240, 30, PAPER, f"used ring at {ring['used']:#x}, idx {ring['used_idx']}")
    svg.text(
        20,
        24,
        f"{ring['device']} ring 0 of mic0: {ring['num']} entries; the backend writes packets straight into the buffers",
    )
    svg.save("vring", "A vring: descriptors in host memory, buffers in card memory")


def window(machine: Machine) -> None:
    """Two windows of a card program, one of them mapped by a host program."""

    def endpoint() -> Any:
        data = json.loads(machine.micemu("scif", "endpoints", "mic0", "--json").stdout)
        return next((e for e in data["endpoints"] if e["pid"] and len(e["windows"]) == 2), None)

    owner = machine.home / "owner.py"
    owner.write_text(WINDOW_OWNER)
    card = subprocess.Popen(
        [sys.executable, "-m", "mic_emu.cli", "run", "mic0", "--", sys.executable, str(owner)],
        env=machine.env, cwd=machine.home,
    )  # fmt: skip
    user = subprocess.Popen(
        [sys.executable, "-c", WINDOW_USER],
        env=machine.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert user.stdout is not None
    user.stdout.readline()
    end = eventually(endpoint, 10, "the windows")
    user.communicate("")
    card.wait(10)

    svg = Svg(860, 300)
    for x, words, colour in (
        (20, "program on the host", HOST),
        (310, "card memory (GDDR)", CARD),
        (600, "program on the card", CARD),
    ):
        svg.box(x, 40, 240, 240, colour)
        svg.text(x + 10, 60, words, bold=True)
    y = 80.0
    for w in end["windows"]:
        pages = w["length"] // 4096
        height = 34.0 * pages
        svg.box(610, y, 220, height, PAPER, f"its own pages, {pages * 4} KiB")
        svg.box(320, y, 220, height, PAPER, f"window {w['offset']:#x}")
        svg.line(610, y + height / 2, 542, y + height / 2, arrow=True)
        if y == 80:
            svg.box(30, y, 220, 34, PAPER, "scif_mmap, 4 KiB")
            svg.line(250, y + 17, 318, y + 17, arrow=True)
        y += height + 20
    svg.text(20, 24, "Both programs map the very same pages of card memory; no byte is copied")
    svg.save("window", "Two SCIF windows, one of them mapped by the peer")


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with Machine() as machine:
        machine.micemu("boot")
        eventually(lambda: "card is up" in machine.micemu("log").stdout, 10, "the card is up")
        boot(machine)
        vring(machine)
        window(machine)


if __name__ == "__main__":
    main()
