"""The version that the site is about, and its day, at the foot of each page."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

VERSION = Path(__file__).parents[2] / "nflows_mongeampere" / "version.py"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """MkDocs calls this with the settings of the site."""
    config.copyright = f"nflows-mongeampere {runpy.run_path(str(VERSION))['__version__']}{_day()}"
    return config


def _day() -> str:
    """That of the last commit; nothing outside of a clone."""
    command = ["git", "-C", str(VERSION.parent), "log", "-1", "--format=, %cs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
