"""Every block of Python in the README and the documentation runs as it stands."""

import contextlib
import importlib
import inspect
import re
import shutil
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"  # executed by `make docs`
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# those that train for long, and those with a test of their own
LONG = {
    "flow_matching.md-0",
    "inference.md-2",
    "lattices.md-0",
    "lattices.md-1",
    "lattices.md-2",
    "variational.md-1",
    "variational.md-2",
}
ELSEWHERE = {"pipeline.md-0"}
BLOCKS = [
    pytest.param(page, block, id=name, marks=[pytest.mark.long] if name in LONG else [])
    for page in PAGES
    if page.parent != NOTEBOOKS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    if (name := f"{page.name}-{number}") not in ELSEWHERE
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block_runs(page, block, tmp_path, monkeypatch):
    for table in page.parent.glob("*.csv"):  # what a page offers to download
        shutil.copy(table, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})


def anchors(page):
    """The places in a page that links may name: its headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and not anchor.startswith("nflows_mongeampere"):  # those are mkdocstrings'
            assert anchor in anchors(file), f"{page.name} links to {link}"


PUBLIC = ("", ".integration", ".potentials", ".targets", ".training")


def named(path):
    """What ``::: path`` of a page of the reference stands for."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            return reduce(getattr, parts[count:], importlib.import_module(".".join(parts[:count])))
    raise AssertionError(path)


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = [*map(named, re.findall(r"^::: (\S+)", text, re.MULTILINE))]
    whole = {entry.__name__ for entry in entries if inspect.ismodule(entry)}
    for name in PUBLIC:
        module = importlib.import_module("nflows_mongeampere" + name)
        for public in set(module.__all__) - {"__version__"}:
            thing = getattr(module, public)
            home = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None)
            assert home in whole or any(thing is entry for entry in entries), public
