"""Pictures as SVG text: the elements, the colours, and an architecture drawn so that a person can read it.

SVG is written by hand and not by a plotting library: colours then follow the reader's light or dark background, the
text stays text, and a report needs no further package.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from html import escape
from typing import Any

COLOURS = {
    "page": ("#f3f5f8", "#11151b"),
    "card": ("#ffffff", "#1a2029"),
    "ink": ("#18202c", "#e8ecf2"),
    "soft": ("#586475", "#a0adbe"),
    "line": ("#d5dbe3", "#364150"),
    "main": ("#1f5fbf", "#6ea2ee"),
    "side": ("#e4edf9", "#233550"),
    "half": ("#b4470b", "#f09a5b"),
    "half-side": ("#fbe3cf", "#4a3220"),
    "on": ("#ffffff", "#0d131b"),
    "good": ("#14753a", "#5ccb86"),
    "bad": ("#b3221d", "#ff8178"),
}
"""Each colour on a light and on a dark background. `on` is for text on `main` and `half`."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
WIDTH = 480
"""Of every picture, in SVG units: narrow, so that its text can still be read when a phone shrinks it."""


def short_text(architecture: Mapping[str, Any]) -> str:
    """Units and width of each stage of what `Architecture.to_json` wrote, parsed: `3×64, 4×224, 1×448`."""
    return ", ".join(f"{len(stage['units'])}×{stage['width']}" for stage in architecture["stages"])


def themed(rule: Callable[[str, str], str]) -> str:
    """CSS that gives `rule(name, value)` for each colour, on light and on dark backgrounds."""
    light, dark = (" ".join(rule(name, values[i]) for name, values in COLOURS.items()) for i in (0, 1))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"


def element(tag: str, *content: str, **attributes: Any) -> str:
    """An SVG element; `class_` and `stroke_width` become `class` and `stroke-width`, values are escaped."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{''.join(content)}</{tag}>" if content else f"<{tag}{written}/>"


def label(
    x: float, y: float, words: str, *, colour: str = "ink", size: float = 13, anchor: str = "start", bold: bool = False
) -> str:
    """A line of text whose baseline is at `y`; `words` is escaped here."""
    weight = "600" if bold else None
    return element(
        "text", escape(words), x=x, y=y, class_=f"f-{colour}", font_size=size, text_anchor=anchor, font_weight=weight
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "line", width: float = 1.5, **more: Any) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=f"s-{colour}", stroke_width=width, **more)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A soft arrow to the right or downward."""
    head = (
        [(x2, y2), (x2 - 5, y2 - 3.5), (x2 - 5, y2 + 3.5)]
        if y1 == y2
        else [(x2, y2), (x2 - 3.5, y2 - 5), (x2 + 3.5, y2 - 5)]
    )
    return line(x1, y1, x2, y2, "soft") + polygon(head, "f-soft")


def polygon(points: Sequence[tuple[float, float]], classes: str) -> str:
    return element("polygon", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in points), class_=classes)


def box(x: float, y: float, width: float, height: float, classes: str, rx: float = 0) -> str:
    return element("rect", x=x, y=y, width=width, height=height, class_=classes, rx=rx or None)


def picture(height: float, title: str, body: str) -> str:
    """A whole SVG file, `WIDTH` wide, that can also stand inside a page of HTML."""
    style = themed(lambda name, value: f".f-{name}{{fill:{value}}} .s-{name}{{stroke:{value}}}")
    return element(
        "svg",
        element("title", escape(title)),
        element("style", style),
        box(0, 0, WIDTH, height, "f-card", 8),
        body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height:g}",
        width=WIDTH,
        height=height,
        role="img",
        aria_label=title,
        font_family=FONT,
        fill="none",
    )


def _attribute(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value))


# ---- an architecture ---------------------------------------------------------------------------------------------

