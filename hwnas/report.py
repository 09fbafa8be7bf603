"""The report of a run: one HTML file that needs nothing else, and its pictures as SVG files."""

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from hwnas.drawing import FONT, architecture_picture, short_text, themed
from hwnas.errors import HwnasError
from hwnas.plots import (
    accuracy_floor,
    latency_plot,
    ms_text,
    pareto_plot,
    pareto_set,
    percent_text,
    timing_text,
)
from hwnas.runs import Candidate, Compared, RunResult, write_text
from hwnas.space import SearchSpace, lower
from hwnas.space_toml import load_space, shipped_spaces


def write_report(folder: Path, result: RunResult) -> Path:
    """Writes `report.html`, `pareto.svg`, `predicted_measured.svg` and `architecture.svg`; returns the first's path.

    Args:
        folder: of the run; its `architecture.json` says which finalist became the model.
        result: what the run found.

    Raises:
        HwnasError: `architecture.json` is missing, broken or of no finalist, or a file cannot be written.
    """
    winner = winner_of(folder, result)
    pictures = {
        "pareto.svg": pareto_plot(result, winner),
        "predicted_measured.svg": latency_plot(result),
        "architecture.svg": winner_picture(result.space, winner),
    }
    for name, svg in pictures.items():
        write_text(folder / name, svg + "\n")
    path = folder / "report.html"
    write_text(path, _page(result, winner, *pictures.values()))
    return path


def winner_of(folder: Path, result: RunResult) -> Candidate:
    """The finalist that became the model of the run in `folder`."""
    path = folder / "architecture.json"
    try:
        architecture = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HwnasError(f"{path} cannot be read ({error}). Run hwnas search again to finish the run.") from None
    for finalist in result.finalists:
        if finalist.architecture == architecture:
            return finalist
    raise HwnasError(f"{path} is none of this run's {len(result.finalists)} finalists. Run hwnas search again.")


def outcome(result: RunResult) -> str:
    """What came out, in one sentence."""
    proof, budget = result.proof, result.budget_ms
    within = proof.measured.median_ms <= budget
    further = "".join(f" {requirement.text};" for requirement in proof.requirements)
    ending = f"the budget was {budget:g} ms." if within else f"the budget of {budget:g} ms is broken."
    return (
        f"{result.space} on {result.data} for {result.device} ({result.chip}): "
        f"{percent_text(result.winner.test_accuracy)} test accuracy in {timing_text(proof.measured)} measured;"
        f"{further} {ending}{unmeasured(result)}"
    )


def unmeasured(result: RunResult) -> str:
    """What the reader must know of a latency table that was not measured on a real device."""
    if result.origin == "measured":
        return ""
    return f" The latency table is {result.origin}, not measured."


def winner_picture(space_name: str, winner: Candidate) -> str:
    """The winner's architecture as SVG; with resolutions, stem and head where the space is one that hwnas brings."""
    architecture = winner.architecture
    title = f"Architecture found in {space_name}"
    try:
        space = load_space(space_name) if space_name in shipped_spaces() else None
        chosen = space.from_json(json.dumps(architecture)) if space else None
    except HwnasError:  # a space of the user's own that has the name of a shipped one
        space = chosen = None
    if space is None or chosen is None:
        return architecture_picture(architecture, title)
    sides = {unit.name: unit.nodes[-1].outputs[0].shape[-1] for unit in lower(space, chosen).units}
    return architecture_picture(
        architecture,
        title,
        stem=_stem_text(space, sides["stem"]),
        resolutions=[sides[f"stage{number}.1"] for number in range(2, 2 + len(space.stages))],
        head=f"1×1 convolution to {space.head_channels} channels, mean, classifier",
    )


def _stem_text(space: SearchSpace, side: int) -> str:
    pool = ", max pool" if space.max_pool else ""
    size = space.input_size
    return f"{size}×{size} RGB → 3×3 conv{pool} → {space.stem_channels} channels, {side}×{side}"


# ---- the page ----------------------------------------------------------------------------------------------------

STYLE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 FONT }
main { max-width: 1060px; margin: 0 auto; padding: 24px 16px 48px }
h1 { font-size: 1.5rem; line-height: 1.35; margin: 0 0 20px; text-wrap: pretty }
h2 { font-size: 1.1rem; margin: 0 0 10px }
p { margin: 8px 0 } p, li { max-width: 75ch }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-bottom: 16px; min-width: 0 }
.two { display: grid; gap: 0 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)) }
.two section { height: calc(100% - 16px) }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-bottom: 16px }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 650 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; font-size: .9rem } tr:last-child > * { border-bottom: 0 }
td.number, th.number { text-align: right; white-space: nowrap } td:last-child, th:last-child { padding-right: 0 }
.figures td { white-space: nowrap } .figures td:last-child:not(.number) { white-space: normal; min-width: 12em }
.figures th.number { white-space: normal }
tr.chosen > * { font-weight: 650 }
dl { margin: 0 } dl div { display: grid; grid-template-columns: 1fr auto; padding: 6px 0;
  border-bottom: 1px solid var(--line) } dl div:last-child { border-bottom: 0 }
