"""The plots of a run as SVG, accuracy against latency and measured against predicted latency, and what makes a plot."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hwnas.drawing import WIDTH, arrow, box, element, label, line, picture, polygon
from hwnas.runs import Candidate, RunResult, Timing

LEFT, RIGHT, TOP, BOTTOM = 58, 16, 58, 54
"""Margins of the plotting area; the legend stands above it, the axes' titles left of it and below."""


def ms_text(value_ms: float) -> str:
    """Three significant figures and the unit: `0.871 ms`, `12.3 ms`."""
    return f"{value_ms:,.{_places(value_ms)}f} ms"


def timing_text(timing: Timing) -> str:
    """A measured latency with its spread, both to the same decimal place: `0.871 ± 0.009 ms`."""
    places = max(_places(timing.median_ms), _places(timing.spread_ms) - 2 if timing.spread_ms else 0)
    return f"{timing.median_ms:,.{places}f} ± {timing.spread_ms:.{places}f} ms"


def percent_text(share: float) -> str:
    return f"{100 * share:.1f} %"


def _places(value: float) -> int:
    """Decimal places that show three significant figures."""
    return min(6, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 2


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


def dot(x: float, y: float, note: str = "", classes: str = "f-soft", r: float = 3, **more: str) -> str:
    """A mark, as are the following; `note` is shown where a pointer rests on it."""
    return element("circle", *_note(note), cx=x, cy=y, r=r, class_=classes, **more)


def _ring(x: float, y: float, note: str = "") -> str:
    return element("circle", *_note(note), cx=x, cy=y, r=6.5, class_="s-ink", stroke_width=1.8)


def _cross(x: float, y: float, note: str = "") -> str:
    shape = line(x - 5, y - 5, x + 5, y + 5, "bad", 2.2) + line(x - 5, y + 5, x + 5, y - 5, "bad", 2.2)
    return element("g", *_note(note), shape)


def star(x: float, y: float, note: str = "") -> str:
    radii = (9.5, 4)
    corners = [(radii[i % 2], math.pi * i / 5) for i in range(10)]
    shape = polygon([(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in corners], "f-half s-card")
    return element("g", *_note(note), shape)


def square(x: float, y: float, note: str = "") -> str:
    return element("g", *_note(note), box(x - 4.5, y - 4.5, 9, 9, "f-good s-card"))


def _dashed(x1: float, y1: float, x2: float, y2: float) -> str:
    return line(x1, y1, x2, y2, "bad", 1.8, stroke_dasharray="6 4")


def _note(words: str) -> tuple[str, ...]:
    return (element("title", words),) if words else ()


def legend(*rows: Sequence[tuple[str, str, float]]) -> str:
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


def pareto_plot(result: RunResult, winner: Candidate) -> str:
    """Every scored candidate, the Pareto set, the finalists, the winner among them and the budget, as SVG."""
    floor = accuracy_floor(result)
    shown = [candidate for candidate in result.scored if candidate.accuracy >= floor]
    everyone = [*shown, *result.finalists]
    front = pareto_set(shown)
    x_low, x_high = limits([c.latency_ms for c in everyone])
    y_low, y_high = limits([100 * c.accuracy for c in everyone])
    budget_is_near = x_low < result.budget_ms < 1.25 * x_high
    if budget_is_near:
        x_high = max(x_high, 1.04 * result.budget_ms)
    axes = Axes((max(0.0, x_low), x_high), (max(0.0, y_low), min(100.5, y_high)), 380)

    def at(candidate: Candidate) -> tuple[float, float, str]:
        return axes.x(candidate.latency_ms), axes.y(100 * candidate.accuracy), _facts(candidate)

    parts = [axes.frame("estimated latency, ms", "validation accuracy, inherited weights, %")]
    parts += [dot(*at(candidate), fill_opacity="0.45") for candidate in shown]
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y, _ in map(at, front))
    parts.append(element("polyline", points=points, class_="s-main", stroke_width=2))
    parts += [dot(*at(candidate), classes="f-main", r=3.6) for candidate in front]
    parts.append(_budget_mark(axes, result.budget_ms, budget_is_near))
    parts += [(_ring if finalist.kept else _cross)(*at(finalist)) for finalist in result.finalists if finalist.measured]
    parts.append(star(*at(winner)))
    pareto_mark = line(-9, 0, 9, 0, "main", 2) + dot(0, 0, classes="f-main", r=3.6)
    first = [(dot(0, 0), f"scored ({len(result.scored):,})", 130.0), (pareto_mark, "Pareto set", 130.0)]
    first += [_budget_legend(result)] if budget_is_near else []
    second = [
        (star(0, 0), "winner", 130.0),
        (_ring(0, 0), "finalist", 130.0),
        (_cross(0, 0), "finalist, dropped", 0.0),
    ]
    return picture(axes.height, "Accuracy against estimated latency", "".join(parts) + legend(first, second))


def _budget_mark(axes: Axes, budget_ms: float, is_near: bool) -> str:
    if is_near:
        return _dashed(axes.x(budget_ms), TOP, axes.x(budget_ms), axes.height - BOTTOM)
    end, y = WIDTH - RIGHT - 4, axes.height - BOTTOM - 10
    return label(end - 24, y + 4.5, f"budget {budget_ms:g} ms", colour="bad", anchor="end") + arrow(end - 20, y, end, y)


def _budget_legend(result: RunResult) -> tuple[str, str, float]:
    return _dashed(-9, 0, 9, 0), f"budget {result.budget_ms:g} ms", 0.0


def latency_plot(result: RunResult) -> str:
    """Measured against estimated latency of the finalists and of the exported model, with upper bounds, as SVG."""
    proof = result.proof
    finalists = [(finalist, finalist.measured) for finalist in result.finalists if finalist.measured]
    estimates = [(finalist.latency_ms, finalist.upper_ms, timing) for finalist, timing in finalists]
    estimates.append((proof.predicted_ms, proof.upper_ms, proof.measured))
    low, high = limits([value for estimate, upper, timing in estimates for value in (estimate, upper, *_ends(timing))])
    budget_is_near = low < result.budget_ms < 1.1 * high
    if budget_is_near:
        high = max(high, 1.02 * result.budget_ms)
    low = max(0.0, low)
    axes = Axes((low, high), (low, high), 460)
    parts = [axes.frame("estimated latency, ms", "measured latency, ms")]
    parts.append(line(axes.x(low), axes.y(low), axes.x(high), axes.y(high), "soft"))
    if budget_is_near:
        parts.append(_dashed(LEFT, axes.y(result.budget_ms), WIDTH - RIGHT, axes.y(result.budget_ms)))
    for estimate, upper, timing in estimates:
        x, (least, most) = axes.x(estimate), _ends(timing)
        parts.append(line(x, axes.y(estimate), x, axes.y(upper), "side", 7))
        parts.append(line(x - 7, axes.y(upper), x + 7, axes.y(upper), "main", 2))
        parts.append(line(x, axes.y(least), x, axes.y(most), "ink"))
    for finalist, timing in finalists:
        mark = square if finalist.kept else _cross
        parts.append(mark(axes.x(finalist.latency_ms), axes.y(timing.median_ms), _facts(finalist)))
    note = f"exported model: estimated {ms_text(proof.predicted_ms)}, measured {timing_text(proof.measured)}"
    parts.append(star(axes.x(proof.predicted_ms), axes.y(proof.measured.median_ms), note))
    bound = line(0, -7, 0, 7, "side", 7) + line(-7, -7, 7, -7, "main", 2)
    first = [(star(0, 0), "exported model", 140.0), (square(0, 0), "finalist", 175.0)]
    first += [(_cross(0, 0), "finalist, dropped", 0.0)]
    second = [(bound, "upper bound", 140.0), (line(-8, 6, 8, -6, "soft"), "measured = estimated", 175.0)]
    second += [_budget_legend(result)] if budget_is_near else []
    return picture(axes.height, "Measured against estimated latency", "".join(parts) + legend(first, second))


def _ends(timing: Timing) -> tuple[float, float]:
    return timing.median_ms - timing.spread_ms, timing.median_ms + timing.spread_ms
