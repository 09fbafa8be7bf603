"""What `hwnas show` tells of a run, an architecture, a space, a latency table, a model, or a network by its name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hwnas.calibration import Calibration
from hwnas.cautions import texts_of
from hwnas.errors import HwnasError
from hwnas.experiments import verdicts
from hwnas.guidelines import GUIDELINES, NetworkSheet, network_sheet
from hwnas.latency import LatencyTable, load_table
from hwnas.memory import MEGABYTE, Memory
from hwnas.model_size import model_bytes
from hwnas.network import Network, macs, memory_access, parameters
from hwnas.reference import REFERENCE, reference
from hwnas.runs import RunResult, load_result
from hwnas.space import SearchSpace, lower
from hwnas.space_toml import load_space, shipped_spaces
from hwnas.stages import load_settings
from hwnas.supernet_file import file_facts, shipped_supernets
from hwnas.working_set import working_bytes


def facts_of(what: str) -> dict[str, Any]:
    """Facts for a person or a program, by name; `HwnasError` if `what` is nothing that hwnas knows."""
    path = shipped_supernets().get(what, Path(what))
    if what in shipped_spaces() or path.suffix == ".toml":
        return space_facts(load_space(what))
    if what in REFERENCE:
        return network_facts(reference(what))
    if path.is_dir():
        return run_facts(load_result(path)) | sheet_facts(network_sheet(found_network(path / "architecture.json")))
    if not path.exists():
        raise HwnasError(
            f"There is nothing called '{what}'. Show a run's folder or its architecture.json, a latency table (.json), "
            f"a model (.onnx), a supernet ({', '.join(shipped_supernets())}, or a .safetensors file), a space "
            f"({', '.join(shipped_spaces())}, or a .toml file), or a network such as {next(iter(REFERENCE))}."
        )
    if path.suffix == ".onnx":
        return model_facts(path)
    if path.suffix == ".safetensors":
        return file_facts(path)
    return network_facts(found_network(path)) if _is_architecture(path) else table_facts(load_table(path))


def space_facts(space: SearchSpace) -> dict[str, Any]:
    """The size of a space, its choices, and its two ends."""
    ends = {name: lower(space, getattr(space, name)) for name in ("smallest", "largest")}
    return {
        "space": space.name,
        "input": f"{space.input_size}x{space.input_size} RGB",
        "architectures": space.size,
        "stem": f"{space.stem_channels} channels, stride {space.stem_stride}{', max pool' * space.max_pool}",
        "choices": [f"{name}: {', '.join(map(_word, values))}" for name, values in space.choices.items()],
        "stages": [f"depth {list(stage.depth)}, width {list(stage.width)}" for stage in space.stages],
        "head": f"{space.head_channels} channels, {space.classes} classes",
        **{f"{name}_macs": macs(network) for name, network in ends.items()},
        **{f"{name}_parameters": parameters(network) for name, network in ends.items()},
    }


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def network_facts(network: Network) -> dict[str, Any]:
    """The counts of a network, for one image, and its guideline sheet."""
    return {
        "network": network.name,
        "input": "x".join(map(str, network.input.shape)),
        "macs": macs(network),
        "parameters": parameters(network),
        "memory_access": memory_access(network),
        "model_bytes": model_bytes(network),
        "model_bytes_int8": model_bytes(network, precision="int8"),
        "working_bytes": working_bytes(network),
        "units": len(network.units),
        "operators": len(network.nodes),
        **sheet_facts(network_sheet(network)),
    }


def sheet_facts(sheet: NetworkSheet) -> dict[str, Any]:
    """What a network keeps and breaks of the guidelines, and the numbers of its units, the worst first."""
    return {
        "guidelines": [finding.text for finding in sheet.findings],
        "units_worst_first": [
            {"unit": unit.name} | {guideline: round(unit.value(guideline), 3) for guideline in GUIDELINES}
            for unit in sheet.worst_first
        ],
    }


def found_network(path: Path) -> Network:
    """The network of an architecture's file; its space is the one of the run that it lies in, or the shipped one.

    Raises:
        HwnasError: the file is no architecture, or its space is not known.
    """
    try:
        text = path.read_text(encoding="utf-8")
        named = str(json.loads(text)["space"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HwnasError(f"{path} is not an architecture: {error!r}. Give the architecture.json of a run.") from None
    space = load_settings(path.parent)["space"] if path.with_name("run.json").is_file() else named
    loaded = load_space(space)
    return lower(loaded, loaded.from_json(text))


def network_of_model(what: str) -> Network | None:
    """The network of a model that hwnas exported, or of one in the literature by its name; None for any other model."""
    if what in REFERENCE:
        return reference(what)
    metadata = model_facts(Path(what))
    if "architecture" not in metadata or metadata.get("space") not in shipped_spaces():
        return None
    space = replace(load_space(metadata["space"]), classes=len(json.loads(metadata["classes"])))
    return lower(space, space.from_json(json.dumps(metadata["architecture"])))


def _is_architecture(path: Path) -> bool:
    """Whether a file is JSON with stages, as an architecture is and a latency table is not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "stages" in data