dt { font-weight: 600 } dd { margin: 0; font-variant-numeric: tabular-nums } dd.soft { grid-column: 1 / -1 }
code { font: .85em/1.4 ui-monospace, 'DejaVu Sans Mono', monospace; overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto } .drawing svg { max-width: 660px; margin: 0 auto }
.good { color: var(--good) } .bad { color: var(--bad) }
.bar { display: block; height: 8px; margin: 8px 0 0 8px; min-width: 2px; border-radius: 4px; background: var(--main) }
.note { border-left: 4px solid var(--half) }
@media (max-width: 600px) { main { padding: 16px 8px } h1 { font-size: 1.25rem } section { padding: 14px 12px } }
""".replace("FONT", FONT)


UNIT_SPACE = re.compile(r"(?<=\d) (?=%|ms\b|±|million)|(?<=±) (?=\d)")
"""Spaces at which a line must not break."""


def _page(result: RunResult, winner: Candidate, pareto: str, latency: str, architecture: str) -> str:
    colours = ":root { color-scheme: light dark }\n"
    colours += themed(lambda name, value: f":root {{ --{name}: {value} }}")
    sections = [
        f"<h1>{escape(outcome(result))}</h1>",
        _tiles(result),
        _budget_note(result),
        _promise(result),
        _section("The architecture", f'<div class="drawing">{architecture}</div>'),
        f'<div class="two">{_pareto(result, pareto)}{_latency(latency)}</div>',
        *_over_devices(result),
        _comparison(result),
        _finalists(result, winner),
        f'<div class="two">{_proof(result)}{_seconds(result)}</div>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(f'{result.space} on {result.data} for {result.device}: hwnas')}</title>\n"
        f"<style>{colours}{STYLE}</style></head>\n<body><main>\n"
        + UNIT_SPACE.sub("\u00a0", "\n".join(sections))
        + "\n</main></body></html>\n"
    )


def _section(title: str, *content: str, note: bool = False) -> str:
    return f"<section{' class=note' if note else ''}><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _paragraph(words: str, soft: bool = True) -> str:
    return f"<p{' class=soft' if soft else ''}>{escape(words)}</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int, chosen: int | None = None) -> str:
    """A table of ready HTML cells; the `numbers` columns after the first are numbers, row `chosen` stands out."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if 1 <= i <= numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row)
        )

    body = "".join(
        f"<tr{' class=chosen' if index == chosen else ''}>{cells('td', row)}</tr>" for index, row in enumerate(rows)
    )
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    kind = " class=figures" if numbers > 1 else ""
    return f'<div class="scroll"><table{kind}>{top}<tbody>{body}</tbody></table></div>'


def _verdict(kept: bool, yes: str, no: str) -> str:
    return f'<span class="good">✓ {escape(yes)}</span>' if kept else f'<span class="bad">✗ {escape(no)}</span>'


def _conditions(result: RunResult) -> str:
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    return f"on {result.device} ({result.chip}), {result.runtime}, {threads}, batch {result.batch}, {result.precision}"


# ---- sections ----------------------------------------------------------------------------------------------------


def _tiles(result: RunResult) -> str:
    winner = result.winner
    tiles = (
        (percent_text(winner.test_accuracy), "test accuracy"),
        (ms_text(result.proof.measured.median_ms), f"measured, of {result.budget_ms:g} ms"),
        (_millions(winner.macs), "multiply-adds (MACs)"),
        (f"{winner.parameters:,}", "parameters"),
    )
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{a}</b><span class=soft>{b}</span></div>" for a, b in tiles)
        + "</div>"
    )


def _budget_note(result: RunResult) -> str:
    fastest = f"The fastest architecture found in the space needs at most {ms_text(result.fastest_ms)} (estimated)."
    if result.binds:
        return ""
    words = (
        f"By the latency table's upper bound, every architecture of {result.space} runs within {result.budget_ms:g} ms "
        f"here, so accuracy alone decided. {fastest}"
    )
    return _section("The budget does not bind", _paragraph(words, soft=False), note=True)


