"""Contact sheets: small pictures in rows, each with a few lines of text below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

GROUND = "#eeeeee"


@dataclass
class Tile:
    """One place of a sheet.

    Attributes:
        pictures: those of one sample; up to four are shown, side by side.
        lines: texts below, wrapped to the width of the tile; a pair is (text, colour).
    """

    pictures: list[Image.Image] = field(default_factory=list)
    lines: list[str | tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """Sizes in pixels.

    Attributes:
        tile: side of a picture.
        margin: between tiles.
        columns: tiles in a row, fewer where there are fewer tiles.
        font: height of the letters.
        lines: of text below a picture; what is longer ends with "...".
    """

    tile: int = 220
    margin: int = 10
    columns: int = 6
    font: int = 13
    lines: int = 6

    @property
    def line(self) -> int:
        """Height of a line of text."""
        return self.font + 3

    @property
    def row(self) -> int:
        """Height of a row of tiles with their texts."""
        return self.tile + self.lines * self.line + self.margin


def draw(groups: Sequence[tuple[str, Sequence[Tile]]], layout: Layout | None = None) -> Image.Image:
    """One picture of all groups, one below the other.

    Args:
        groups: (heading, tiles); a group with an empty heading has none.
    """
    layout = layout or Layout()
    font, bold = ImageFont.load_default(layout.font), ImageFont.load_default(layout.font + 5)
    head = layout.line + 10
    columns = max(1, min(layout.columns, max((len(tiles) for _, tiles in groups), default=1)))
    rows = [-(-len(tiles) // columns) for _, tiles in groups]
    height = layout.margin + sum(n * layout.row + (head if h else 0) for n, (h, _) in zip(rows, groups, strict=True))
    sheet = Image.new("RGB", (columns * (layout.tile + layout.margin) + layout.margin, height), "white")
    pen = ImageDraw.Draw(sheet)
    top = layout.margin
    for count, (heading, tiles) in zip(rows, groups, strict=True):
        if heading:
            pen.text((layout.margin, top), _wrapped([heading], bold, sheet.width, 1)[0][0], fill="black", font=bold)
            top += head
        for place, tile in enumerate(tiles):
            x = layout.margin + place % columns * (layout.tile + layout.margin)
            y = top + place // columns * layout.row
            sheet.paste(_square(tile.pictures[:4], layout.tile), (x, y))
            lines = _wrapped(tile.lines, font, layout.tile, layout.lines)
            for number, (text, colour) in enumerate(lines):
                pen.text((x, y + layout.tile + 2 + number * layout.line), text, fill=colour, font=font)
        top += count * layout.row
    return sheet


def _square(pictures: Sequence[Image.Image], side: int) -> Image.Image:
    """Up to four pictures in one square, whole and in proportion."""
    square = Image.new("RGB", (side, side), GROUND)
    across = 1 if len(pictures) <= 1 else 2
    cell = side // across
    for i, picture in enumerate(pictures):
        scale = min(cell / picture.width, cell / picture.height)
        size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        small = picture.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
        x, y = i % across * cell, i // across * cell
        square.paste(small, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
    return square


def _wrapped(
    lines: Sequence[str | tuple[str, str]], font: ImageFont.FreeTypeFont, width: int, most: int
) -> list[tuple[str, str]]:
    """(text, colour) of the lines that fit into a width and a number of lines."""
    letters = max(4, int(width / font.getlength("n")))
    wrapped = []
    for line in lines:
        text, colour = (line, "black") if isinstance(line, str) else line
        wrapped += [(part, colour) for part in textwrap.wrap(text, letters) or [""]]
    return wrapped if len(wrapped) <= most else [*wrapped[: most - 1], (f"{wrapped[most - 1][0][:-3]}...", "black")]
