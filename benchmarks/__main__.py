"""The one door to the benchmarks: `python -m benchmarks --list`, `python -m benchmarks NAME [--json]`."""

import argparse
import json
from dataclasses import asdict
from importlib import import_module

from benchmarks.result import Result

BENCHMARKS = {
    "export-speed": ("benchmarks.export_speed", "milliseconds of our ShuffleNet V2 1x over those of PyTorch's export"),
    "measuring-protocol": ("benchmarks.measuring", "how well ways to sum up samples repeat"),
    "measuring-methods": ("benchmarks.measuring", "which way to time a unit predicts whole networks best"),
    "profile-time-tiny": ("benchmarks.profile_time", "seconds of a complete latency table of shufflenet-tiny"),
    "profile-time-32": ("benchmarks.profile_time", "seconds of a complete latency table of shufflenet-32"),
    "profile-time-224": ("benchmarks.profile_time", "seconds of a complete latency table of shufflenet-224"),
    "table-repeat": ("benchmarks.profile_time", "how far two latency tables of shufflenet-tiny agree"),
    "prediction-tiny": ("benchmarks.prediction", "error of the latency table on new networks of shufflenet-tiny"),
    "prediction-32": ("benchmarks.prediction", "the same of shufflenet-32"),
    "prediction-224": ("benchmarks.prediction", "the same of shufflenet-224"),
    "prediction-2-threads": ("benchmarks.prediction", "the same of shufflenet-tiny with 2 threads"),
    "prediction-batch-8": ("benchmarks.prediction", "the same of shufflenet-tiny at batch 8"),
    "prediction-int8": ("benchmarks.prediction", "the same of shufflenet-tiny in int8"),
    "prediction-openvino": ("benchmarks.prediction", "the same of shufflenet-tiny in OpenVINO"),
    "estimated-table": ("benchmarks.estimated_table", "error of tables estimated from another and a few networks"),
    "arm-estimates": ("benchmarks.arm_estimates", "the same idea on published numbers of real ARM processors"),
    "bound-coverage": ("benchmarks.prediction", "share of fresh networks under their upper estimate"),
    "budget-kept": ("benchmarks.budget_kept", "share of searches whose winner keeps its budget as measured"),
    "guideline-prior": ("benchmarks.searches", "what the guidelines' prior gains a search, over several seeds"),
    "macs-against-latency": ("benchmarks.searches", "accuracy at equal latency: limited by latency or by MACs"),
    "lookup-speed": ("benchmarks.lookup_speed", "architectures of shufflenet-224 predicted in a second, in one call"),
    "predictor-speed": ("benchmarks.predictor_speed", "seconds to rank 100,000 feasible candidates by a predictor"),
    "train-speed": ("benchmarks.training_speed", "training ShuffleNet V2 1x at 32x32 against PyTorch"),
    "supernet-speed": ("benchmarks.training_speed", "training the supernet of shufflenet-32 against PyTorch"),
    "score-speed": ("benchmarks.training_speed", "scoring candidates of shufflenet-32 against PyTorch"),
    "remote-overhead": ("benchmarks.remote", "milliseconds and wall time over ssh against the same here"),
    "remote-agreement": ("benchmarks.remote_agreement", "a latency table by ssh against two measured here, in turn"),
    "dead-board": (
        "benchmarks.dead_board",
        "seconds that a dead board holds up a run beyond its time-out",
    ),
    "bare-board": (
        "benchmarks.bare_board",
        "commands from a bare arm64 Debian, emulated, to the first entry of a table",
    ),
    "kill-resume": ("benchmarks.kill_resume", "a training killed 30 times and resumed, and 400 flipped bits"),
    "gpu-training": ("benchmarks.gpu_training", "training on a GPU against PyTorch, the floors and idleness"),
    "main-job": ("benchmarks.main_job", "seconds of hwnas search --budget-ms 1 from nothing, and again"),
    "rank-correlation": ("benchmarks.rank_correlation", "how well a supernet ranks networks trained on CIFAR-10"),
    "inherited-ranking": ("benchmarks.inherited_ranking", "how a supernet ranks networks that were trained already"),
    "training-methods": ("benchmarks.training_methods", "ways to train a supernet at equal images, by how they rank"),
    "gpu-table": (
        "benchmarks.gpu_table",
        "guidelines, latency table and its check on a GPU, kept as they are measured",
    ),
    "against-shufflenet": ("benchmarks.against", "a search on CIFAR-10 against ShuffleNet V2 at equal latency"),
    "against-random": ("benchmarks.against", "the same search against a random one with as many evaluations"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.name is None:
        for name, (_, what) in BENCHMARKS.items():
            print(f"{name:22} {what}")
        return
    result: Result = import_module(BENCHMARKS[arguments.name][0]).run(arguments.name)
    print(json.dumps(asdict(result)) if arguments.json else result.text())


if __name__ == "__main__":
    main()
