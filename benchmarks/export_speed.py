"""Our ONNX file of ShuffleNet V2 1x against PyTorch's own export of the same network, in one interleaved run."""

# pyright: reportMissingImports=false
import statistics
import tempfile
import warnings
from pathlib import Path

from benchmarks.result import Result, this_machine
from hwnas.devices import Timing, device
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.reference.shufflenet import shufflenet_v2

ROUNDS = 60


def torch_model(*, dynamo: bool) -> bytes:
    """PyTorch's export of ShuffleNet V2 1x at 224x224, batch 1, by one of its two exporters."""
    import torch

    from benchmarks.torch_shufflenet import ShuffleNetV2

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        image = torch.zeros(1, 3, 224, 224)
        torch.onnx.export(ShuffleNetV2().eval(), (image,), str(path), dynamo=dynamo, external_data=False, verbose=False)
        return path.read_bytes()


def run(name: str) -> Result:
    network = shufflenet_v2("1x", dialect="torchvision")
    ours = to_onnx(network, random_weights(network, 0)).SerializeToString()
    models = {"ours": ours, "PyTorch": torch_model(dynamo=True), "PyTorch, TorchScript": torch_model(dynamo=False)}
    with device("cpu") as cpu:
        found = dict(cpu.measure(list(models.values()), Timing(rounds=ROUNDS, sample_ms=20.0)))
    timings = dict(zip(models, (found[i] for i in range(len(models))), strict=True))
    best = min((which for which in models if which != "ours"), key=lambda which: timings[which].median_ms)
    pairs = zip(timings["ours"].samples_ms, timings[best].samples_ms, strict=True)
    ratios = sorted(a / b for a, b in pairs)
    value = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    return Result(
        name=name,
        value=round(value, 4),
        unit="ours / PyTorch's fastest export",
        target="at most 1.0",
        met=value <= 1.0,
        spread=f"quartiles of {ROUNDS} interleaved rounds {quartiles[0]:.3f} to {quartiles[2]:.3f}",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1",
        details={which: f"{t.median_ms:.3f} ms ± {t.spread_ms:.3f}" for which, t in timings.items()},
    )
