"""A program with the command line and the result file of `onnxruntime_perf_test`, in ONNX Runtime for Python.

    native_runner.py -e cpu -I -S 0 -m times -r 10 -x 1 -y 1 -o 99 -Z model.onnx result.csv
    native_runner.py --serve SOCKET      keeps ONNX Runtime loaded; a runner that finds $RUNNER_SERVER asks it to run

It needs nothing but Python with numpy and onnxruntime, and really runs the models. `$RUNNER_LOG` names a file that gets
a line for each start: the processors that it may use, and its command line. With `$RUNNER_STEADY` a model runs
once, and the durations are those of a machine that nothing disturbs (`simulated.py`).
"""

import argparse
import json
import os
import resource
import signal
import site
import socket
import sys
import time


def main(words):
    parser = argparse.ArgumentParser()
    for name in "eSmrxyo":
        parser.add_argument(f"-{name}")
    for name in "IZ":
        parser.add_argument(f"-{name}", action="store_true")
    parser.add_argument("model")
    parser.add_argument("result")
    run(parser.parse_args(words))


def run(asked):
    import numpy as np
    import onnxruntime

    assert (asked.m, asked.I) == ("times", True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = int(asked.x), int(asked.y)
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(asked.model, options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(int(asked.S))
    feed = {x.name: draw.random(x.shape, np.float32) for x in session.get_inputs()}
    session.run(None, feed)
    seconds = steady_seconds(asked) if os.environ.get("RUNNER_STEADY") else []
    while len(seconds) < int(asked.r):
        start = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - start)
    folder = os.path.basename(os.path.dirname(asked.model))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    with open(asked.result, "a", encoding="utf-8") as file:
        for number, duration in enumerate(seconds):
            file.write(f"{folder},{duration:.6g},{peak_bytes},{99},{number}\n")
    print(f"Total inference requests: {len(seconds)}")


def steady_seconds(asked):
    """What each run takes on the simulated machine, where nothing disturbs it."""
    from simulated import Costs

    with open(asked.model, "rb") as file:
        return [Costs().model_ms(file.read()) / 1e3] * int(asked.r)


def serve(path):
    """Runs each command line that comes down the socket in a process of its own, forked from this one."""
    import numpy  # noqa: F401
    import onnxruntime  # noqa: F401

    if os.environ.get("RUNNER_STEADY"):
        import simulated  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(8)
        while True:
            link, _ = listening.accept()
            if os.fork() == 0:
                try:
                    answer(link)
                finally:
                    os._exit(0)  # whatever went wrong, as when the runner was killed: nothing else of Python's end
            link.close()


def answer(link):
    """Runs the command line that comes down a connection."""
    with link, link.makefile("rw", encoding="utf-8") as line:
        asked = json.loads(line.readline())
        os.sched_setaffinity(0, asked["cores"])
        try:
            main(asked["words"])
            told = {"status": 0, "text": ""}
        except Exception as error:
            told = {"status": 1, "text": f"{type(error).__name__}: {error}"}
        line.write(json.dumps(told) + "\n")


def ask(path, words):
    """Has the process at that socket run a command line; its status."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        with link.makefile("rw", encoding="utf-8") as line:
            line.write(json.dumps({"words": words, "cores": sorted(os.sched_getaffinity(0))}) + "\n")
            line.flush()
            told = json.loads(line.readline())
    print(told["text"], file=sys.stderr)
    return told["status"]


if __name__ == "__main__":
    if log := os.environ.get("RUNNER_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps([sorted(os.sched_getaffinity(0)), sys.argv[1:]]) + "\n")
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    elif server := os.environ.get("RUNNER_SERVER"):
        sys.exit(ask(server, sys.argv[1:]))
    else:
        site.main()  # which its first line spares those who ask a server
        main(sys.argv[1:])
