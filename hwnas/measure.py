"""Times ONNX models in a runtime. This file runs alone on a board: it needs Python, numpy and onnxruntime only.

    python measure.py [RUNTIME] < requests.jsonl

The runtime is ONNX Runtime with a provider (`cpu`, the default, `cuda`, `tensorrt`), or `NAME-WHERE`: the class
`Runtime` of a file `runtime_NAME.py` beside this one. `gpu` is the first of `GPU` that works. `hwnas/runtimes.py` says
what a runtime has. Each line of standard input is a request, each line of standard output a piece of the answer, both
JSON.

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
import glob
import importlib
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

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
    if name in PROVIDERS:
        return OnnxRuntime(name)
    file, _, where = name.partition("-")
    try:
        return importlib.import_module(f"runtime_{file}").Runtime(where)
    except ImportError as error:
        raise UnavailableError(str(error)) from None


PROVIDERS = {
    "cpu": ("ONNX Runtime CPU", "CPUExecutionProvider"),
    "cuda": ("ONNX Runtime CUDA", "CUDAExecutionProvider"),
    "tensorrt": ("ONNX Runtime TensorRT", "TensorrtExecutionProvider"),
}
"""What a provider of ONNX Runtime is called in tables, and in ONNX Runtime."""

RUNS_A_CALL = 16
"""A GPU is given so many runs before it is waited for, so that it never waits for the processor."""


class OnnxRuntime:
    """ONNX Runtime with one of its providers; see `hwnas.runtimes.Runtime`."""

    def __init__(self, provider):
        try:
            import onnxruntime
        except ImportError:
            raise UnavailableError("onnxruntime is not installed: pip install onnxruntime") from None
        self.library = onnxruntime
        self.name, self.provider = PROVIDERS[provider]
        self.version = onnxruntime.__version__
        self.on_processor = self.shows_memory = provider == "cpu"
        self.precisions = ("fp32", "int8") if self.on_processor else ("fp32",)
        self.openers = 1
        self.launch_ms = 0.0
        self.chip = chip() if self.on_processor else first_gpu()
        if self.provider not in onnxruntime.get_available_providers():
            raise UnavailableError(f"this ONNX Runtime has no {self.provider}: pip install onnxruntime-gpu")

    def open(self, path, threads):
        return OnnxModel(self.session(path, session_options(threads)), on_gpu=not self.on_processor)

    def session(self, path, options):
        """A session that runs where it was asked to, as ONNX Runtime goes on without a provider that fails."""
        further = ["CUDAExecutionProvider"] if self.provider == "TensorrtExecutionProvider" else []
        session = self.library.InferenceSession(path, options, providers=[self.provider, *further])
        if session.get_providers()[0] != self.provider:
            raise ValueError(f"{self.provider} does not start here; ONNX Runtime offers {session.get_providers()}")
        return session


class OnnxModel:
    """A session of ONNX Runtime; see `hwnas.runtimes.Model`."""

    def __init__(self, session, on_gpu=False):
        self.session, self.on_gpu = session, on_gpu
        self.inputs = [(x.name, numpy_type(x), numpy_shape(x)) for x in session.get_inputs()]

    def outputs(self, feed):
        return self.session.run(None, feed)

    def repeated(self, feed):
        if not self.on_gpu:
            return lambda: self.session.run(None, feed), 1
        return self.queued(feed, "cuda"), RUNS_A_CALL

    def queued(self, feed, where):
        """A call of many runs on inputs and outputs that stay where the model runs, of which the last is waited for."""
        import onnxruntime

        binding = self.session.io_binding()
        for name, values in feed.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values, where, 0))
        for output in self.session.get_outputs():
            binding.bind_output(output.name, where)
        unfinished = onnxruntime.RunOptions()
        unfinished.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def call():
            for _ in range(RUNS_A_CALL - 1):
                self.session.run_with_iobinding(binding, unfinished)
            self.session.run_with_iobinding(binding)

        return call


def session_options(threads):
    """Sequential, all graph optimisations, `threads` threads that spin during a run and stop when it ends."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


