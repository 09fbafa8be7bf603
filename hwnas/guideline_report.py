"""The four experiments of a device beside the paper's: facts for a program, tables and pictures for a person."""

import statistics
from collections.abc import Sequence
from typing import Any

from hwnas.drawing import WIDTH, box, element, label, line, picture
from hwnas.experiments import EXPERIMENTS, MULTIPLIERS, GuidelineTiming, Slowdown, Speeds, slowdowns, verdicts
from hwnas.plots import ticks

MARGIN, LABEL, LANE = 16, 26, 15
"""Of a picture, in its units: around the bars, height of a variant's name, and height of a bar."""

COLOURS = (("main", "this device"), ("half", "the paper's ARM"), ("soft", "the paper's GPU"))


def guideline_facts(timings: Sequence[GuidelineTiming]) -> dict[str, Any]:
    """Timings, slowdowns beside the reported ones of the paper, and verdicts."""
    return {
        "widths": timings[0].case.widths,
        "verdicts": verdicts(timings),
        "experiments": {guideline: _experiment_facts(guideline, timings) for guideline in EXPERIMENTS},
    }


def _experiment_facts(guideline: str, timings: Sequence[GuidelineTiming]) -> list[dict[str, Any]]:
    measured = {(t.case.variant, t.case.multiplier): t.measurement for t in timings if t.case.guideline == guideline}
    return [
        {
            "variant": slowdown.variant,
            "multiplier": multiplier,
            "median_ms": measured[slowdown.variant, multiplier].median_ms,
            "spread_ms": measured[slowdown.variant, multiplier].spread_ms,
            "samples_ms": measured[slowdown.variant, multiplier].samples_ms,
            "times_slower": slowdown.here[index],
            "times_slower_spread": slowdown.spread[index],
            "reported_arm_times_slower": slowdown.arm[index],
            "reported_gpu_times_slower": slowdown.gpu[index],
        }
        for slowdown in slowdowns(guideline, timings)
        for index, multiplier in enumerate(MULTIPLIERS)
    ]


def guideline_rows(guideline: str, timings: Sequence[GuidelineTiming]) -> list[tuple[str, ...]]:
    """A table of one experiment, its header first, with three numbers a cell: those of the three widths."""
    measured = {(t.case.variant, t.case.multiplier): t.measurement for t in timings if t.case.guideline == guideline}
    rows: list[tuple[str, ...]] = [("", "ms here", "spread, %", "times slower", "paper's ARM", "paper's GPU")]
    for slowdown in slowdowns(guideline, timings):
        own = [measured[slowdown.variant, multiplier] for multiplier in MULTIPLIERS]
        spread = "  ".join(f"{100 * m.spread_ms / m.median_ms:.0f}" for m in own)
        columns = (_factors(speeds) for speeds in (slowdown.here, slowdown.arm, slowdown.gpu))
        rows.append((slowdown.variant, "  ".join(f"{m.median_ms:.3g}" for m in own), spread, *columns))
    return rows


def _factors(speeds: Speeds) -> str:
    return "  ".join(f"{factor:.2f}" for factor in speeds)


def guideline_picture(guideline: str, timings: Sequence[GuidelineTiming]) -> str:
    """How many times slower each variant of an experiment is, here and as the paper reports, as SVG.

    A bar is the geometric mean over the three widths, a dot one of them.
    """
    rows = slowdowns(guideline, timings)
    high = 1.04 * max(factor for row in rows for factor in (*row.here, *row.arm, *row.gpu))
    scale = (WIDTH - 2 * MARGIN) / high
    top, group = 62, LABEL + 3 * LANE + 6
    bottom = top + group * len(rows)
    parts = []
    for tick, text in ticks(0.0, high):
        parts.append(line(MARGIN + scale * tick, top, MARGIN + scale * tick, bottom, width=1))
        parts.append(label(MARGIN + scale * tick, bottom + 17, text, colour="soft", anchor="middle"))
    for index, row in enumerate(rows):
        parts.append(element("g", _bars(row, scale), transform=f"translate({MARGIN},{top + group * index})"))
    parts.append(line(MARGIN + scale, top, MARGIN + scale, bottom, "ink", stroke_dasharray="4 4"))
    words = f"times as slow as {rows[0].variant}, at equal MACs"
    parts.append(label(WIDTH / 2, bottom + 38, words, anchor="middle"))
    title = f"{guideline}: {EXPERIMENTS[guideline].title}"
    parts.append(label(MARGIN, 24, title, bold=True, size=14))
    for index, (colour, words) in enumerate(COLOURS):
        parts.append(box(MARGIN + 150 * index, 36, 11, 11, f"f-{colour}", 2))
        parts.append(label(MARGIN + 16 + 150 * index, 46, words, size=12.5))
    return picture(bottom + 50, title, "".join(parts))


def _bars(row: Slowdown, scale: float) -> str:
    """The three bars of a variant under its name, the upper left corner at the origin."""
    parts = [label(0, LABEL - 7, row.variant, size=12.5)]
    for index, (speeds, (colour, _)) in enumerate(zip((row.here, row.arm, row.gpu), COLOURS, strict=True)):
        y = float(LABEL + LANE * index)
        parts.append(box(0, y, scale * statistics.geometric_mean(speeds), LANE - 3, f"f-{colour}", 2))
        for multiplier, factor in zip(MULTIPLIERS, speeds, strict=True):
            note = element("title", f"channels x{multiplier}: {factor:.2f}")
            parts.append(element("circle", note, cx=scale * factor, cy=y + LANE / 2 - 1.5, r=3, class_="f-card s-ink"))
    return "".join(parts)
