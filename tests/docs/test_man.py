"""The manual pages of libscif say what the header says."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAN = ROOT / "docs/man"
PAGES = sorted(MAN.glob("man?/*"))
SOURCES = [p for p in PAGES if not p.read_text().startswith(".so ")]
HEADER = (ROOT / "native/include/scif.h").read_text()
sys.path.insert(0, str(ROOT / "docs"))


def header_prototypes() -> dict[str, str]:
    return {
        match[2]: re.sub(r"\s+", " ", f"{match[1]}{match[2]}({match[3]});")
        for match in re.finditer(r"^MICACCESSAPI ([\w ]+[ *])(scif_\w+)\(([^)]*)\);", HEADER, re.M)
    }


def man_prototypes() -> dict[str, str]:
    import mdoc

    return {
        match[2]: match[0]
        for page in SOURCES
        for match in re.finditer(r"^(\w+ \*?)(scif_\w+)\(.*\);$", mdoc.to_markdown(page.read_text()), re.M)
    }


def test_every_function_has_a_page_and_its_prototype():
    functions = set(re.findall(r"scif_\w+", (ROOT / "native/libscif/libscif.map").read_text()))
    assert {p.stem for p in PAGES if p.suffix == ".3"} == functions == set(header_prototypes())
    assert man_prototypes() == header_prototypes()


def test_aliases_lead_to_the_page_that_names_them():
    aliases = set(PAGES) - set(SOURCES)
    assert aliases
    for page in aliases:
        target = MAN / page.read_text().split()[1]
        assert f".Nm {page.stem}" in target.read_text(), page


@pytest.mark.parametrize("page", SOURCES, ids=lambda p: p.stem)
def test_pages_name_only_errors_and_constants_that_exist(page: Path):
    text = page.read_text()
    unknown = [e for e in re.findall(r"\bEr (E[A-Z]+)", text) if not hasattr(errno, e)]
    unknown += [c for c in re.findall(r"\bDv (SCIF_\w+)", text) if not re.search(rf"\b{c}\b", HEADER)]
    assert not unknown
    references = set(re.findall(r"\.Xr (scif\w*) (\d)", text))
    assert {(p.stem, p.suffix[1:]) for p in PAGES} >= references


@pytest.mark.parametrize("page", SOURCES, ids=lambda p: p.stem)
def test_pages_are_markdown_on_the_site(page: Path):
    import mdoc

    text = mdoc.to_markdown(page.read_text())
    assert text.startswith(f"## {page.stem}\n")
    assert not re.search(r"^\.[A-Z]|\b(Bq|Pq|Xr|Dv|Fa) ", text, re.M)
    assert text.count("```") % 2 == 0


def test_links_between_pages_lead_somewhere():
    """Also to the functions that share another's page. Sphinx does not complain: links to files of the repository are allowed."""
    import mdoc

    site = "\n".join(mdoc.to_markdown(p.read_text()) for p in SOURCES)
    targets = set(re.findall(r"^## (\w+)$|^\((\w+)\)=$", site, re.M))
    names = {name.lower() for pair in targets for name in pair if name}
    assert {t.lower() for t in re.findall(r"\]\(#(\w+)\)", site)} <= names


@pytest.mark.peer("mandoc")
@pytest.mark.parametrize("page", SOURCES, ids=lambda p: p.stem)
def test_pages_pass_mandoc(page: Path):
    # Pages of other projects (fork(2), ...) need not be installed: only what concerns this file.
    run = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True, cwd=MAN
    )
    assert run.returncode == 0, run.stdout + run.stderr
