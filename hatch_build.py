"""What the metadata of a release takes from the repository: its addresses, and README.md.

Links and pictures of README.md are relative, which suits a clone and the site. On a package index
they would lead nowhere, so that there they name the files of the release's tag, v0.2.0, say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?:)(?P<target>[^)\s]+)\)")


def absolute(text: str, repository: str, tag: str) -> str:
    """README.md with the relative links and pictures made absolute."""

    def replace(link: re.Match[str]) -> str:
        target = link["target"]
        if target.startswith("#"):
            target = "README.md" + target
        view = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({repository}/{view}/{tag}/{target})"

    return LINK.sub(replace, text)


class ReleaseMetadata(MetadataHookInterface):
    """Fills in ``urls`` and ``readme``, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository, tag = self.config["repository"], f"v{metadata['version']}"
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": f"{repository}/blob/{tag}/docs/index.md",
            "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(readme, repository, tag),
        }
