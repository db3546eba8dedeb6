"""The roles and directives of our docstrings in the Markdown that the pages are made of."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([^`]+)`")
MATHS = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *$))*)", re.MULTILINE)
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: griffe.Object) -> str:
    """Formulas in dollars, names as links, an entry for each of several names."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = SHARED.sub(_each, text)
    text = MATHS.sub(_block, text)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r"`([^`<]+?)\s+<(https?://[^>]+)>`_+", r"[\1](\2)", text)
    return ROLE.sub(lambda found: _name(found[1], found[2], obj), text)


def _each(found: re.Match[str]) -> str:
    indent, names, description = found.groups()
    return "\n".join(f"{indent}{name}: {description}" for name in names.split(", "))


def _block(found: re.Match[str]) -> str:
    formula = " ".join(textwrap.dedent(found[2]).split())
    return f"{found[1]}$${formula}$$\n\n"


def _name(short: str, name: str, obj: griffe.Object) -> str:
    shown = name.rsplit(".", 1)[-1] if short else name
    if name.startswith("nflows_mongeampere."):
        return f"[`{shown}`][{name}]"
    holder = obj if obj.is_class else obj.parent
    member = None if holder is None or not holder.is_class else holder.members.get(name)
    if holder is not None and member is not None and member.docstring and name[0] != "_":
        return f"[`{shown}`][{holder.path}.{name}]"
    return f"`{shown}`"
