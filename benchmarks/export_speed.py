"""Our ONNX file of ShuffleNet V2 1x against PyTorch's own export of the same network, in one interleaved run."""

# pyright: reportMissingImports=false
import statistics
import tempfile
import warnings
from pathlib import Path

from benchmarks.result import Result, this_machine
from hwnas.devices import Timing
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.reference.shufflenet import shufflenet_v2

GROUPS = 15


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
    groups: list[dict[str, float]] = []
    with open_device("cpu") as cpu:
        for seed in range(GROUPS):
            found = cpu.measure_steadily(list(models.values()), Timing(sample_ms=20.0, seed=seed))
            groups.append({which: found[index].median_ms for index, which in enumerate(models)})
    medians = {which: statistics.median(group[which] for group in groups) for which in models}
    best = min((which for which in models if which != "ours"), key=lambda which: medians[which])
    ratios = [group["ours"] / group[best] for group in groups]
    value = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    return Result(
        name=name,
        value=round(value, 4),
        unit="ours / PyTorch's fastest export",
        target="at most 1.0",
        met=value <= 1.0,
        spread=f"quartiles of {GROUPS} interleaved groups {quartiles[0]:.3f} to {quartiles[2]:.3f}",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1",
        details={which: f"{median_ms:.3f} ms" for which, median_ms in medians.items()},
    )
