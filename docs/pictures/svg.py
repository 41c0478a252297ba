"""Plain SVG: boxes, arrows and text on a light card, readable on a light and on a dark page."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from pathlib import Path

# Okabe and Ito's colours, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/).
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
INK, GREY, CARD, EDGE = "#1b1f24", "#57606a", "#ffffff", "#c9d1d9"
SANS = "-apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


class Drawing:
    """A drawing of a fixed size, in pixels; things are drawn in the order of the calls."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        stroke: str = INK,
        fill: str = CARD,
        dashed: bool = False,
    ) -> None:
        """Draw a rounded box with its upper left corner at x, y."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{min(7, height / 5):g}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.6"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 14,
        colour: str = INK,
        anchor: str = "start",
        mono: bool = False,
        bold: bool = False,
        turned: bool = False,
    ) -> None:
        """Write one line with its baseline at y; `turned` writes it upwards."""
        weight = ' font-weight="600"' if bold else ""
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{MONO if mono else SANS}" '
            f'font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{weight}{turn}>'
            f"{escape(text)}</text>"
        )

    def line(
        self, points: list[tuple[float, float]], *, colour: str = GREY, dashed: bool = False
    ) -> None:
        """Draw straight lines from point to point."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        joined = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" '
            f'stroke-width="1.6"{dash}/>'
        )

    def arrow(self, points: list[tuple[float, float]], *, colour: str = GREY) -> None:
        """Draw lines that end in a head; the last one is horizontal or vertical."""
        self.line(points, colour=colour)
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        back_x, back_y = x - 8 * dx, y - 8 * dy
        corners = f"{x:g},{y:g} {back_x + 5 * dy:g},{back_y + 5 * dx:g} "
        corners += f"{back_x - 5 * dy:g},{back_y - 5 * dx:g}"
        self._parts.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def render(self) -> str:
        """Return the SVG document."""
        width, height = self._size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{escape(self._title)}">'
        )
        card = (
            f'<rect x="0.75" y="0.75" width="{width - 1.5}" height="{height - 1.5}" rx="12" '
            f'fill="{CARD}" stroke="{EDGE}" stroke-width="1.5"/>'
        )
        title = f"<title>{escape(self._title)}</title>"
        return "\n".join([head, title, card, *self._parts, "</svg>"]) + "\n"


def write_or_check(drawing: Drawing, path: Path) -> None:
    """Write a drawing; with `--check` on the command line, fail where the file is another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    text = drawing.render()
    if not check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path} must be what its script draws, got another file. Run the script.")
