"""A trust report as facts for a program, rows and sentences for a person, and a picture."""

from dataclasses import asdict
from typing import Any

from hwnas.drawing import WIDTH, label, line, picture, short_text
from hwnas.plots import Axes, dot, legend, limits, ms_text, percent_text, square, star
from hwnas.ranking import best_third
from hwnas.trust import Judged, TrustReport

HEIGHT = 460


def trust_facts(report: TrustReport) -> dict[str, Any]:
    """Everything, with what follows from it."""
    ceiling = report.ceiling
    return {
        **asdict(report),
        "kendall_tau": asdict(report.correlation),
        "kendall_tau_top_third": asdict(report.top_correlation),
        "kendall_tau_of_latency_alone": asdict(report.latency_correlation),
        "kendall_tau_of_macs_alone": asdict(report.macs_correlation),
        "kendall_tau_between_seeds": asdict(ceiling) if ceiling else None,
        "accuracy_standard_error": report.noise,
        "gaps": [one.gap for one in report.judged],
        "search_over_random": report.winners["evolution"].trained - report.winners["random"].trained,
    }


def trust_rows(report: TrustReport) -> list[tuple[str, ...]]:
    """A table with its header first: the architectures, the fastest first, then the winners of the two searches."""
    rows = [("Units × width", "Estimate", "Inherited", "From scratch", "Gap, points")]
    rows += [_row(short_text(one.architecture), one) for one in report.judged]
    return rows + [_row(f"best of {sampler}", winner) for sampler, winner in report.winners.items()]


def _row(name: str, one: Judged) -> tuple[str, ...]:
    scores = " ".join(percent_text(score) for score in one.from_scratch)
    return name, ms_text(one.latency_ms), percent_text(one.inherited), scores, f"{100 * one.gap:+.1f}"


def trust_words(report: TrustReport) -> list[str]:
    """What the report says, a sentence a line."""
    low, high = min(one.gap for one in report.judged), max(one.gap for one in report.judged)
    ours, random = report.winners["evolution"], report.winners["random"]
    lines = [
        f"Kendall tau of inherited accuracy and accuracy from scratch: {report.correlation.text}.",
        f"Within the third that is best from scratch: {report.top_correlation.text}.",
        f"Without a supernet, by latency alone: {report.latency_correlation.text}; by multiply-adds alone: "
        f"{report.macs_correlation.text}.",
    ]
    if ceiling := report.ceiling:
        lines.append(f"Between two trainings that differ in the seed alone: {ceiling.text}.")
    return [
        *lines,
        f"From scratch is {100 * low:+.1f} to {100 * high:+.1f} points above inherited; an accuracy has a standard "
        f"error of {100 * report.noise:.1f} points from the {report.validation_images:,} validation images alone.",
        f"Within {ms_text(report.budget_ms)} and by {report.trials} scored architectures each, what the search found "
        f"reaches {percent_text(ours.trained)} from scratch, and what a random search found "
        f"{percent_text(random.trained)}: {100 * (ours.trained - random.trained):+.1f} points.",
        f"Trained from scratch: {report.recipe}.",
    ]


def trust_picture(report: TrustReport) -> str:
    """Accuracy from scratch against inherited accuracy, as SVG."""
    top = {id(report.judged[index]) for index in best_third([one.trained for one in report.judged])}
    everyone = [*report.judged, *report.winners.values()]
    axes = Axes(
        limits([100 * one.inherited for one in everyone]),
        limits([100 * score for one in everyone for score in one.from_scratch]),
        HEIGHT,
    )

    def at(one: Judged) -> tuple[float, float, str]:
        note = f"{short_text(one.architecture)}: {ms_text(one.latency_ms)}, inherited {percent_text(one.inherited)}"
        note += f", from scratch {percent_text(one.trained)}"
        return axes.x(100 * one.inherited), axes.y(100 * one.trained), note

    parts = [axes.frame("validation accuracy, inherited weights, %", "validation accuracy, from scratch, %")]
    for one in everyone:
        ends = [axes.y(100 * end) for end in (min(one.from_scratch), max(one.from_scratch))]
        parts.append(line(axes.x(100 * one.inherited), ends[0], axes.x(100 * one.inherited), ends[1], "ink"))
    parts += [dot(*at(one), classes="f-main" if id(one) in top else "f-soft", r=4) for one in report.judged]
    marks = {"evolution": star, "random": square}
    parts += [marks[sampler](*at(winner)) for sampler, winner in report.winners.items()]
    first = [(dot(0, 0, classes="f-soft", r=4), "spread over latency", 170.0)]
    first += [(dot(0, 0, classes="f-main", r=4), "the best third of them", 0.0)]
    second = [(star(0, 0), "best of our search", 170.0), (square(0, 0), "best of a random search", 0.0)]
    parts.append(label(WIDTH - 16, 18, f"Kendall tau {report.correlation.tau:.2f}", anchor="end", bold=True))
    alone = f"by latency alone {report.latency_correlation.tau:.2f}, by multiply-adds {report.macs_correlation.tau:.2f}"
    parts.append(label(WIDTH - 16, 34, alone, anchor="end"))
    title = f"Accuracy from scratch against inherited accuracy: {report.space} on {report.data}"
    return picture(axes.height, title, "".join(parts) + legend(first, second))
