"""The two plots of a run as SVG: accuracy against latency, and measured against predicted latency."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hwnas.drawing import WIDTH, arrow, box, element, label, line, picture, polygon
from hwnas.runs import Candidate, RunResult, Timing

LEFT, RIGHT, TOP, BOTTOM = 58, 16, 58, 54
"""Margins of the plotting area; the legend stands above it, the axes' titles left of it and below."""


def ms_text(value_ms: float, places: int | None = None) -> str:
    """Three significant figures and the unit, or a fixed number of decimal places: `0.871 ms`, `12.3 ms`."""
    return f"{value_ms:,.{_places(value_ms) if places is None else places}f} ms"


def timing_text(timing: Timing) -> str:
    """A measured latency with its spread: `0.871 ± 0.009 ms`."""
    places = _places(timing.median_ms)
    spread = f"± {timing.spread_ms:.{places}f}"
    if not float(spread[2:]) and timing.spread_ms:
        spread = f"± less than {10**-places:.{places}f}"
    return f"{timing.median_ms:,.{places}f} {spread} ms"


def percent_text(share: float) -> str:
    return f"{100 * share:.1f} %"


def _places(value: float) -> int:
    """Decimal places that show three significant figures."""
    return min(6, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 2


def winner_of(result: RunResult) -> Candidate:
    """The finalist that became the model: the most accurate of those that kept the budget."""
    return max((finalist for finalist in result.finalists if finalist.kept), key=lambda finalist: finalist.accuracy)


def pareto_set(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those than which no other is both at least as fast and more accurate; fastest first."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.latency_ms, -c.accuracy)):
        if not kept or candidate.accuracy > kept[-1].accuracy:
            kept.append(candidate)
    return tuple(kept)


# ---- axes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axes:
    """A plotting area: data limits, and where they lie in a picture of the given height."""

    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    height: float

    def x(self, value: float) -> float:
        low, high = self.x_limits
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_limits
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def frame(self, x_title: str, y_title: str) -> str:
        """Grid, numbers and titles."""
        right, bottom = WIDTH - RIGHT, self.height - BOTTOM
        parts = []
        for tick, text in ticks(*self.x_limits):
            parts.append(line(self.x(tick), TOP, self.x(tick), bottom, width=1))
            parts.append(label(self.x(tick), bottom + 17, text, colour="soft", anchor="middle"))
        for tick, text in ticks(*self.y_limits):
            parts.append(line(LEFT, self.y(tick), right, self.y(tick), width=1))
            parts.append(label(LEFT - 7, self.y(tick) + 4.5, text, colour="soft", anchor="end"))
        parts.append(label((LEFT + right) / 2, self.height - 14, x_title, anchor="middle"))
        upright = label(0, 0, y_title, anchor="middle")
        middle = (TOP + bottom) / 2
        parts.append(element("g", upright, transform=f"translate(16,{middle:g}) rotate(-90)"))
        return "".join(parts)


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to nine round values between the limits, with their text."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= (high - low) / 4)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:.{places}f}") for i in range(first, last + 1)]


