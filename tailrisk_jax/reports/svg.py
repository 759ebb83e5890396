"""Matplotlib figures as SVG elements inside a page, in the page's own colours and type.

A page with a strict content security policy runs no inline style: style attributes become
presentation attributes, which mean the same. Colours are placeholders that become the page's CSS
variables, so that one picture serves light and dark. The same figure gives the same bytes.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

# Placeholder colours; each is drawn as the page's CSS variable of that name.
INK, MUTED, LINE, ACCENT, OK, DOUBTFUL, UNUSABLE, PANEL = (f"#01010{k}" for k in range(8))
_VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent",
    OK: "ok", DOUBTFUL: "doubtful", UNUSABLE: "unusable", PANEL: "panel",
}  # fmt: skip

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tailrisk",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """An empty figure of that size in inches, and its axes."""
    from matplotlib import style  # slow to import
    from matplotlib.figure import Figure

    with style.context(["default", _SETTINGS]):  # whatever the user's own settings are
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.grid(which="major")
        axes.set_axisbelow(True)
        yield figure, axes


def scientific(axis: Any) -> None:
    """Powers of ten as the tables have them, and not too many."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(lambda value, _: f"{value:.0e}")


def inline_svg(figure: Any, name: str, label: str) -> Markup:
    """The figure as an <svg> element; call it inside `drawing`.

    Args:
      figure: made of placeholder colours; its texts must be ours, not a model's or a user's.
      name: sets its ids apart from other figures' on the page.
      label: what it shows, for readers who don't see it.
    """
    for axes in figure.axes:
        axes.minorticks_off()
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    _drop(root, {"metadata", "style"})
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', file.getvalue()))
    for element in root.iter():
        element.tag = _local(element.tag)
        content = {_local(key): value for key, value in element.attrib.items()}
        style = content.pop("style", "")
        identity = content.pop("id", "")
        if identity in used:
            content["id"] = identity
        element.attrib.clear()
        element.attrib.update((key, _named(key, value, name)) for key, value in content.items())
        element.attrib.update(_presentation(style))
        element.text, element.tail = _kept(element.text), _kept(element.tail)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update(
        {
            "class": "plot",
            "viewBox": view,
            "role": "img",
            "aria-label": label,
            "stroke-linejoin": "round",
            "stroke-linecap": "butt",
        }
    )
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _drop(parent: ElementTree.Element, names: set[str]) -> None:
    for child in list(parent):
        if _local(child.tag) in names:
            parent.remove(child)
        else:
            _drop(child, names)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _kept(text: str | None) -> str | None:
    return text if text and text.strip() else None


def _named(key: str, value: str, name: str) -> str:
    """An attribute with its figure's name in the ids that it gives or uses."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value[1:]}"
    if key == "d":
        return " ".join(value.split())
    return value.replace("url(#", f"url(#{name}-")


def _presentation(style: str) -> Iterator[tuple[str, str]]:
    """The declarations of a style attribute as attributes; the page sets the font's family."""
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":
            size = re.search(r"[\d.]+px", value)
            key, value = "font-size", size[0] if size else "9px"
        if key in ("fill", "stroke") and value in _VARIABLES:
            value = f"var(--{_VARIABLES[value]})"
        if key != "font-family":
            yield key, value
