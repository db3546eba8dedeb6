"""Formulas become MathML while the pages are built: no script, nothing to fetch."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
CAPITAL = re.compile(r"<mi>(&#x003(?:9[1-9A-F]|A[0-9]);)</mi>")
NAME = re.compile(r"(<mi>[a-z]{2,}</mi>)(?=<m(?:i|n|frac|sub|sup)\b)")
ORDINARY = re.compile(r'<mo(?: (?:stretchy|fence|form)="[a-z]*")*>(&#x0(?:007C|002F|2016);)</mo>')
PRIMED = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>(&#x0203[2-4];)</mi></msup>")


def on_page_content(content: str, **_: object) -> str:
    """MkDocs calls this with the HTML of each page."""
    content = INLINE.sub(lambda found: _mathml(found, "inline"), content)
    return BLOCK.sub(lambda found: f'<div class="formula">{_mathml(found, "block")}</div>', content)


def _mathml(found: re.Match[str], display: str) -> str:
    formula = html.unescape(found[1]).strip()
    mathml: str = convert(formula, display=display)
    if "\\" in mathml:
        raise PluginError(f"no MathML is known for a command in the formula {formula}")
    # as TeX sets them: upright capitals, a thin space after names of functions, none around bars
    mathml = CAPITAL.sub(r'<mi mathvariant="normal">\1</mi>', mathml)
    mathml = NAME.sub(r'\1<mspace width="0.17em"/>', mathml)
    mathml = ORDINARY.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', mathml)
    # a prime is raised already: fonts without mathematics make it too small as a superscript
    return PRIMED.sub(r"<mrow>\1<mo>\2</mo></mrow>", mathml)
