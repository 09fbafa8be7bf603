"""The report of a run: its figures, its pictures, and text that stays text."""

import json
import random
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hwnas.drawing import label, picture
from hwnas.errors import HwnasError
from hwnas.network import macs, parameters
from hwnas.plots import limits, ms_text, pareto_set, ticks, timing_text
from hwnas.report import outcome, pareto_over_devices, winner_of, winner_picture, write_report
from hwnas.runs import Candidate, Compared, Proof, RunResult, Timing, load_result
from hwnas.space import Architecture, SearchSpace, lower
from hwnas.space_toml import load_space

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = ("pareto.svg", "predicted_measured.svg", "architecture.svg")


def candidates(space: SearchSpace, count: int, seed: int) -> list[Candidate]:
    """Sampled architectures with accuracies and latencies that grow with their MACs; best first."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        architecture = space.sample(rng)
        millions = macs(lower(space, architecture)) / 1e6
        latency_ms = 0.15 + 0.09 * millions**0.9 * rng.uniform(0.85, 1.2)
        accuracy = 0.985 - 0.2 / (1 + millions) - rng.expovariate(60)
        found.append(Candidate(as_data(architecture), accuracy, latency_ms, 1.05 * latency_ms))
    return sorted(found, key=lambda candidate: -candidate.accuracy)


def as_data(architecture: Architecture) -> dict:
    return json.loads(architecture.to_json())


def sample_result(
    name: str = "shufflenet-tiny",
    *,
    factors: tuple[float, ...] = (1.07, 1.01, 0.99, 1.02, 1.03),
    baselines: bool = True,
) -> RunResult:
    """A run whose best candidate just keeps the budget as estimated; finalists took `factors` times the estimate."""
    space = load_space(name)
    everyone = candidates(space, 250, seed=1)
    budget_ms = float(f"{everyone[0].upper_ms:.3g}") + 0.001
    scored = tuple(candidate for candidate in everyone if candidate.upper_ms <= budget_ms)
    finalists = []
    for candidate, factor in zip(scored, factors, strict=False):
        timing = Timing(candidate.latency_ms * factor, 0.008 * candidate.latency_ms, 300)
        finalists.append(replace(candidate, measured=timing, kept=timing.median_ms <= budget_ms))
    winner = next(finalist for finalist in finalists if finalist.kept)
    network = lower(space, space.from_json(json.dumps(winner.architecture)))
    measured = Timing(winner.measured.median_ms * 1.002, 0.0061, 1000)
    found = Compared("found by this run", macs(network), parameters(network), 0.9811, 0.9833, measured)
    known = (
        Compared("ShuffleNet V2 0.5x", 3_350_000, 345_906, 0.9672, 0.9694, Timing(1.132, 0.012, 1000)),
        Compared("ShuffleNet V2 1x", 11_900_000, 1_263_854, 0.9861, 0.9778, Timing(2.315, 0.031, 1000)),
    )
    return RunResult(
        space=name,
        data="digits",
        device="cpu",
        chip="Neoverse <N1> & friends",
        runtime="onnxruntime 1.32.0",
        threads=1,
        batch=1,
        precision="fp32",
        budget_ms=budget_ms,
        binds=True,
        fastest_ms=0.213,
        scored=scored,
        finalists=tuple(finalists),
        winner=found,
        proof=Proof(
            images=1437,
            agreement=1436 / 1437,
            largest_difference=3.1e-6,
            operators={"Conv": 41, "Relu": 29, "Concat": 8, "Split": 6, "Reshape": 22, "Gemm": 1},
            opset=17,
            predicted_ms=measured.median_ms * 0.985,
            upper_ms=measured.median_ms * 1.02,
            measured=measured,
            table_sha256="1f" * 32,
            model_sha256="a7" * 32,
        ),
        baselines=known if baselines else (),
        seconds={"latency table": 41.2, "supernet": 208.4, "search": 33.9, "finalists": 6.1, "training": 61.7},
    )


@pytest.fixture(scope="module")
def result() -> RunResult:
    return sample_result()


class Words(HTMLParser):
    """What a reader of the page sees as text, the pictures' words included."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.found))

    def handle_data(self, data: str) -> None:
        self.found.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def finished(folder: Path, result: RunResult, winner: Candidate | None = None) -> Path:
    """The folder with its `architecture.json`, as a run leaves it; by default the first finalist that was kept won."""
    winner = winner or next(finalist for finalist in result.finalists if finalist.kept)
    (folder / "architecture.json").write_text(json.dumps(winner.architecture), encoding="utf-8")
    return folder


