"""Contract: imports go downward only, and light modules stay light.

`FLOORS` is the table of rooms. A module imports modules of lower floors; within a floor only the pairs of `SAME_FLOOR`.
Imports inside functions count: they keep start-up quick, they do not change who knows whom.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hwnas.runtimes import board_files

PACKAGE = Path(__file__).parents[1] / "hwnas"

FLOORS = {
    "errors": 0,
    "agent": 1,
    "lines": 1,
    "registry": 1,
    "relation": 1,
    "ssh": 2,
    "adb": 2,
    "android": 0,
    "perf_test": 1,
    "phone": 4,
    "machine_facts": 1,
    "network": 0,
    "working_set": 1,
    "model_size": 1,
    "drift": 1,
    "units": 1,
    "reference": 2,
    "runtime_onnxruntime": 3,
    "runtime_openvino": 3,
    "runtime_xla": 3,
    "node_profile": 3,
    "measure": 3,
    "runtimes": 4,
    "space": 2,
    "space_toml": 2,
    "calibration": 3,
    "checkpoints": 3,
    "experiments": 3,
    "guidelines": 3,
    "dense_depthwise": 3,
    "jax_layers": 3,
    "jax_network": 3,
    "conditions": 2,
    "latency": 3,
    "line": 3,
    "linear_model": 3,
    "memory": 3,
    "node_categories": 3,
    "onnx_model": 3,
    "ranking": 2,
    "side_by_side": 7,
    "supernet_file": 5,
    "quantization": 3,
    "places": 3,
    "composition": 3,
    "unit_places": 3,
    "unit_loop": 3,
    "row_layers": 3,
    "masked_units": 3,
    "narrow_units": 3,
    "pieces": 3,
    "programs": 3,
    "sliced_units": 3,
    "sliced_supernet": 3,
    "network_json": 1,
    "processes": 3,
    "spread": 3,
    "candidate_scoring": 4,
    "onnx_scoring": 4,
    "scoring": 4,
    "optimizer": 3,
    "steps": 4,
    "following": 7,
    "supernet": 3,
    "methods": 3,
    "chains": 4,
    "data": 4,
    "datasets": 4,
    "devices": 4,
    "farm": 4,
    "opening": 4,
    "image_sources": 4,
    "images": 4,
    "journal": 4,
    "lookup": 4,
    "drawing": 4,
    "event_log": 4,
    "runs": 4,
    "training": 4,
    "breakdown": 5,
    "cautions": 5,
    "evolution": 5,
    "feasible": 5,
    "predictor": 6,
    "export": 5,
    "guideline_prior": 4,
    "guideline_profiling": 5,
    "memory_profiling": 5,
    "plots": 5,
    "profiling": 5,
    "search": 5,
    "study": 4,
    "whole_networks": 5,
    "report": 6,
    "guideline_report": 6,
    "stages": 6,
    "trained": 6,
    "show": 6,
    "limits": 7,
    "pipeline": 7,
    "estimation": 6,
    "slow_tables": 6,
    "target": 7,
    "trust": 7,
    "trust_report": 7,
    "cli_trust": 8,
    "cli_devices": 8,
    "doctor": 5,
    "single": 7,
    "cli_options": 7,
    "terminal": 7,
    "cli_training": 8,
    "cli": 8,
    "__main__": 9,
    "__init__": 9,  # the package's face: it may show anything, and nothing inside imports from it
}

SAME_FLOOR = {
    "network": {"errors"},
    "space_toml": {"space"},
    "jax_layers": {"dense_depthwise"},
    "jax_network": {"jax_layers"},
    "row_layers": {"jax_layers"},
    "spread": {"processes"},
    "unit_places": {"jax_layers"},
    "masked_units": {"jax_layers", "row_layers", "unit_places"},
    "narrow_units": {"jax_layers", "row_layers", "unit_loop", "unit_places"},
    "supernet": {"jax_layers", "row_layers", "unit_places", "masked_units", "narrow_units"},
    "optimizer": {"jax_layers"},
    "unit_loop": {"row_layers"},
    "pieces": {"jax_layers", "programs", "row_layers"},
    "sliced_units": {"jax_layers", "pieces", "row_layers"},
    "sliced_supernet": {"jax_layers", "pieces", "row_layers", "sliced_units", "supernet"},
    "calibration": {"line"},
    "experiments": {"calibration"},
    "latency": {"calibration", "experiments", "line", "memory", "places"},
    "memory": {"calibration"},
    "node_profile": {"runtime_onnxruntime"},
    "measure": {"node_profile"},
    "devices": {"runtimes"},
    "farm": {"devices"},
    "opening": {"devices", "farm"},
    "onnx_model": {"quantization"},
    "datasets": {"images"},
    "image_sources": {"images"},
    "data": {"datasets", "image_sources", "images"},
    "candidate_scoring": {"data", "onnx_scoring", "scoring"},
    "onnx_scoring": {"data", "scoring"},
    "scoring": {"data"},
    "steps": {"data", "scoring"},
    "training": {"candidate_scoring", "data", "steps"},
    "memory_profiling": {"whole_networks"},
    "profiling": {"cautions", "memory_profiling", "whole_networks"},
    "cli": {"cli_devices", "cli_training", "cli_trust"},
    "pipeline": {"limits", "target"},
    "trust": {"side_by_side"},
    "trust_report": {"trust"},
    "search": {"evolution"},
    "show": {"stages"},
    "trained": {"stages"},
    "stages": {"slow_tables"},
}

HEAVY = {"jax", "flax", "optax", "orbax", "grain", "onnxruntime", "optuna", "matplotlib", "sklearn", "pyarrow", "PIL"}


def module_of(path: Path) -> str:
    """The room of a file: `space` for hwnas/space.py, `reference` for all of hwnas/reference/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str) -> set[str]:
    """Every dotted name that a source imports, at any depth; `from a import b` counts as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_rooms(source: str) -> set[str]:
    """The rooms of hwnas that a source imports; `__init__` for names of the package itself."""
    rooms = set()
    for name in imported_names(source):
        first, _, rest = name.partition(".")
        if first == "hwnas":
            room = rest.split(".")[0]
            rooms.add(room if room in FLOORS or room in ROOMS else "__init__")
    return rooms


def libraries(source: str) -> set[str]:
    """The top-level packages that a source imports, hwnas itself among them."""
    return {name.split(".")[0] for name in imported_names(source)}


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS: dict[str, list[str]] = {}
for file in FILES:
    ROOMS.setdefault(module_of(file), []).append(file.read_text(encoding="utf-8"))


def reached(room: str) -> set[str]:
    """The room itself and all rooms that it imports, directly or through others."""
    found, waiting = {room}, [room]
    while waiting:
        new = {other for source in ROOMS[waiting.pop()] for other in imported_rooms(source)} - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_module_imports_only_from_below(room: str):
    assert room in FLOORS, f"hwnas.{room} has no floor: give it one in FLOORS of {Path(__file__).name}"
    beside = SAME_FLOOR.get(room, set()) | {room}
    for other in set().union(*map(imported_rooms, ROOMS[room])):
        assert other in FLOORS, f"hwnas.{other} has no floor: give it one in FLOORS of {Path(__file__).name}"
        assert FLOORS[other] < FLOORS[room] or other in beside, (
            f"hwnas.{room} (floor {FLOORS[room]}) imports hwnas.{other} (floor {FLOORS[other]}): imports go downward"
        )


def test_neighbours_of_one_floor_do_not_import_in_a_circle():
    def walk(room: str, way: tuple[str, ...]) -> None:
        assert room not in way, f"a circle: {' -> '.join((*way, room))}"
        for other in SAME_FLOOR.get(room, ()):
            assert FLOORS[other] == FLOORS[room], f"{room} and {other} are not of one floor"
            walk(other, (*way, room))

    for room in SAME_FLOOR:
        walk(room, ())


def test_imports_inside_functions_and_of_every_form_are_seen():
    source = """
