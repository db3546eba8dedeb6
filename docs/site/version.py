"""The version that the site is about, its day and its repository, at the foot of each page."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).parents[2]
VERSION = ROOT / "nflows_mongeampere" / "version.py"
REPOSITORY = re.compile(r'^repository = "([^"]+)"', re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """MkDocs calls this with the settings of the site."""
    version = runpy.run_path(str(VERSION))["__version__"]
    found = REPOSITORY.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    config.copyright = f'<a href="{found[1]}">nflows-mongeampere</a> {version}{_day()}'
    return config


def _day() -> str:
    """That of the last commit; nothing outside of a clone."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=, %cs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
