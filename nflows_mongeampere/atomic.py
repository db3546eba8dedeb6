"""Files that are written atomically."""

from __future__ import annotations

import secrets
from pathlib import Path


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically: until it is complete, a reader finds the earlier one or none.

    Args:
        path: where to; an existing file is replaced.
        content: text, in UTF-8, or bytes.
    """
    target = Path(path)
    # a name of its own: two may write at once, and the target's may be as long as names can be
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