import numpy as np, hwnas.space
from hwnas import network, __version__
def late():
    if np:
        from hwnas.reference.resnet import resnet50
        import jax.numpy
"""
    assert imported_rooms(source) == {"space", "network", "__init__", "reference"}
    assert libraries(source) == {"numpy", "hwnas", "jax"}


def test_what_runs_on_a_board_needs_numpy_and_onnxruntime_and_nothing_of_ours():
    files = {name: content.decode() for name, content in board_files("cpu").items()}
    assert set().union(*map(libraries, files.values())) - sys.stdlib_module_names == {"hwnas", "numpy", "onnxruntime"}
    for source in files.values():
        assert {f"hwnas/{room}.py" for room in imported_rooms(source)} <= files.keys()


def test_the_agent_and_what_tells_of_a_board_need_python_alone():
    for room in ("agent", "machine_facts"):
        (source,) = ROOMS[room]
        assert libraries(source) <= sys.stdlib_module_names


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("runtime_")])
def test_a_runtime_is_one_file_that_can_go_to_a_board_too(room: str):
    (source,) = ROOMS[room]
    assert "hwnas" not in libraries(source)


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if FLOORS.get(room, 9) <= 2 or room in ("latency", "search", "predictor")]
)
def test_what_plans_and_searches_reaches_no_framework(room: str):
    frameworks = {"jax", "flax", "optax", "orbax", "grain", "onnx", "onnxruntime"}
    for other in reached(room):
        found = set().union(*map(libraries, ROOMS[other])) & frameworks
        assert not found, f"hwnas.{room} reaches {', '.join(found)} through hwnas.{other}"


@pytest.mark.parametrize(
    "name", ["hwnas", *(f"hwnas.{room}" for room in ("space_toml", "reference", "cli") if room in ROOMS)]
)
def test_importing_loads_no_heavy_library(name: str):
    code = f"import sys, {name}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
