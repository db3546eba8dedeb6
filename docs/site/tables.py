"""Error bars stay on the line of their values."""

from __future__ import annotations


def on_page_content(content: str, **_: object) -> str:
    """MkDocs calls this with the HTML of each page."""
    return content.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
