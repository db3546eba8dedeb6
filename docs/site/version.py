"""The version that the site is about, at the foot of each page."""

from __future__ import annotations

import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

VERSION = Path(__file__).parents[2] / "nflows_mongeampere" / "version.py"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """MkDocs calls this with the settings of the site."""
    config.copyright = f"nflows-mongeampere {runpy.run_path(str(VERSION))['__version__']}"
    return config