def _promise(result: RunResult) -> str:
    proof, budget = result.proof, result.budget_ms
    measured = proof.measured
    difference = measured.median_ms / proof.predicted_ms - 1
    within, below = measured.median_ms <= budget, measured.median_ms <= proof.upper_ms
    exported = f"of the exported model, {measured.samples:,} samples; {100 * difference:+.1f} % against the promise"
    room = f"{ms_text(abs(budget - measured.median_ms))} {'to spare' if within else 'too slow'}, as measured"
    bound = f"the measured time is {'not ' if below else ''}above the upper bound"
    rows = (
        ("Budget", "asked for", f"{budget:g} ms"),
        ("Promise", "estimated from the latency table, corrected by the finalists", ms_text(proof.predicted_ms)),
        ("Upper bound", "estimated; the search compares this bound with the budget", ms_text(proof.upper_ms)),
        ("Measured", exported, timing_text(measured)),
        ("Within the budget?", room, _verdict(within, "yes", "no")),
        ("Promise kept?", bound, _verdict(below, "yes", "no")),
    )
    rows += tuple(
        (
            f"Limit on {limited.name}",
            f"at most {limited.limit:g} {limited.unit} asked for, {limited.promised:.4g} {limited.unit} promised "
            f"(upper estimate), {limited.measured:.4g} {limited.unit} measured",
            _verdict(limited.kept, "kept", "broken"),
        )
        for limited in proof.requirements
    )
    facts = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd><dd class=soft>{escape(source)}</dd></div>"
        for name, source, value in rows
    )
    words = (
        f"Measured {_conditions(result)}. Each measured time is the median of its samples ± half their inter-quartile "
        "range. Estimates are sums over the latency table's units." + unmeasured(result)
    )
    return _section("What was promised, and what was measured", f"<dl>{facts}</dl>", _paragraph(words))


def _pareto(result: RunResult, svg: str) -> str:
    hidden = sum(candidate.accuracy < accuracy_floor(result) for candidate in result.scored)
    words = (
        "Each dot is an architecture that the search scored: accuracy on the validation images with weights inherited "
        "from the supernet, and latency as the table estimates it. "
        f"{len(pareto_set(result.scored))} of {len(result.scored):,} are in the Pareto set: no other is at least as "
        "fast and more accurate. The search holds the upper bound, not the estimate, to the budget."
    )
    if result.held_out:
        words += f" A predictor, trained on the first {result.held_out.count}, chose the others. {result.held_out.text}"
    if hidden:
        words += f" Not shown: {hidden:,} less accurate than {percent_text(accuracy_floor(result))}."
    return _section("Accuracy and latency", svg, _paragraph(words))


