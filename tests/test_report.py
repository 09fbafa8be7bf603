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

from hwnas.network import macs, parameters
from hwnas.plots import limits, ms_text, pareto_set, ticks, timing_text, winner_of
from hwnas.report import outcome, winner_picture, write_report
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
    name: str = "shufflenet-tiny", *, factors: tuple[float, ...] = (1.07, 1.01, 0.99, 1.02, 1.03), baselines: bool = True
) -> RunResult:
    """A run whose best candidate just keeps the budget as estimated; the finalists took `factors` times the estimate."""
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


def page_of(folder: Path, result: RunResult) -> str:
    return write_report(folder, result).read_text(encoding="utf-8")