def limits(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """The range of the values with some room on both sides."""
    low, high = min(values), max(values)
    margin = room * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


# ---- marks -------------------------------------------------------------------------------------------------------


def _dot(x: float, y: float, note: str = "", classes: str = "f-soft", r: float = 3, **more: str) -> str:
    return element("circle", *_note(note), cx=x, cy=y, r=r, class_=classes, **more)


def _ring(x: float, y: float, note: str = "") -> str:
    return element("circle", *_note(note), cx=x, cy=y, r=6.5, class_="s-ink", stroke_width=1.8)


def _cross(x: float, y: float, note: str = "") -> str:
    shape = line(x - 5, y - 5, x + 5, y + 5, "bad", 2.2) + line(x - 5, y + 5, x + 5, y - 5, "bad", 2.2)
    return element("g", *_note(note), shape)


def _star(x: float, y: float, note: str = "") -> str:
    radii = (9.5, 4)
    corners = [(radii[i % 2], math.pi * i / 5) for i in range(10)]
    shape = polygon([(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in corners], "f-half s-card")
    return element("g", *_note(note), shape)


def _square(x: float, y: float, note: str = "") -> str:
    return element("g", *_note(note), box(x - 4.5, y - 4.5, 9, 9, "f-good s-card"))


def _note(words: str) -> tuple[str, ...]:
    return (element("title", words),) if words else ()


def _legend(rows: Sequence[Sequence[tuple[str, str, float]]]) -> str:
    """Rows of (mark at the origin, words, width) above the plotting area."""
    parts = []
    for number, row in enumerate(rows):
        x, y = 16.0, 18 + 20 * number
        for mark, words, width in row:
            parts.append(element("g", mark, transform=f"translate({x:g},{y:g})"))
            parts.append(label(x + 14, y + 4.5, words, size=12.5))
            x += width
    return "".join(parts)


def _facts(candidate: Candidate) -> str:
    text = f"{percent_text(candidate.accuracy)}, estimated {ms_text(candidate.latency_ms)}"
    text += f", at most {ms_text(candidate.upper_ms)}"
    return text + (f", measured {timing_text(candidate.measured)}" if candidate.measured else "")


# ---- the plots ---------------------------------------------------------------------------------------------------


def accuracy_floor(result: RunResult) -> float:
    """The least accuracy that the Pareto plot shows: a few very bad candidates must not squeeze all others flat."""
    accuracies = sorted(candidate.accuracy for candidate in result.scored)
    best, tenth = accuracies[-1], accuracies[len(accuracies) // 10]
    needed = min(c.accuracy for c in result.finalists)
    return min(needed, max(accuracies[0], best - 1.5 * (best - tenth)))


def pareto_plot(result: RunResult) -> str:
    """Every scored candidate, the Pareto set, the finalists, the winner and the budget, as SVG."""
    floor = accuracy_floor(result)
    shown = [candidate for candidate in result.scored if candidate.accuracy >= floor]
    everyone = [*shown, *result.finalists]
    front, winner = pareto_set(shown), winner_of(result)
    x_limits = limits([c.latency_ms for c in everyone])
    budget_is_near = x_limits[0] < result.budget_ms < 1.25 * x_limits[1]
    if budget_is_near:
        x_limits = x_limits[0], max(x_limits[1], result.budget_ms * 1.04)
    y_low, y_high = limits([100 * c.accuracy for c in everyone])
    axes = Axes((max(0.0, x_limits[0]), x_limits[1]), (max(0.0, y_low), min(100.5, y_high)), 380)

    def at(candidate: Candidate) -> tuple[float, float, str]:
        return axes.x(candidate.latency_ms), axes.y(100 * candidate.accuracy), _facts(candidate)

    parts = [axes.frame("estimated latency, ms", "validation accuracy, inherited weights, %")]
    parts.append(_budget_mark(axes, result.budget_ms, budget_is_near))
    parts += [_dot(*at(candidate), fill_opacity="0.45") for candidate in shown]
    points = " ".join(f"{axes.x(c.latency_ms):.2f},{axes.y(100 * c.accuracy):.2f}" for c in front)
    parts.append(element("polyline", points=points, class_="s-main", stroke_width=2))
    parts += [_dot(*at(candidate), classes="f-main", r=3.6) for candidate in front]
    parts += [_ring(*at(finalist)) for finalist in result.finalists if finalist.kept]
    parts += [_cross(*at(finalist)) for finalist in result.finalists if finalist.kept is False]
    parts.append(_star(*at(winner)))
    pareto_mark = line(-9, 0, 9, 0, "main", 2) + _dot(0, 0, classes="f-main", r=3.6)
    legend = [
        [
            (_dot(0, 0), f"scored ({len(result.scored):,})", 130),
            (pareto_mark, "Pareto set", 110),
            (_star(0, 0), "winner", 0),
        ],
        [(_ring(0, 0), "finalist", 130), (_cross(0, 0), "finalist, over the budget as measured", 0)],
    ]
    return picture(axes.height, "Accuracy against estimated latency", "".join(parts) + _legend(legend))


def _budget_mark(axes: Axes, budget_ms: float, is_near: bool) -> str:
    text, y = f"budget {budget_ms:g} ms", axes.height - BOTTOM - 8
    if not is_near:
        end = WIDTH - RIGHT - 4
        return label(end - 24, y, text, colour="bad", anchor="end") + arrow(end - 20, y - 4.5, end, y - 4.5)
    x = axes.x(budget_ms)
    dashed = line(x, TOP, x, axes.height - BOTTOM, "bad", 1.8, stroke_dasharray="6 4")
    return dashed + label(x - 6, y, text, colour="bad", anchor="end")


def latency_plot(result: RunResult) -> str:
    """Measured against estimated latency of the finalists and of the exported model, with upper bounds, as SVG."""
    proof = result.proof
    finalists = [(f, f.measured) for f in result.finalists if f.measured]
    estimates = [(f.latency_ms, f.upper_ms, m) for f, m in finalists] + [
        (proof.predicted_ms, proof.upper_ms, proof.measured)
    ]
    values = [
        value
        for low, high, m in estimates
        for value in (low, high, m.median_ms - m.spread_ms, m.median_ms + m.spread_ms)
    ]
    low, high = limits(values)
    budget_is_near = low < result.budget_ms < 1.1 * high
    both = max(0.0, low), max(high, 1.02 * result.budget_ms) if budget_is_near else high
    axes = Axes(both, both, 460)
    parts = [axes.frame("estimated latency, ms", "measured latency, ms")]
    parts.append(line(axes.x(both[0]), axes.y(both[0]), axes.x(both[1]), axes.y(both[1]), "soft", 1.5))
    if budget_is_near:
        y = axes.y(result.budget_ms)
        parts.append(line(LEFT, y, WIDTH - RIGHT, y, "bad", 1.8, stroke_dasharray="6 4"))
        parts.append(label(WIDTH - RIGHT - 6, y + 16, f"budget {result.budget_ms:g} ms", colour="bad", anchor="end"))
    for estimate, upper, timing in estimates:
        x = axes.x(estimate)
        parts.append(line(x, axes.y(estimate), x, axes.y(upper), "side", 7))
        parts.append(line(x - 7, axes.y(upper), x + 7, axes.y(upper), "main", 2))
        ends = (axes.y(timing.median_ms - timing.spread_ms), axes.y(timing.median_ms + timing.spread_ms))
        parts.append(line(x, ends[0], x, ends[1], "ink", 1.5))
    for finalist, timing in finalists:
        mark = _square if finalist.kept else _cross
        parts.append(mark(axes.x(finalist.latency_ms), axes.y(timing.median_ms), _facts(finalist)))
    note = f"exported model: estimated {ms_text(proof.predicted_ms)}, measured {timing_text(proof.measured)}"
    parts.append(_star(axes.x(proof.predicted_ms), axes.y(proof.measured.median_ms), note))
    bound = line(0, -7, 0, 7, "side", 7) + line(-7, -7, 7, -7, "main", 2)
    diagonal = line(-8, 6, 8, -6, "soft", 1.5)
    legend = [
        [
            (_star(0, 0), "exported model", 130),
            (_square(0, 0), "finalist, kept", 122),
            (_cross(0, 0), "finalist, over the budget", 0),
        ],
        [(bound, "estimate up to its upper bound", 252), (diagonal, "measured = estimated", 0)],
    ]
    return picture(axes.height, "Measured against estimated latency", "".join(parts) + _legend(legend))