def pareto_over_devices(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those than which no other is more accurate without being slower on some device; the fastest on the first first.

    All of them have estimates for the same devices.
    """

    def beats(other: Candidate, one: Candidate) -> bool:
        pairs = [(other.latency_ms, one.latency_ms)]
        pairs += [(other.elsewhere_ms[name], ms) for name, ms in one.elsewhere_ms.items()]
        as_good = other.accuracy >= one.accuracy and all(theirs <= ours for theirs, ours in pairs)
        return as_good and (other.accuracy > one.accuracy or any(theirs < ours for theirs, ours in pairs))

    kept = [one for one in candidates if not any(beats(other, one) for other in candidates)]
    return sorted(kept, key=lambda one: one.latency_ms)


def _over_devices(result: RunResult) -> list[str]:
    """The trade between the devices of a search for several."""
    devices = list(result.scored[0].elsewhere_ms)
    if not devices:
        return []
    rows = [
        (
            escape(short_text(one.architecture)),
            percent_text(one.accuracy),
            *map(ms_text, (one.latency_ms, *one.elsewhere_ms.values())),
        )
        for one in pareto_over_devices(result.scored)
    ]
    head = ("Units × width", "Validation accuracy", *(f"On {escape(name)}" for name in (result.device, *devices)))
    words = (
        f"The {len(rows)} of {len(result.scored):,} scored architectures that no other beats: none is at least as "
        "accurate and as fast on every device, and better in one of these. Accuracy is with inherited weights; "
        "latencies are estimates of each device's table."
    )
    return [_section("What each device costs", _table(head, rows, numbers=len(head) - 1), _paragraph(words))]


def _latency(svg: str) -> str:
    words = (
        "The finalists and the exported model, measured whole. A tinted bar reaches from the estimate to its upper "
        "bound; the thin line is the spread of the samples. A finalist's estimate is from before it was measured; the "
        "exported model's has learned from the finalists."
    )
    return _section("Predicted and measured latency", svg, _paragraph(words))


def _comparison(result: RunResult) -> str:
    own = result.winner.measured.median_ms

    def row(compared: Compared) -> tuple[str, ...]:
        return (
            escape(compared.name),
            percent_text(compared.test_accuracy),
            percent_text(compared.validation_accuracy),
            timing_text(compared.measured),
            f"{compared.measured.median_ms / own:.2f}",
            _millions(compared.macs),
            f"{compared.parameters:,}",
        )

    head = ("Network", "Test accuracy", "Validation accuracy", "Latency, measured", "Relative", "MACs", "Parameters")
    table = _table(head, [row(c) for c in (result.winner, *result.baselines)], numbers=6, chosen=0)
    words = (
        "Accuracy after training, on images that the search never saw (test) and on those it scored on (validation). "
    )
    if result.baselines:
        words += (
            "All were trained by one recipe, the baselines from new weights for as many epochs as supernet and winner "
            f"together, and measured in the same minutes, {_conditions(result)}. "
        )
        words += "Relative: their measured time over that of the network found."
        return _section("Compared with known networks", table, _paragraph(words))
    words += "No baselines were trained in this run: hwnas search --baselines adds ShuffleNet V2 0.5x and 1x."
    return _section("The network found", table, _paragraph(words))


def _finalists(result: RunResult, winner: Candidate) -> str:
    rows = [
        (
            escape(short_text(finalist.architecture)),
            percent_text(finalist.accuracy),
            ms_text(finalist.latency_ms),
            ms_text(finalist.upper_ms),
            timing_text(finalist.measured) if finalist.measured else "not measured",
            _reason(finalist, winner, result.budget_ms),
        )
        for finalist in result.finalists
    ]
    head = ("Units × width", "Validation accuracy", "Estimate", "Upper bound", "Measured", "What became of it")
    chosen = next(i for i, finalist in enumerate(result.finalists) if finalist is winner)
    words = (
        "Units × width: of stages 2, 3 and so on. Validation accuracy is with inherited weights. These were measured "
        "as ONNX models before any further training; what they taught went into the promise above."
    )
    table = _table(head, rows, numbers=4, chosen=chosen)
    return _section("Finalists", table, _paragraph(words))


def _reason(finalist: Candidate, winner: Candidate, budget_ms: float) -> str:
    """What became of a finalist, as HTML; one is kept if the spread, too, is within the budget."""
    if finalist is winner:
        return _verdict(True, "the winner", "")
    if finalist.measured is None:
        return "not measured"
    if finalist.measured.median_ms > budget_ms:
        return _verdict(False, "", f"dropped: measured over {budget_ms:g} ms")
    if broken := [requirement for requirement in finalist.requirements if not requirement.kept]:
        return _verdict(False, "", f"dropped: {broken[0].text}")
    if not finalist.kept:
        return _verdict(False, "", f"dropped: with its spread over {budget_ms:g} ms")
    if finalist.accuracy > winner.accuracy:
        return _verdict(False, "", f"dropped: once trained and exported, measured over {budget_ms:g} ms")
    return "within the budget"


def _proof(result: RunResult) -> str:
    proof = result.proof
    same = round(proof.agreement * proof.images)
    operators = ", ".join(f"{count} {name}" for name, count in sorted(proof.operators.items(), key=lambda o: -o[1]))
    rows = (
        ("Same answer as JAX", f"{same:,} of {proof.images:,} real images"),
        ("Largest logit difference", f"{proof.largest_difference:.2g}"),
        ("ONNX operator set", str(proof.opset)),
        ("Operators", f"{sum(proof.operators.values())}: {escape(operators)}"),
        ("Model, SHA-256", f"<code>{escape(proof.model_sha256)}</code>"),
        ("Latency table, SHA-256", f"<code>{escape(proof.table_sha256)}</code>"),
    )
    return _section("Proof of the exported model", _table((), rows, numbers=0))


def _seconds(result: RunResult) -> str:
    longest, total = max(result.seconds.values(), default=1.0), sum(result.seconds.values())
    rows = [
        (
            escape(name),
            f"{seconds:,.1f} s",
            f'<span class="bar" style="width:{9 * seconds / longest if longest else 0:.2f}rem"></span>',
        )
        for name, seconds in result.seconds.items()
    ]
    rows.append(("<b>together</b>", f"<b>{total:,.1f} s</b>", ""))
    words = "Wall time of the stages that ran; what was there already took none."
    return _section("Where the time went", _table((), rows, numbers=1), _paragraph(words))


def _millions(macs: int) -> str:
    return f"{macs / 1e6:,.2f} million" if macs < 1e8 else f"{macs / 1e6:,.0f} million"
