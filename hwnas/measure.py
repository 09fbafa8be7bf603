"""Times ONNX models in a runtime. With three files beside it, it runs on a board that has numpy and onnxruntime only.

    python hwnas/measure.py [RUNTIME] < requests.jsonl

The runtime is ONNX Runtime with a provider (`cpu`, the default, `cuda`, `tensorrt`), or `NAME-WHERE`: the class
`Runtime` of a file `runtime_NAME.py` beside this one. `gpu` is the first of `GPU` that works. `hwnas/runtimes.py` says
what a runtime has, and which files go to a board. Each line of standard input is a request, each line of standard
output a piece of the answer, both JSON.

`{"conditions": true}` is answered by what and where this is, `{"profile": "a.onnx", ...}` as `profile_model` says,
`{"memory": ["a.onnx"], ...}` as `measure_memory` says, `{"outputs": "a.onnx", ...}` as `send_outputs` says. Any other
request is a group of models timed together, as docs/measuring.md describes and gives the reasons for:

    {"models": ["a.onnx", "b.onnx"], "threads": 1, "rounds": 12, "patience_s": 5.0, "agreeing": 3, "tolerance": 0.02,
     "sample_ms": 1.0, "least_runs": 10, "warm_up_runs": 3, "warm_up_ms": 5.0,
     "anchor": "anchor.onnx", "anchor_ms": 0.41, "cool_down_s": 60.0, "seed": 0}

Every model gets a session and is warmed up; then come the rounds, in each of which every model is sampled once, in an
order drawn anew. A sample is the least of at least `least_runs` runs that take `sample_ms` together, after one run that
is not counted and brings the model back into the caches. Between the samples the anchor, a model that never changes, is
sampled again and again: a sample is steady if the anchor took its usual time before or after it. A model is done when
`agreeing` of its steady samples lie within `tolerance` of the least of all; these are the answer:

    {"model": 0, "samples_ms": [0.113, ...], "pace": 1.0}  in the order of the rounds; a pace above 1 tells that too few
                                                           samples were steady, and how much slower the machine was
    {"model": 1, "error": "..."}                           this model failed; the others are timed without it
    {"done": 2, "anchor_ms": 0.41, "anchor_samples_ms": [...], "celsius": 61.0, ...}   the end of the group
    {"error": "..."}                                       the request itself cannot be met
"""

import base64
import bisect
import importlib
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

if __name__ == "__main__":  # the modules of this folder are those of the package
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if path != here)]

from hwnas.machine_facts import (
    CORES,
    celsius,
    chip,
    core_fact,
    emulated,
    load_average,
    megahertz,
    pin,
    stolen_ticks,
)
from hwnas.node_profile import profile_of

PACE_TOLERANCE = 1.1
"""A sample is steady if the anchor was at most so much slower than usual before or after it. A busy neighbour on the
same core makes it 1.3 to 1.6 times slower; left to itself it repeats within 3 %."""

LEAST_PACE = 1.001
"""Of a model whose samples do not agree, though at some moment the anchor took its usual time."""

ANCHOR_RUNS, ANCHOR_SHARE = 2, 0.2
"""The anchor's samples are short, so that short disturbances are seen; they take up to this share of the time."""

COOL_BELOW_C = 5.0
"""Measuring begins when the processor is so many degrees Celsius below the first temperature at which it slows down."""

LEAST_CALLS = 2
"""Of a sample, where one call is several runs."""


