"""hwnas: the most accurate image network that runs within a time budget on the device you name.

    import hwnas

    job = hwnas.make_job("shufflenet-tiny", "digits", device="cpu")
    folder, result = hwnas.find(job, hwnas.Plan(budget_ms=1.0))
    print(hwnas.outcome(result))

    space = hwnas.load_space("shufflenet-tiny")
    table = hwnas.load_table(hwnas.measured_table(job)[0])
    network = hwnas.lower(space, space.smallest)
    print(hwnas.macs(network), table.predict(network))

What stands in `__all__` is loaded when it is first asked for; `import hwnas` loads neither JAX nor ONNX Runtime.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Architecture": "space",
    "Budget": "stages",
    "HwnasError": "errors",
    "Job": "stages",
    "Network": "network",
    "NetworkBuilder": "network",
    "Plan": "pipeline",
    "RunResult": "runs",
    "SearchSpace": "space",
    "open_device": "opening",
    "export_run": "single",
    "find": "pipeline",
    "load_data": "data",
    "load_result": "runs",
    "load_space": "space_toml",
    "load_table": "latency",
    "lower": "space",
    "macs": "network",
    "make_job": "stages",
    "measured_table": "stages",
    "outcome": "report",
    "parameters": "network",
    "profile": "profiling",
    "to_onnx": "onnx_model",
    "trained_supernet": "stages",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hwnas' has no attribute '{name}'")
    return getattr(import_module(f"hwnas.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