MARGIN = 12
IN_A_ROW = 4
GAP = 18
BLOCK = (WIDTH - 4 * MARGIN - (IN_A_ROW - 1) * GAP) / IN_A_ROW
UNDER = 52
"""Height of what stands under the two lanes of a unit: kernel, groups, marks."""
LINK = 16
MARKS = {"squeeze_excite": "SE", "residual": "res", "extra_depthwise": "dw"}


def architecture_picture(
    architecture: Mapping[str, Any], title: str, *, stem: str = "", resolutions: Sequence[int] = (), head: str = ""
) -> str:
    """The architecture as an SVG: a panel for each stage, a block for each unit, and a legend.

    A block has two lanes, one above the other, that share its height as the unit shares its channels. The lower one is
    the main branch, filled. With stride 1 the upper one passes by unchanged; a stride-2 unit has another colour and
    narrows to the right, because it halves height and width.

    Args:
        architecture: as `Architecture.to_json` writes it, parsed.
        title: for those who cannot see the picture.
        stem, head: what comes before and after the stages, in words; nothing is drawn for an empty one.
        resolutions: side of each stage's feature maps in pixels; empty if it is not known.
    """
    stages = architecture["stages"]
    widest = max(stage["width"] for stage in stages)
    parts: list[str] = []
    y = float(MARGIN)

    def add(panel: str, height: float, link: bool = True) -> None:
        nonlocal y
        parts.append(element("g", panel, transform=f"translate({MARGIN},{y:g})"))
        y += height + LINK
        if link:
            parts.append(arrow(MARGIN + 24, y - LINK, MARGIN + 24, y))

    if stem:
        add(_end_panel("Stem", stem), 34)
    for index, stage in enumerate(stages):
        size = f" · {resolutions[index]}×{resolutions[index]} pixels" if resolutions else ""
        lanes = 52 + 26 * stage["width"] / widest
        last = index == len(stages) - 1 and not head
        add(*_stage_panel(f"Stage {index + 2}", stage, size, lanes), link=not last)
    if head:
        add(_end_panel("Head", head), 34, link=False)
    legend, height = _legend()
    add(legend, height, link=False)
    return picture(y - LINK + MARGIN, title, "".join(parts))


def _end_panel(name: str, words: str) -> str:
    return (
        box(0, 0, WIDTH - 2 * MARGIN, 34, "s-line", 6)
        + label(10, 22, name, bold=True, size=14)
        + label(58, 22, words, colour="soft")
    )


def _stage_panel(name: str, stage: Mapping[str, Any], size: str, lanes: float) -> tuple[str, float]:
    """The panel and its height."""
    units = stage["units"]
    noun = "unit" if len(units) == 1 else "units"
    parts = [
        label(10, 22, name, bold=True, size=14),
        label(80, 22, f"{stage['width']} channels{size} · {len(units)} {noun}", colour="soft"),
    ]
    for index, unit in enumerate(units):
        row, column = divmod(index, IN_A_ROW)
        x, y = MARGIN + column * (BLOCK + GAP), 34 + row * (lanes + UNDER + 10)
        parts.append(element("g", _block(stage["width"], unit, index == 0, lanes), transform=f"translate({x:g},{y:g})"))
        if index + 1 < len(units) and column + 1 < IN_A_ROW:
            parts.append(arrow(x + BLOCK + 3, y + lanes / 2, x + BLOCK + GAP - 3, y + lanes / 2))
    height = 34 + (len(units) - 1) // IN_A_ROW * (lanes + UNDER + 10) + lanes + UNDER
    return box(0, 0, WIDTH - 2 * MARGIN, height, "s-line", 6) + "".join(parts), height


def _block(channels: int, unit: Mapping[str, Any], halves: bool, lanes: float) -> str:
    """One unit, its upper left corner at the origin."""
    main = int(channels * Fraction(unit["split_ratio"]))
    parts = [_lanes(channels - main, main, halves, lanes)]
    parts += [_kernel_grid(unit["kernel"], 0, lanes + 6, "half" if halves else "main")]
    parts += [label(27, lanes + 21, f"{unit['kernel']}×{unit['kernel']}", bold=True)]
    parts += [label(BLOCK, lanes + 21, f"g{unit['groups']}", anchor="end", colour="soft")]
    x = 0.0
    for mark in (MARKS[name] for name in MARKS if unit[name]):
        width = 12 + 6.5 * len(mark)
        parts.append(box(x, lanes + 31, width, 15, "f-side s-main", 7.5))
        parts.append(label(x + width / 2, lanes + 42, mark, size=10.5, anchor="middle"))
        x += width + 3
    return "".join(parts)