class TimedModel:
    """One model, warm and ready.

    Attributes:
        run: a call that runs the model `runs_a_call` times and returns when all is done.
        runs: how many calls make a sample.
    """

    def __init__(self, run, request, clock=time.perf_counter_ns, runs_a_call=1):
        self.run, self.clock, self.runs_a_call, self.runs = run, clock, runs_a_call, 1
        start, done, once_ms = clock(), 0, math.inf
        while done < max(1, request["warm_up_runs"]) or clock() - start < request["warm_up_ms"] * 1e6:
            once_ms = self.sample_ms()
            done += 1
        needed = max(request["least_runs"], math.ceil(request["sample_ms"] / once_ms))
        self.runs = needed if runs_a_call == 1 else max(LEAST_CALLS, math.ceil(needed / runs_a_call))

    def sample_ms(self):
        """Milliseconds of a run, in the least of `self.runs` calls."""
        run, clock = self.run, self.clock
        least_ns = math.inf
        run()
        for _ in range(self.runs):
            start = clock()
            run()
            least_ns = min(least_ns, clock() - start)
        return least_ns / 1e6 / self.runs_a_call


class Anchor:
    """A model that never changes, sampled again and again: its time tells how fast the machine is just now.

    Attributes:
        samples_ms: all of this group.
        every_ns: how long other models may be sampled before it is its turn again.
    """

    def __init__(self, model, usual_ms):
        self.model, self.known_ms = model, usual_ms or math.inf
        model.runs = ANCHOR_RUNS
        self.samples_ms, self.ordered_ms, self.every_ns = [], [], math.inf
        self.sample()

    @property
    def usual_ms(self):
        """What it takes on the undisturbed machine: the lower decile of the samples, or less if less was known."""
        return min(self.known_ms, self.ordered_ms[len(self.ordered_ms) // 10])

    def sample(self):
        start = self.model.clock()
        self.samples_ms.append(self.model.sample_ms())
        bisect.insort(self.ordered_ms, self.samples_ms[-1])
        self.last_ns = self.model.clock()
        self.every_ns = min(self.every_ns, (self.last_ns - start) / ANCHOR_SHARE)

    def due(self):
        return self.model.clock() - self.last_ns > self.every_ns

    def pace(self, index):
        """How much slower than usual the machine was at sample `index`, 1 or more."""
        return max(1.0, self.samples_ms[index] / self.usual_ms)


class Machine:
    """What a group of timings needs of the world; tests have one of their own, with a scripted clock."""

    clock = staticmethod(time.perf_counter_ns)
    sleep = staticmethod(time.sleep)

    def __init__(self, runtime):
        self.runtime = runtime
        self.openers = runtime.openers

    def open(self, path, threads, seed):
        """A call that runs the model at `path`, on random inputs of its own shapes, and how often it does so."""
        model = self.runtime.open(path, threads)
        return model.repeated(random_feed(model, seed))

    def timed(self, opened, request):
        """The model that `open` made ready, with its clock."""
        run, runs_a_call = opened
        return TimedModel(run, request, self.clock, runs_a_call)

    def cores(self):
        return len(CORES)

    def pin(self, threads):
        if self.runtime.on_processor:
            pin(threads)

    def celsius(self):
        return celsius()

    def state(self):
        """What can be seen of the machine now; counters since it started are compared with those of another moment."""
        return {"load_average": load_average(), "megahertz": megahertz(), "celsius": celsius()[0], **stolen_ticks()}


# ---- runtimes ----------------------------------------------------------------------------------------------------

GPU = ("xla-gpu", "cuda")
"""What `gpu` stands for, the first choice first."""

ONNX_RUNTIME = ("cpu", "cuda", "tensorrt")
"""Runtimes that are ONNX Runtime's providers."""

NO_GPU = (
    "there is no GPU here that JAX or ONNX Runtime can use ({}). On a machine with an NVIDIA driver: "
    "pip install 'jax[cuda13]'"
)


class UnavailableError(Exception):
    """A runtime that is not installed or finds no device; the text says what to do."""


def make_runtime(name):
    """The runtime of that name; `UnavailableError` if it cannot be had here."""
    if name == "gpu":
        reasons = []
        for choice in GPU:
            try:
                return make_runtime(choice)
            except UnavailableError as error:
                reasons.append(str(error))
        raise UnavailableError(NO_GPU.format("; ".join(reasons)))
    file, where = file_of(name)
    try:
        return importlib.import_module(f"hwnas.runtime_{file}").Runtime(where)
    except ImportError as error:
        raise UnavailableError(str(error)) from None


def file_of(name):
    """`NAME` of the `runtime_NAME.py` that has a runtime, and where it shall run."""
    if name in ONNX_RUNTIME:
        return "onnxruntime", name
    file, _, where = name.partition("-")
    return file, where


def random_feed(model, seed):
    """Values for every input of a model."""
    rng = np.random.default_rng(seed)
    return {name: random_input(kind, shape, rng) for name, kind, shape in model.inputs}


def random_input(kind, shape, rng):
    if np.issubdtype(kind, np.integer):
        limits = np.iinfo(kind)
        return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)
    return rng.standard_normal(shape).astype(kind)


def send_outputs(request, runtime, answer):
    """Answers what a model computes from random inputs, which the seed makes the same everywhere.

    The request: `{"outputs": "a.onnx", "threads": 1, "seed": 0}`. The answer, or an error of the model:

        {"outputs": [{"shape": [1, 10], "float32": "..."}]}     the values in base64
    """
    try:
        model = runtime.open(request["outputs"], request["threads"])
        found = [np.asarray(values, np.float32) for values in model.outputs(random_feed(model, request["seed"]))]
        coded = [{"shape": x.shape, "float32": base64.b64encode(x.tobytes()).decode()} for x in found]
        answer({"outputs": coded})
    except Exception as error:  # whatever a foreign model does, it is this model's failure
        answer({"model": 0, "error": f"{type(error).__name__}: {error}"})


# ---- a group of models -------------------------------------------------------------------------------------------


class Group:
    """The models of one request, sampled round by round until all are done."""

    def __init__(self, request, machine, answer):
        self.request, self.machine = request, machine
        self.models = {}
        for index, opened in enumerate(self.opened(request["models"])):
            try:
                self.models[index] = self.timed(opened)
            except Exception as error:  # whatever a foreign model does, the others must be timed
                answer({"model": index, "error": f"{type(error).__name__}: {error}"})
        self.samples = {index: [] for index in self.models}
        """Milliseconds, and the number of the anchor's sample before it."""
        self.anchor = Anchor(self.timed(*self.opened([request["anchor"]])), request["anchor_ms"])

    def opened(self, paths):
        """A call for each model that waits for its session; several are made at once where the runtime gains by it."""
        threads, seed = self.request["threads"], self.request["seed"]
        with ThreadPoolExecutor(self.machine.openers) as pool:
            return [pool.submit(self.machine.open, path, threads, seed).result for path in paths]

    def timed(self, opened):
        return self.machine.timed(opened(), self.request)

    def run(self):
        rng = random.Random(self.request["seed"])
        end_ns = self.machine.clock() + self.request["patience_s"] * 1e9
        for number in itertools.count():
            order = [index for index in self.models if len(self.kept(index)) < self.request["agreeing"]]
            if not order or (number >= self.request["rounds"] and self.machine.clock() > end_ns):
                break
            rng.shuffle(order)
            for index in order:
                if self.anchor.due():
                    self.anchor.sample()
                self.samples[index].append((self.models[index].sample_ms(), len(self.anchor.samples_ms) - 1))
            self.anchor.sample()

    def paces(self, index):
        """The pace of the machine about each sample of a model: the better of the anchor's before and after it."""
        anchor = self.anchor
        return [min(anchor.pace(before), anchor.pace(before + 1)) for _, before in self.samples[index]]

    def kept(self, index):
        """The steady samples of a model that agree with the least of all: disturbances only ever lengthen a run.

        So a lower sample, even of a disturbed moment, tells that the steady ones were disturbed unseen.
        """
        samples = self.samples[index]
        most_ms = (1 + self.request["tolerance"]) * min((sample for sample, _ in samples), default=math.inf)
        pairs = zip(samples, self.paces(index), strict=True)
        return [sample for (sample, _), pace in pairs if pace <= PACE_TOLERANCE and sample <= most_ms]

    def result(self, index):
        """The kept samples, if enough agree; else the least samples of all, and the pace of the machine."""
        kept = self.kept(index)
        if len(kept) >= min(self.request["agreeing"], self.request["rounds"]):
            return {"model": index, "samples_ms": shortened(kept), "pace": 1.0}
        samples_ms = sorted(sample for sample, _ in self.samples[index])[: self.request["agreeing"]]
        pace = max(LEAST_PACE, min(self.paces(index)))
        return {"model": index, "samples_ms": shortened(samples_ms), "pace": float(f"{pace:.4g}")}


def time_group(request, answer, machine):
    """Times the models of one request together and calls `answer` with each piece of the reply."""
    threads = request["threads"]
    if not 1 <= threads <= machine.cores():
        raise ValueError(f"{threads} threads were asked for; this machine has {machine.cores()} processors")
    machine.pin(threads)
    waited_s = cool_down(machine, request["cool_down_s"])
    before = machine.state()
    group = Group(request, machine, answer)
    group.run()
    for index in group.models:
        answer(group.result(index))
    anchor = {"anchor_ms": group.anchor.usual_ms, "anchor_samples_ms": shortened(group.anchor.samples_ms)}
    answer({"done": len(group.models), **anchor, "waited_s": waited_s, "before": before, "after": machine.state()})


def cool_down(machine, most_s):
    """Waits until the processor is cool, or as long as is allowed; returns the seconds."""
    waited_s = 0.0
    while waited_s < most_s:
        now, limit = machine.celsius()
        if now is None or limit is None or now < limit - COOL_BELOW_C:
            break
        machine.sleep(1.0)
        waited_s += 1.0
    return waited_s


def shortened(samples):
    """Six significant digits: more than any timing holds."""
    return [float(f"{sample:.6g}") for sample in samples]


# ---- one model, node by node -------------------------------------------------------------------------------------


def profile_model(request, runtime, answer):
    """Times one model in turn without and with the runtime's profile, and calls `answer` with each piece of the reply.

    The request: `{"profile": "a.onnx", "threads": 1, "rounds": 30, ...}`, with the settings of a group.
    Every round takes a sample without the profile, as `time_group` does, then as many runs with it; of these the one
    whose nodes took least counts, and of the rounds, for the nodes, the quicker half. The answers:

        {"round": 1}                                     a round is finished
        {"error": "...", "model": 0}                     the model failed
        {"samples_ms": [...], "nodes_ms": [...],         of each round: without it; with it, the sum of the nodes
         "nodes": [["Conv", "conv_1", [1, 3, 8, 8], 0.1], ...],
         "graph": "..."}                                 ONNX of what really ran, in base64, without the large constants

    A node is its operator, name, shape of the first input and milliseconds a run. They stand in the order in which they
    ran, which is the order of the graph; what a node of control flow holds is part of that node.
    """
    path, threads, seed = request["profile"], request["threads"], request["seed"]
    try:
        if not hasattr(runtime, "session"):
            raise ValueError(f"{runtime.name} tells no times of nodes; ONNX Runtime does (--device cpu)")
        model = runtime.open(path, threads)
        feed = random_feed(model, seed)
        run, runs_a_call = model.repeated(feed)
        plain = TimedModel(run, request, runs_a_call=runs_a_call)
        told = profile_of(
            runtime, path, threads, request["rounds"], feed, plain, lambda number: answer({"round": number})
        )
        answer(told)
    except Exception as error:  # whatever a foreign model does, it is this model's failure
        answer({"model": 0, "error": f"{type(error).__name__}: {error}"})


# ---- memory ------------------------------------------------------------------------------------------------------

MEMORY_RUNS = 3
"""Runs of a model whose memory is measured: the runtime's arena has its full size after the second."""


def measure_memory(request, answer):
    """Measures what each model adds to the peak memory of a process, and calls `answer` with each piece of the reply.

    The request: `{"memory": ["a.onnx", "b.onnx"], "threads": 1, "seed": 0}`. Each model gets a process of its own,
    since a process need not give back what it once freed, and no second model would show its peak. The answers:

        {"model": 0, "memory_bytes": 21500000}
        {"model": 1, "error": "..."}
        {"model": 1, "not_shown": true}      the system does not tell the peak memory of a process, or it means nothing
        {"done": 2}
    """
    for index, path in enumerate(request["memory"]):
        own = {"memory_here": path, "threads": request["threads"], "seed": request["seed"]}
        run = subprocess.run(
            [*PYTHON, os.path.abspath(sys.argv[0]), *sys.argv[1:]],
            input=json.dumps(own),
            capture_output=True,
            text=True,
        )
        lines = run.stdout.splitlines() or [json.dumps({"error": f"its process ended with status {run.returncode}"})]
        answer({"model": index, **json.loads(lines[-1])})
    answer({"done": len(request["memory"])})


PYTHON = json.loads(os.environ.get("HWNAS_PYTHON") or "null") or [sys.executable]
"""What runs a Python file here; it is more than this interpreter where that runs in an emulator."""

STATUS = "/proc/self/status"


def memory_here(request, runtime):
    """How far the peak of this process's resident memory, after a session was made and run, lies above what was there.

    What was there is Python, numpy and the loaded runtime, which another program would have otherwise or not at all.
    """
    if not (runtime.shows_memory and os.path.exists(STATUS)):
        return {"not_shown": True}
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # the peak counts from now on: that of the imports is no part of the model
    before = resident_bytes("VmRSS")
    run, _ = Machine(runtime).open(request["memory_here"], request["threads"], request["seed"])
    for _ in range(MEMORY_RUNS):
        run()
    return {"memory_bytes": resident_bytes("VmHWM") - before}


def resident_bytes(name):
    """Resident memory of this process: now (`VmRSS`) or at its peak (`VmHWM`)."""
    with open(STATUS, encoding="utf-8") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))