def numpy_type(argument):
    """The type of a model's input in numpy."""
    if argument.type not in _NUMPY_TYPES:
        raise ValueError(f"input {argument.name} is a {argument.type}; it can be {', '.join(_NUMPY_TYPES)}")
    return _NUMPY_TYPES[argument.type]


def numpy_shape(argument):
    """The shape of a model's input; an open size counts as 1."""
    return [size if isinstance(size, int) else 1 for size in argument.shape]


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
        run, runs_a_call = opened()
        return TimedModel(run, self.request, self.machine.clock, runs_a_call)

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

CONTROL_FLOW = ("If", "Loop", "Scan")
KEPT_INSIDE_BYTES = 1 << 14
"""Constants up to this size travel with the optimised graph: orders of channels do, kernels do not."""


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
    try:
        answer(profile_of(request, runtime, answer))
    except Exception as error:  # whatever a foreign model does, it is this model's failure
        answer({"model": 0, "error": f"{type(error).__name__}: {error}"})


def profile_of(request, runtime, answer):
    """The last answer of `profile_model`."""
    path, threads = request["profile"], request["threads"]
    if not isinstance(runtime, OnnxRuntime):
        raise ValueError(f"{runtime.name} tells no times of nodes; ONNX Runtime does (--device cpu)")
    run, runs_a_call = Machine(runtime).open(path, threads, request["seed"])
    plain = TimedModel(run, request, runs_a_call=runs_a_call)
    samples_ms = []
    with tempfile.TemporaryDirectory() as folder:
        graph = os.path.join(folder, "graph.onnx")
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")
        options.optimized_model_filepath = graph
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "constants")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(KEPT_INSIDE_BYTES)
        )
        session = runtime.session(path, options)
        feed = random_feed(OnnxModel(session), request["seed"])
        for number in range(request["rounds"]):
            samples_ms.append(plain.sample_ms())
            for _ in range(1 + plain.runs):
                session.run(None, feed)
            answer({"round": number + 1})
        with open(session.end_profiling(), encoding="utf-8") as file:
            runs = node_runs(json.load(file))
        with open(graph, "rb") as file:
            content = base64.b64encode(file.read()).decode()
    nodes_ms, nodes = kept_runs(runs, request["rounds"])
    return {"samples_ms": samples_ms, "nodes_ms": nodes_ms, "nodes": nodes, "graph": content}


def node_runs(events):
    """The nodes of each run of a profile: lists of operator, name, shape of the first input and milliseconds."""
    runs, events_of_run = [], []
    for event in events:
        if event["name"] == "model_run":
            runs.append([node_of(event) for event in events_of_run])
            events_of_run = []
        elif event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            if event["args"]["op_name"] in CONTROL_FLOW:  # written after what it holds
                while events_of_run and events_of_run[-1]["ts"] >= event["ts"]:
                    events_of_run.pop()
            events_of_run.append(event)
    return runs


def node_of(event):
    """Operator, name, shape of the first input and milliseconds of one event of a profile."""
    shapes = [shape for kind in event["args"]["input_type_shape"][:1] for shape in kind.values()]
    name = event["name"].removesuffix("_kernel_time")
    return [event["args"]["op_name"], name, (shapes or [[]])[0], event["dur"] / 1000]


