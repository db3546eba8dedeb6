"""Pictures get their text as a caption, and lead to their full size."""

from __future__ import annotations

import re

PICTURE = re.compile(r'<p>(<img alt="([^"]*)" src="([^"]*)" ?/?>)</p>')
FIGURE = r'<figure><a href="\3">\1</a><figcaption>\2</figcaption></figure>'


def on_page_content(content: str, **_: object) -> str:
    """MkDocs calls this with the HTML of each page."""
    return PICTURE.sub(FIGURE, content)
