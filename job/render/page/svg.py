"""A drawing of matplotlib -> an element of a page: in the page's own colours, for wide and for narrow screens."""

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

from markupsafe import Markup

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
COLOURS = {
    "blue": "#2a6f97",
    "orange": "#e07a1f",
    "red": "#b5172f",
    "grey": "#6b7078",
    "pale": "#e4e6e9",
    "green": "#2e8b57",
}
"""Drawn with these; in the page each is its variable, which has another value in the dark."""
_INCHES, _WIDE, _NARROW = (6.2, 3.6), (10.5, 3.9), (4.6, 3.5)


def wide(name: str, draw_on: Callable[[Any], None], says: str) -> Markup:
    """A drawing that has a row of its own; for a screen that is too narrow for its words it is drawn once more."""
    screens = {"on-wide": (name, _WIDE), "on-narrow": (f"{name}-narrow", _NARROW)}
    return Markup("\n").join(
        svg(each, draw_on, says, inches=inches, screen=screen) for screen, (each, inches) in screens.items()
    )


def svg(
    name: str,
    draw_on: Callable[[Any], None],
    says: str,
    *,
    inches: tuple[float, float] = _INCHES,
    screen: str = "on-all",
) -> Markup:
    """A drawing as an element of the page, with what it shows for who cannot see it.

    Args:
        name: of the picture in the page.
        draw_on: draws on the axes that it is given.
        says: what is seen.
        inches: width and height.
        screen: the class of the page's style sheet for the screens that it is for.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "path.simplify": True}
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        settings[part] = COLOURS["grey"]
    written = io.BytesIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=COLOURS["pale"], linewidth=0.8)
        axes.set_axisbelow(True)
        draw_on(axes)
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _as_part(written.getvalue(), name, says, screen)


def _as_part(drawing: bytes, name: str, says: str, screen: str) -> Markup:
    root = ET.fromstring(drawing)  # noqa: S314 - matplotlib has just written it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"}:
                parent.remove(child)
    _rename(root, f"{name}-")
    for element in root.iter():
        for attribute in ("style", "fill", "stroke"):
            if attribute in element.attrib:
                element.set(attribute, _in_page_s_colours(element.attrib[attribute]))
        for attribute in ("d", "x", "y", "transform", "width", "height"):
            if attribute in element.attrib:
                element.set(
                    attribute,
                    re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}", element.attrib[attribute]),
                )
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("class", screen)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-says")
    title = ET.Element(f"{{{_SVG}}}title", {"id": f"{name}-says"})
    title.text = says
    root.insert(0, title)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 - as it was read, and what was put in is escaped


def _rename(root: ET.Element, prefix: str) -> None:
    """Names that are referred to are this picture's own; the others go."""
    text = " ".join(value for element in root.iter() for name, value in element.attrib.items() if name != "id")
    used = {*re.findall(r"#([\w-]+)", text)}
    for element in root.iter():
        own = element.attrib.pop("id", "")
        if own in used:
            element.set("id", prefix + own)
        for name, value in element.attrib.items():
            if "#" in value and ("url(" in value or name.endswith("href")):
                element.set(name, re.sub(r"#(?=[\w-]+\)|[\w-]+$)", f"#{prefix}", value))


def _in_page_s_colours(style: str) -> str:
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    return re.sub(r"font-family: [^;]*;? ?", "", style)
