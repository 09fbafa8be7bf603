"""The one door to the benchmarks: `python -m benchmarks --list`, `python -m benchmarks NAME [--json]`."""

import argparse
import json
from dataclasses import asdict
from importlib import import_module

from benchmarks.result import Result

BENCHMARKS = {
    "export-speed": ("benchmarks.export_speed", "milliseconds of our ShuffleNet V2 1x over those of PyTorch's export"),
    "prediction-tiny": ("benchmarks.prediction", "error of the latency table on new networks of shufflenet-tiny"),
    "prediction-224": ("benchmarks.prediction", "error of the latency table on new networks of shufflenet-224"),
    "main-job": ("benchmarks.main_job", "seconds of hwnas search --budget-ms 1 from nothing, and again"),
    "cifar10": ("benchmarks.cifar10", "a real search on CIFAR-10 against ShuffleNet V2 and against random search"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.name is None:
        for name, (_, what) in BENCHMARKS.items():
            print(f"{name:16} {what}")
        return
    result: Result = import_module(BENCHMARKS[arguments.name][0]).run(arguments.name)
    print(json.dumps(asdict(result)) if arguments.json else result.text())


if __name__ == "__main__":
    main()
