"""Formulas to MathML while the pages are built: browsers show it without scripts or fonts."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
WORD = re.compile(r"<mi>(log|exp)</mi>(?!<mo stretchy=.false.>&#x00028;)")


def on_page_content(content, *, page, **_):
    """Replaces each formula of a page; one that isn't understood fails the build."""

    def mathml(formula):
        latex = html.unescape(formula["latex"]).strip()
        shown = convert(latex, display="block" if formula["tag"] == "div" else "inline")
        if "\\" in html.unescape(shown):
            raise PluginError(f"{page.file.src_uri}: formula {latex!r} has an unknown command")
        return WORD.sub(r'\g<0><mspace width="0.17em"/>', shown)

    return FORMULA.sub(mathml, content)
