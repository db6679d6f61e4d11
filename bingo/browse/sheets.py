"""Contact sheets: an anchor and its bag in one picture, and two bags of the same anchors side by side. Lengths are in pixels."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from bingo.browse.pictures import fitted

_TILE, _BIG, _GAP, _MARGIN, _LINE = 112, 160, 14, 24, 18
_FRAME = 4
_MOST_COLUMNS, _MOST_COLUMNS_OF_TWO = 10, 6
_PAPER, _INK, _FAINT, _EMPTY = "#ffffff", "#1b1f24", "#57606a", "#eaeef2"
_SAME, _OTHER, _UNKNOWN = "#1a7f37", "#cf222e", "#8c959f"


@dataclass(frozen=True)
class Tile:
    """One image with two lines below; `same`: whether its label is the anchor's (None: unknown, or it is the anchor itself).

    `kept`: whether the other index has this member too (None: not compared); members that it lacks are marked.
    """

    picture: Image.Image | None
    title: str
    caption: str
    same: bool | None = None
    kept: bool | None = None


def contact_sheet(heading: str, anchor: Tile, members: list[Tile]) -> Image.Image:
    """The anchor, enlarged, with its members to the right in reading order, nearest first."""
    columns = max(1, min(_MOST_COLUMNS, len(members), max(5, round(len(members) ** 0.5 * 1.6))))
    lines = -(-len(members) // columns)
    left = _MARGIN + _BIG + 2 * _GAP
    width = max(left + _grid_width(columns) + _MARGIN, 2 * _MARGIN + int(_font(16).getlength(heading)))
    body = max(_BIG + 2 * _LINE, _grid_height(lines))
    sheet, draw = _blank(width, _MARGIN + 2 * _LINE + body + _MARGIN)
    draw.text((_MARGIN, _MARGIN), heading, _INK, _font(16))
    top = _MARGIN + 2 * _LINE
    _draw_tile(sheet, draw, anchor, _MARGIN, top, _BIG)
    _draw_grid(sheet, draw, members, left, top, columns)
    if not members:
        draw.text((left, top), "the bag is empty", _FAINT, _font(14))
    return sheet


def side_by_side(names: tuple[str, str], anchors: list[tuple[Tile, list[Tile], list[Tile]]]) -> Image.Image:
    """One band for each anchor: the anchor, its bag in the first index, its bag in the second."""
    longest = max((len(bag) for _, first, second in anchors for bag in (first, second)), default=1)
    columns = max(1, -(-longest // -(-max(1, longest) // _MOST_COLUMNS_OF_TWO)))
    lefts = _MARGIN + _TILE + 2 * _GAP, _MARGIN + _TILE + 4 * _GAP + _grid_width(columns)
    heights = [_grid_height(max(1, *(-(-len(bag) // columns) for bag in (first, second)))) for _, first, second in anchors]
    head = _MARGIN + 2 * _LINE
    sheet, draw = _blank(lefts[1] + _grid_width(columns) + _MARGIN, head + sum(h + 2 * _GAP for h in heights) + _MARGIN + _LINE)
    for left, name in zip(lefts, names, strict=True):
        draw.text((left, _MARGIN), _fitted(name, _font(16), _grid_width(columns)), _INK, _font(16))
    top = head
    for (anchor, *bags), height in zip(anchors, heights, strict=True):
        draw.line((_MARGIN, top - _GAP, sheet.width - _MARGIN, top - _GAP), _EMPTY)
        _draw_tile(sheet, draw, anchor, _MARGIN, top, _TILE)
        for left, bag in zip(lefts, bags, strict=True):
            _draw_grid(sheet, draw, bag, left, top, columns)
        top += height + 2 * _GAP
    legend = "Frame: green with a tick: the anchor's class; red with a cross: another class. Faded: in both bags."
    draw.text((_MARGIN, top), legend, _FAINT, _font(13))
    return sheet


def _blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), _PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _grid_width(columns: int) -> int:
    return columns * (_TILE + _GAP) - _GAP


def _grid_height(lines: int) -> int:
    return lines * (_TILE + 2 * _LINE + _GAP) - _GAP


def _draw_grid(sheet: Image.Image, draw: ImageDraw.ImageDraw, tiles: list[Tile], left: int, top: int, columns: int) -> None:
    for place, tile in enumerate(tiles):
        x = left + place % columns * (_TILE + _GAP)
        _draw_tile(sheet, draw, tile, x, top + place // columns * (_TILE + 2 * _LINE + _GAP), _TILE)


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int, side: int) -> None:
    """A framed square, its mark, and its two lines of text, cut to its width."""
    color = {True: _SAME, False: _OTHER, None: _UNKNOWN}[tile.same]
    box = (left, top, left + side - 1, top + side - 1)
    draw.rectangle(box, _EMPTY, color, _FRAME)
    inner = side - 2 * _FRAME
    if tile.picture is None:
        draw.text((left + side / 2, top + side / 2), "no image", _FAINT, _font(13), anchor="mm")
    else:
        pixels, (right, down) = fitted(tile.picture, inner)
        if tile.kept:
            pixels = Image.blend(pixels, Image.new("RGB", pixels.size, _PAPER), 0.55)
        sheet.paste(pixels, (left + _FRAME + right, top + _FRAME + down))
    if tile.same is not None:
        _draw_mark(draw, tile.same, left + side - 22, top, color)
    for line, (text, ink, size) in enumerate(((tile.title, _INK, 14), (tile.caption, _FAINT, 13))):
        draw.text((left, top + side + 2 + line * _LINE), _fitted(text, _font(size), side), ink, _font(size))


def _draw_mark(draw: ImageDraw.ImageDraw, same: bool, left: int, top: int, color: str) -> None:
    """A tick or a cross on a square of 22: not everyone can distinguish the colours."""
    draw.rectangle((left, top, left + 21, top + 21), color)
    if same:
        draw.line((left + 5, top + 11, left + 9, top + 15, left + 16, top + 6), _PAPER, 3)
    else:
        draw.line((left + 6, top + 6, left + 15, top + 15), _PAPER, 3)
        draw.line((left + 6, top + 15, left + 15, top + 6), _PAPER, 3)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