def conditions(runtime):
    """What and where this is; see `hwnas.conditions.Conditions`."""
    return {
        "chip": runtime.chip or chip(),
        "cores": len(CORES),
        "runtime": runtime.name,
        "runtime_version": runtime.version,
        "launch_ms": runtime.launch_ms,
        "governor": core_fact(CORES[-1], "scaling_governor") or "not shown",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": load_average(),
        "origin": "emulated" if emulated() else "measured",
    }


def main():
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a runtime prints is no answer

    def answer(piece):
        print(json.dumps(piece), file=answers, flush=True)

    try:
        runtime, refusal = make_runtime(*sys.argv[1:2] or ["cpu"]), None
    except UnavailableError as error:
        runtime, refusal = None, {"error": str(error), "fault": "packages"}
    for line in sys.stdin:
        try:
            answer(refusal) if refusal else answer_request(json.loads(line), runtime, answer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def answer_request(request, runtime, answer):
    """Calls `answer` with each piece of the answer to one request."""
    if request.get("conditions"):
        answer({"conditions": conditions(runtime), "precisions": runtime.precisions})
    elif "profile" in request:
        profile_model(request, runtime, answer)
    elif "outputs" in request:
        send_outputs(request, runtime, answer)
    elif "memory" in request:
        measure_memory(request, answer)
    elif "memory_here" in request:
        try:
            answer(memory_here(request, runtime))
        except Exception as error:  # whatever a foreign model does, it is this model's failure
            answer({"error": f"{type(error).__name__}: {error}"})
    else:
        time_group(request, answer, Machine(runtime))


if __name__ == "__main__":
    main()