def kept_runs(runs, rounds):
    """Of each round the milliseconds of all nodes in its quickest run; the nodes' means over the quicker half of those.

    The first run of a round does not count: it brings the model back into the caches.
    """
    length = len(runs) // rounds
    if length < 2 or len(runs) != length * rounds:
        raise ValueError(f"the runtime's profile holds {len(runs)} runs and not {rounds} equal rounds; take fewer")

    def sum_ms(run):
        return sum(node[3] for node in run)

    kept = [min(runs[first + 1 : first + length], key=sum_ms) for first in range(0, len(runs), length)]
    quicker = sorted(kept, key=sum_ms)[: (rounds + 1) // 2]
    nodes = [[*same[0][:3], sum(node[3] for node in same) / len(quicker)] for same in zip(*quicker, strict=True)]
    return [sum_ms(run) for run in kept], nodes


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
            [sys.executable, os.path.abspath(__file__), *sys.argv[1:]],
            input=json.dumps(own),
            capture_output=True,
            text=True,
        )
        lines = run.stdout.splitlines() or [json.dumps({"error": f"its process ended with status {run.returncode}"})]
        answer({"model": index, **json.loads(lines[-1])})
    answer({"done": len(request["memory"])})


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


# ---- the machine -------------------------------------------------------------------------------------------------


def allowed_cores():
    """The processors that this process may use, by number."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:
        return list(range(os.cpu_count() or 1))


CORES = allowed_cores()
"""Asked once, before a measurement pins the process to some of them."""


def pin(threads):
    """Keeps this process on as many of its fastest processors as it has threads; of equals on the last ones."""
    fastest = sorted(CORES, key=lambda core: (int(core_fact(core, "cpuinfo_max_freq") or 0), core))
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, fastest[-threads:])


def conditions(runtime):
    """What and where this is; see `hwnas.latency.Conditions`."""
    return {
        "chip": runtime.chip or chip(),
        "cores": len(CORES),
        "runtime": runtime.name,
        "runtime_version": runtime.version,
        "launch_ms": runtime.launch_ms,
        "governor": core_fact(CORES[-1], "scaling_governor") or "not shown",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": load_average(),
    }


def load_average():
    """How many processes wanted to run in the last minute, on average; 0 where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def core_fact(core, name):
    """What the system says of a processor's frequency; nothing where it does not."""
    return first_line(f"/sys/devices/system/cpu/cpu{core}/cpufreq/{name}")


def megahertz():
    """The present frequency of the fastest processor; None where it is not shown."""
    shown = [int(found) / 1000 for core in CORES if (found := core_fact(core, "scaling_cur_freq")).isdigit()]
    return max(shown, default=None)


def celsius():
    """The highest temperature of the machine, and the lowest at which it would slow down; None where not shown."""
    temperatures, limits = [], []
    for zone in sorted(glob.glob("/sys/class/thermal/thermal_zone*")):
        if (found := first_line(f"{zone}/temp")).lstrip("-").isdigit():
            temperatures.append(int(found) / 1000)
            for kind in glob.glob(f"{zone}/trip_point_*_type"):
                limit = first_line(kind.removesuffix("_type") + "_temp")
                if first_line(kind) == "passive" and limit.isdigit():
                    limits.append(int(limit) / 1000)
    return max(temperatures, default=None), min(limits, default=None)


def stolen_ticks():
    """Ticks of all processors since the start, and those that the host of a virtual machine gave to others."""
    counts = [int(count) for count in first_line("/proc/stat").split()[1:9]]
    return {"ticks": sum(counts), "stolen_ticks": counts[7]} if len(counts) == 8 else {}


def chip():
    """The processor's name; on ARM, which has none, implementer and part as in `ARM 0x41 0xd0b`."""
    facts = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    if "CPU implementer" in facts:
        return f"ARM {facts['CPU implementer']} {facts.get('CPU part', '')}".strip()
    return facts.get("model name") or platform.processor() or platform.machine()


def first_gpu():
    """The name of the first NVIDIA GPU, as its driver tells it."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError):
        return (subprocess.run(asked, capture_output=True, text=True).stdout.splitlines() or ["GPU"])[0].strip()
    return "GPU"


def first_line(path):
    """The first line of a file, or nothing if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return ""


def main():
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a runtime prints is no answer

    def answer(piece):
        print(json.dumps(piece), file=answers, flush=True)

    try:
        runtime, refusal = make_runtime(*sys.argv[1:2] or ["cpu"]), None
    except UnavailableError as error:
        runtime, refusal = None, {"error": str(error)}
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