def _lanes(side: int, main: int, halves: bool, height: float) -> str:
    """The two lanes of a unit with their channels, `BLOCK` wide and `height` high."""
    cut = height * side / (side + main)
    narrow = 0.2 if halves else 0.0  # of the height, on each side, at the right end
    shrunk = 1 - 2 * narrow * 16 / BLOCK  # the height's share that is left where the numbers stand
    at = [height * (1 - shrunk) / 2 + shrunk * middle for middle in (cut / 2, (cut + height) / 2)]
    numbers = label(7, at[0] + 4, str(side), size=11.5)
    numbers += label(7, at[1] + 4, str(main), size=11.5, colour="on", bold=True)
    if not halves:
        through = arrow(13 + 7 * len(str(side)), cut / 2, BLOCK - 4, cut / 2)
        lanes = box(0, 0, BLOCK, cut, "f-side") + box(0, cut, BLOCK, height - cut, "f-main")
        return lanes + through + box(0, 0, BLOCK, height, "s-main") + numbers
    top, bottom = height * narrow, height * (1 - narrow)
    middle = top + (bottom - top) * side / (side + main)
    lanes = polygon([(0, 0), (BLOCK, top), (BLOCK, middle), (0, cut)], "f-half-side")
    lanes += polygon([(0, cut), (BLOCK, middle), (BLOCK, bottom), (0, height)], "f-half")
    return lanes + polygon([(0, 0), (BLOCK, top), (BLOCK, bottom), (0, height)], "s-half") + numbers


def _kernel_grid(kernel: int, x: float, y: float, colour: str) -> str:
    """A window of `kernel` by `kernel` cells of 3 units each, in a space of 21."""
    side, offset = 3 * kernel, (21 - 3 * kernel) / 2
    x, y = x + offset, y + offset
    inner = "".join(
        line(x + 3 * i, y, x + 3 * i, y + side, colour, 0.6) + line(x, y + 3 * i, x + side, y + 3 * i, colour, 0.6)
        for i in range(1, kernel)
    )
    return box(x, y, side, side, f"s-{colour}") + inner


def _legend() -> tuple[str, float]:
    """The panel that says what the marks mean, and its height."""
    sample = {"split_ratio": "1/2", "kernel": 5, "groups": 2} | dict.fromkeys(MARKS, True)
    half = WIDTH / 2 - MARGIN
    parts = [
        label(0, 12, "How to read it", bold=True),
        element("g", _block(32, sample | {"residual": False}, True, 56), transform="translate(0,24)"),
        element("g", _block(32, sample, False, 56), transform=f"translate({half:g},24)"),
    ]
    left = ("Stride 2 halves", "height and width;", "both lanes are", "convolved.")
    right = ("Stride 1: the tinted", "channels pass by,", "the filled ones are", "convolved.")
    for x, words in ((BLOCK + 10, left), (half + BLOCK + 10, right)):
        parts += [label(x, 36 + 16 * i, text, size=11.5, colour="soft") for i, text in enumerate(words)]
    notes = (
        "Numbers in the lanes: channels; wider stages have higher lanes.",
        "5×5: kernel of the depthwise convolution.  g2: groups of the pointwise",
        "ones.  SE: squeeze-excite.  res: residual addition.  dw: an extra 3×3",
        "depthwise convolution comes first.",
    )
    top = 24 + 56 + UNDER + 16
    parts += [label(0, top + 16 * i, text, size=12, colour="soft") for i, text in enumerate(notes)]
    return "".join(parts), top + 16 * len(notes) - 8
