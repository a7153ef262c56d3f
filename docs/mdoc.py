"""Manual pages on the documentation site: the macros of mdoc(7) that docs/man uses, as Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

FONTS = {
    "Fa": "*{}*", "Va": "`{}`", "Ar": "*{}*", "Dv": "`{}`", "Er": "`{}`", "Ev": "`{}`", "Pa": "`{}`", "Ql": "`{}`",
    "Sy": "**{}**", "Nm": "**{}**", "Fn": "`{}()`", "Nd": "— {}",
}  # fmt: skip
CLOSING = ".,:;)"


def _inline(words: list[str], page: str) -> str:
    """Macros and text of one line."""
    out: list[str] = []
    font, args = "", []

    def flush() -> None:
        if font == "Xr":
            out.append(
                f"[{args[0]}({args[1]})](#{args[0].lower()})"
                if args[0].startswith("scif")
                else f"{args[0]}({args[1]})"
            )
        elif font == "Rv":
            out.append("0 on success, -1 with `errno` set on failure.")
        elif font == "Bq":
            out.append(" ".join(args))
        elif font and (args or font == "Nm"):
            out.append(FONTS[font].format(" ".join(args) or page))
        else:
            out.extend(args)

    for word in words:
        if word in FONTS or word in ("Xr", "Rv", "Pq", "Bq", "Ta"):
            flush()
            font, args = word, []
            if word in ("Pq", "Bq"):
                font = ""
                out.append("(" if word == "Pq" else "")
            if word == "Ta":
                font = ""
                out.append("|")
        elif word in CLOSING and len(word) == 1:
            flush()
            out.append("\b" + word)  # joined to the word before
            font, args = "", []
        else:
            args.append(word)
    flush()
    text = " ".join(w for w in out if w)
    if "Pq" in words:
        text = (
            text.replace("( ", "(", 1) + ")"
            if not text.endswith(CLOSING)
            else text.replace("( ", "(", 1)[:-1] + ")" + text[-1]
        )
    return re.sub(r" ?\x08", "", text)


def _plain(line: str) -> str:
    return line.replace(r"\-", "-").replace("<", "&lt;")


def _prototype(kind: str, fn: str, args: list[str]) -> str:
    return f"{kind}{'' if kind.endswith('*') else ' '}{fn}({', '.join(args)});"


class _Page:
    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.name = ""

    def names(self) -> list[str]:
        """What the page is about, from its NAME section."""
        return [line.split()[1].lower() for line in self.lines if re.match(r"\.Nm scif\w* ?,?$", line)]

    def markdown(self) -> Iterator[str]:
        code: list[str] = []
        kind, fo, fo_args = "", "", []
        lists: list[str] = []
        literal = False
        section = ""
        for line in self.lines:
            if literal and not line.startswith(".Ed"):
                yield line
                continue
            if not line.startswith("."):
                yield _plain(line)
                continue
            word, *rest = shlex.split(line[1:].replace("'", r"\'")) or [""]
            if word in ("Dd", "Os", "Bd") or word == "":
                literal = word == "Bd"
                if literal:
                    yield "\n```c"
            elif word == "Ed":
                literal = False
                yield "```\n"
            elif word == "Dt":
                self.name = rest[0].lower() if rest[0] != "SCIF_GET_NODEIDS" else "scif_get_nodeIDs"
                yield f"## {self.name}\n"
                # Links to the other functions of the page lead here, too.
                yield from (f"({name})=\n" for name in self.names() if name != self.name)
            elif word in ("Sh", "Ss"):
                if code:
                    yield "```c\n" + "\n".join(code) + "\n```\n"
                    code = []
                section = " ".join(rest)
                if section not in ("NAME", "LIBRARY", "SYNOPSIS", "SEE ALSO"):
                    yield f"\n{'###' if word == 'Sh' else '####'} {section.capitalize()}\n"
                elif section == "SEE ALSO":
                    yield "\nSee also: "
            elif section in ("NAME", "LIBRARY", "SYNOPSIS") and word in ("Nm", "Pp"):
                yield _inline([word, *rest], self.name).replace("\b", "") if word == "Nm" else ""
            elif word == "In":
                code.append(f"#include <{rest[0]}>\n")
            elif word == "Ft":
                kind = " ".join(rest)
            elif word == "Fn" and section == "SYNOPSIS":
                code.append(_prototype(kind, rest[0], rest[1:]))
            elif word == "Fo":
                fo, fo_args = rest[0], []
            elif word == "Fa" and fo:
                fo_args.append(rest[0])
            elif word == "Fc":
                code.append(_prototype(kind, fo, fo_args))
                fo = ""
            elif word == "Pp":
                yield ""
            elif word == "Bl":
                lists.append(rest[0])
                yield "\n| | |\n|---|---|" if rest[0] == "-column" else ""
            elif word == "El":
                lists.pop()
                yield ""
            elif word == "It":
                text = _inline(rest, self.name)
                if lists[-1] == "-column":
                    yield f"| {text} |" if "|" in text else f"| {text} | |"
                else:
                    yield f"\n{text}\n: "
            else:
                yield _inline([word, *rest], self.name)


def to_markdown(source: str) -> str:
    """The page as Markdown; it starts with a heading of level 2 that carries its name."""
    text = "\n".join(_Page(source).markdown())
    text = re.sub(r"\n: \n+", "\n: ", text)
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"