def run_facts(result: RunResult) -> dict[str, Any]:
    """What a run found and whether it kept its promise."""
    proof, winner = result.proof, result.winner
    return {
        "space": result.space,
        "data": result.data,
        "device": f"{result.device} ({result.chip}, {result.runtime})",
        "threads": result.threads,
        "batch": result.batch,
        "precision": result.precision,
        "budget_ms": result.budget_ms,
        "budget_binds": result.binds,
        "predicted_ms": proof.predicted_ms,
        "upper_ms": proof.upper_ms,
        "measured_ms": proof.measured.median_ms,
        "measured_spread_ms": proof.measured.spread_ms,
        **{requirement.name: requirement.text for requirement in proof.requirements},
        "validation_accuracy": winner.validation_accuracy,
        "test_accuracy": winner.test_accuracy,
        "macs": winner.macs,
        "parameters": winner.parameters,
        "scored_architectures": len(result.scored),
        "agreement_with_jax": f"{proof.agreement:.2%} of {proof.images} images",
        "largest_difference": proof.largest_difference,
        "baselines": {b.name: f"{b.test_accuracy:.2%} in {b.measured.median_ms:.3g} ms" for b in result.baselines},
        "seconds": result.seconds,
    }


def table_facts(table: LatencyTable) -> dict[str, Any]:
    """What a latency table was measured on, what it covers, and how far its predictions are from the truth."""
    conditions, calibration = table.conditions, table.calibration
    entries = [entry.latency_ms for entry in table.entries.values()]
    return {
        "space": table.space,
        "device": f"{conditions.device} ({conditions.chip}, {conditions.cores} cores, {conditions.system})",
        "runtime": f"{conditions.runtime} {conditions.runtime_version}",
        "threads": conditions.threads,
        "batch": conditions.batch,
        "precision": conditions.precision,
        "origin": conditions.origin,
        "measured": f"{table.started} to {table.finished}",
        "entries": len(entries),
        "fastest_unit_ms": min(entries),
        "slowest_unit_ms": max(entries),
        **check_facts(calibration, calibration.cross_coverage),
        **({"boards": [f"{one.board}: {one.text}" for one in table.boards]} if table.boards else {}),
        "memory": memory_facts(table.memory)
        if table.memory
        else f"not measured; {table.profile_command} does if it can",
        "cautions": texts_of(table.cautions),
        "guidelines": verdicts(table.guidelines)
        if table.guidelines
        else "not measured; hwnas guidelines measures them",
        "sha256": table.digest,
    }


def check_facts(calibration: Calibration, coverage: float) -> dict[str, Any]:
    """How far predictions lie from whole networks that the line has not seen, in percent of the measured time."""
    return {
        "mean_absolute_error_percent": 100 * calibration.mean_absolute_error,
        "noise_floor_percent": 100 * calibration.noise_floor,
        "bias_percent": 100 * calibration.bias,
        "within_5_percent": f"{calibration.share_within(0.05):.0%} of {len(calibration.relative_errors)} networks",
        "spearman": calibration.spearman,
        "kendall_tau": calibration.kendall_tau,
        "drift_percent": 100 * calibration.drift_ratio,
        "upper_bound_percent": 100 * calibration.upper_ratio,
        "under_the_upper_bound": f"{coverage:.0%}",
        "check": calibration.failure or "passed",
    }


def memory_facts(memory: Memory) -> list[str]:
    """How far predictions of peak memory lie from networks that they were not fitted on."""
    measured = [network.measured_bytes / MEGABYTE for network in memory.networks]
    return [
        f"{memory.intercept_bytes / MEGABYTE:.3g} MB + {memory.per_model_byte:.3g} x the file + "
        f"{memory.per_working_byte:.3g} x what is worked on at a time",
        f"mean absolute error {memory.mean_absolute_error:.2%} of {len(memory.relative_errors)} other networks; "
        f"upper bound {memory.upper_ratio:.1%} above",
        f"measured: {len(measured)} networks of {min(measured):.3g} to {max(measured):.3g} MB",
    ]


def model_facts(path: Path) -> dict[str, Any]:
    """The metadata, inputs and operators of an ONNX file. The model is read, not run."""
    import onnx
    from google.protobuf.message import DecodeError

    from hwnas.export import file_digest, operator_counts

    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise HwnasError(f"{path} is not an ONNX model, or is cut short: {error}. Export it anew.") from None
    if not model.graph.node:
        raise HwnasError(f"{path} is not an ONNX model: it holds no operators. Export it anew.")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if "architecture" in metadata:
        metadata["architecture"] = json.loads(metadata["architecture"])
    return {
        "model": str(path),
        "inputs": [_tensor_text(value) for value in model.graph.input],
        "outputs": [_tensor_text(value) for value in model.graph.output],
        "model_bytes": path.stat().st_size,
        "operators": operator_counts(path.read_bytes()),
        "sha256": file_digest(path),
        **metadata,
    }


def _tensor_text(value: Any) -> str:
    sides = [str(side.dim_param or side.dim_value) for side in value.type.tensor_type.shape.dim]
    return f"{value.name} [{', '.join(sides)}]"