def page_of(folder: Path, result: RunResult, winner: Candidate | None = None) -> str:
    finished(folder, result, winner)
    return write_report(folder, result).read_text(encoding="utf-8")


def svg_words(svg: str) -> str:
    return " | ".join(node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text"))


# ---- what it says ------------------------------------------------------------------------------------------------


def test_the_page_holds_every_figure_of_the_run_with_its_unit(tmp_path: Path, result: RunResult):
    text = Words(page_of(tmp_path, result)).text
    proof = result.proof
    assert outcome(result) in text
    for figure in (
        f"{result.budget_ms:g} ms",
        ms_text(proof.predicted_ms),
        ms_text(proof.upper_ms),
        timing_text(proof.measured),
        "1,436 of 1,437 real images",
        "3.1e-06",
        "107: 41 Conv, 29 Relu, 22 Reshape, 8 Concat, 6 Split, 1 Gemm",
        proof.model_sha256,
        proof.table_sha256,
        f"{result.winner.parameters:,}",
        "onnxruntime 1.32.0, 1 thread, batch 1, fp32",
        "208.4 s",
        "351.3 s",
    ):
        assert figure in text, figure
    for finalist in result.finalists:
        assert timing_text(finalist.measured) in text


def test_the_first_sentence_tells_accuracy_time_and_budget(result: RunResult):
    kept = replace(result, budget_ms=2, proof=replace(result.proof, measured=Timing(1.87, 0.012, 100)))
    assert outcome(kept) == (
        "shufflenet-tiny on digits for cpu (Neoverse <N1> & friends): 98.3 % test accuracy in 1.87 ± 0.01 ms measured; "
        "the budget was 2 ms."
    )
    assert outcome(replace(kept, budget_ms=1)).endswith("the budget of 1 ms is broken.")


def test_a_broken_budget_and_a_broken_promise_are_called_so(tmp_path: Path, result: RunResult):
    slow = replace(result.proof, measured=Timing(2 * result.budget_ms, 0.01, 100))
    text = Words(page_of(tmp_path, replace(result, proof=slow))).text
    assert re.search(r"Within the budget\? ✗ no", text)
    assert re.search(r"Promise kept\? ✗ no", text)
    assert "✗ no" not in Words(page_of(tmp_path, result)).text


def test_baselines_are_compared_where_there_are_some_and_the_way_to_get_them_is_told_where_not(
    tmp_path: Path, result: RunResult
):
    text = Words(page_of(tmp_path, result)).text
    assert "Compared with known networks" in text
    for row in result.baselines:
        ratio = row.measured.median_ms / result.winner.measured.median_ms
        assert f"{row.name} {100 * row.test_accuracy:.1f} %" in text
        assert f"{timing_text(row.measured)} {ratio:.2f}" in text
    alone = Words(page_of(tmp_path, replace(result, baselines=()))).text
    assert "Compared with" not in alone
    assert "hwnas search --baselines" in alone


def test_dropped_finalists_are_shown_with_the_reason(tmp_path: Path, result: RunResult):
    budget = f"{result.budget_ms:g} ms"
    text = Words(page_of(tmp_path, result)).text
    assert text.count("dropped: measured over") == 1

    edge = result.finalists[0]
    nearly = replace(edge, measured=replace(edge.measured, median_ms=0.999 * result.budget_ms), kept=False)
    on_the_edge = replace(result, finalists=(nearly, *result.finalists[1:]))
    assert f"dropped: with its spread over {budget}" in Words(page_of(tmp_path, on_the_edge)).text

    text = Words(page_of(tmp_path, result, winner=result.finalists[2])).text
    assert f"dropped: once trained and exported, measured over {budget}" in text


def test_a_run_that_dropped_nobody_speaks_of_no_drop(tmp_path: Path):
    text = Words(page_of(tmp_path, sample_result(factors=(1.0, 1.02, 1.01)))).text
    assert "dropped:" not in text
    assert text.count("✓ the winner") == 1


def test_a_budget_that_does_not_bind_is_said_and_pointed_at(tmp_path: Path, result: RunResult):
    loose = replace(result, binds=False, budget_ms=100.0)
    assert "The budget does not bind" in Words(page_of(tmp_path, loose)).text
    assert "0.213 ms (estimated)" in Words(page_of(tmp_path, loose)).text
    assert "budget 100 ms" in svg_words((tmp_path / "pareto.svg").read_text(encoding="utf-8"))
    assert "does not bind" not in Words(page_of(tmp_path, result)).text


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_all_pictures_are_well_formed_and_stand_in_the_page_too(tmp_path: Path, result: RunResult):
    page = page_of(tmp_path, result)
    for name in PICTURES:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).tag == f"{SVG}svg"
        assert "<title>" in text
    assert page.count("<svg ") == len(PICTURES)
    assert page.count("prefers-color-scheme: dark") == len(PICTURES) + 1


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path, result: RunResult):
    page = page_of(tmp_path, result)
    tags = Words(page).tags
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe", "object"}
    assert not [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")]
    assert "url(" not in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", ["shufflenet-tiny", "shufflenet-32", "shufflenet-224"])
def test_the_drawing_shows_every_unit_with_its_channels_kernel_and_groups(name: str):
    space = load_space(name)
    for seed in range(5):
        architecture = space.sample(random.Random(seed))
        drawn = winner_picture(name, Candidate(as_data(architecture), 0.9, 1.0, 1.1))
        words = svg_words(drawn).split("How to read it")[0]
        units = [unit for stage in architecture.stages for unit in stage.units]
        assert re.findall(r"\| (\d)×\d \| g(\d)", words) == [(str(u.kernel), str(u.groups)) for u in units]
        assert words.count("SE") == sum(unit.squeeze_excite for unit in units)
        assert words.count("res") == sum(unit.residual for unit in units)
        assert words.count("dw") == sum(unit.extra_depthwise for unit in units)
        lanes = re.findall(r"\| (\d+) \| (\d+) (?=\| \d×)", words)
        widths = [(stage.width, unit.split_ratio) for stage in architecture.stages for unit in stage.units]
        assert lanes == [(str(width - int(width * ratio)), str(int(width * ratio))) for width, ratio in widths]
        sides = [unit.nodes[-1].outputs[0].shape[-1] for unit in lower(space, architecture).units]
        assert f"channels, {sides[0]}×{sides[0]}" in words
        assert f"Stage 2 | {architecture.stages[0].width} channels · {sides[1]}×{sides[1]} pixels" in words


def test_a_space_that_hwnas_does_not_bring_is_drawn_without_resolutions(result: RunResult):
    winner = result.finalists[1]
    words = svg_words(winner_picture("my own", winner))
    assert "pixels" not in words
    assert "Stem" not in words
    assert words.count("Stage") == 3
    foreign = replace(winner, architecture=winner.architecture | {"stages": winner.architecture["stages"][:2]})
    assert "pixels" not in svg_words(winner_picture("shufflenet-tiny", foreign))


def test_nothing_in_the_pictures_lies_outside_of_them(tmp_path: Path, result: RunResult):
    page_of(tmp_path, replace(result, scored=result.scored[:1]))
    for name in PICTURES:
        root = ElementTree.fromstring((tmp_path / name).read_text(encoding="utf-8"))
        width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
        for circle in root.iter(f"{SVG}circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height
        for panel in root.iter(f"{SVG}rect"):
            assert float(panel.attrib["width"]) <= width
            assert float(panel.attrib["height"]) <= height


# ---- text, numbers and what can go wrong ---------------------------------------------------------------------------


def test_names_with_markup_stay_text(tmp_path: Path, result: RunResult):
    nasty = "<script>alert('x')</script> & \"co\""
    evil = replace(
        result,
        space=nasty,
        data=nasty,
        device=nasty,
        chip=nasty,
        runtime=nasty,
        precision=nasty,
        winner=replace(result.winner, name=nasty),
        baselines=(replace(result.baselines[0], name=nasty),),
        proof=replace(result.proof, operators={nasty: 1}, model_sha256=nasty),
        seconds={nasty: 1.0},
    )
    page = page_of(tmp_path, evil)
    assert "<script" not in page
    assert escape(nasty) in page
    for name in PICTURES:
        ElementTree.fromstring((tmp_path / name).read_text(encoding="utf-8"))


def test_words_in_a_picture_are_escaped():
    assert svg_words(picture(20, "a < b", label(0, 9, "1 < 2 & 3"))) == "1 < 2 & 3"


def test_a_result_that_was_saved_and_read_back_gives_the_same_report(tmp_path: Path, result: RunResult):
    page = page_of(tmp_path, result)
    result.save(tmp_path)
    assert page_of(tmp_path, load_result(tmp_path)) == page


def test_the_winner_is_the_finalist_of_architecture_json(tmp_path: Path, result: RunResult):
    with pytest.raises(HwnasError, match=r"architecture\.json cannot be read"):
        winner_of(tmp_path, result)
    assert winner_of(finished(tmp_path, result, result.finalists[3]), result) is result.finalists[3]
    with pytest.raises(HwnasError, match="is none of this run's 5 finalists"):
        winner_of(finished(tmp_path, result, result.scored[-1]), result)


def test_the_pareto_set_holds_what_nothing_beats():
    rows = [(1.0, 0.5), (2.0, 0.7), (2.0, 0.6), (3.0, 0.7), (4.0, 0.9), (5.0, 0.8)]
    points = [Candidate({}, accuracy, latency_ms, latency_ms) for latency_ms, accuracy in rows]
    assert [(c.latency_ms, c.accuracy) for c in pareto_set(reversed(points))] == [(1.0, 0.5), (2.0, 0.7), (4.0, 0.9)]


def test_over_several_devices_the_pareto_set_holds_what_is_fast_on_any_of_them():
    def scored(accuracy: float, *ms: float) -> Candidate:
        return Candidate({}, accuracy, ms[0], ms[0], elsewhere_ms=dict(zip(("gpu", "phone"), ms[1:], strict=True)))

    best, fast_here, fast_there = scored(0.9, 3.0, 2.0, 9.0), scored(0.8, 1.0, 2.0, 9.0), scored(0.8, 3.0, 1.0, 9.0)
    beaten, equal = scored(0.8, 3.0, 2.0, 9.0), scored(0.9, 3.0, 2.0, 9.0)
    assert pareto_over_devices([best, beaten, fast_here, fast_there]) == [fast_here, best, fast_there]
    assert pareto_over_devices([best, equal]) == [best, equal]


def test_latencies_have_three_figures_and_spreads_are_never_rounded_away():
    assert [ms_text(value) for value in (0.08714, 0.8714, 12.345, 1234.5, 0.0)] == [
        "0.0871 ms", "0.871 ms", "12.3 ms", "1,234 ms", "0.00 ms"
    ]  # fmt: skip
    assert timing_text(Timing(0.8714, 0.0093, 10)) == "0.871 ± 0.009 ms"
    assert timing_text(Timing(10.3624, 0.0061, 10)) == "10.362 ± 0.006 ms"
    assert timing_text(Timing(0.8714, 0.0, 10)) == "0.871 ± 0.000 ms"


@pytest.mark.parametrize("low_high", [(0.19, 3.1), (0.0, 1e-3), (93.2, 98.9), (1200.0, 1250.0), (7.0, 7.0)])
def test_axes_have_a_handful_of_round_numbers(low_high: tuple[float, float]):
    low, high = limits(low_high)
    found = ticks(low, high)
    assert 4 <= len(found) <= 12
    assert all(low <= value <= high for value, _ in found)
    assert all(float(text) == pytest.approx(value, abs=1e-12) for value, text in found)
