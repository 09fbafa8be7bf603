"""Times ONNX models in ONNX Runtime. This file runs alone on a board: it needs Python, numpy and onnxruntime only.

    python measure.py < requests.jsonl

Each line of standard input is a request, each line of standard output a piece of the answer, both JSON.

`{"conditions": true}` is answered by what and where this is, `{"profile": "a.onnx", ...}` as `profile_model` says. Any
other request is a group of models timed together:

    {"models": ["a.onnx", "b.onnx"], "threads": 1, "rounds": 9, "sample_ms": 0.5, "warm_up_runs": 3, "seed": 0}

Every model gets a session and is warmed up; then come the rounds, in each of which every model is sampled once, in an
order drawn anew, so that a drift of the machine meets all models alike. A sample is the least of so many runs that they
take `sample_ms` at least, after one run that is not counted and brings the model back into the caches. If meanwhile the
system took the processor away, the runs are repeated, a few times; the least of all counts. The answers:

    {"model": 0, "samples_ms": [0.113, 0.112, ...]}      all samples, in milliseconds, in the order of the rounds
    {"model": 1, "error": "..."}                         this model failed; the others are timed without it
    {"done": 2}                                          the end of the group
    {"error": "..."}                                     the request itself cannot be met
"""

import base64
import json
import math
import os
import platform
import random
import sys
import tempfile
import time

import numpy as np
import onnxruntime

RETAKES = 2
"""How often the runs of a sample are repeated after a disturbance; then it stands as it is."""

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


class TimedModel:
    """One model, ready to run: its session, an input of its own shape, and how many runs make a sample."""

    def __init__(self, path, threads, sample_ms, warm_up_runs, seed):
        self.session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(seed)
        self.feed = {i.name: random_input(i, rng) for i in self.session.get_inputs()}
        self.runs = 1
        for _ in range(warm_up_runs):
            self.sample_ms()
        self.runs = max(1, math.ceil(sample_ms / self.sample_ms()))

    def sample_ms(self):
        """Milliseconds of the least of `self.runs` runs, undisturbed if a few tries will do."""
        run, feed, clock = self.session.run, self.feed, time.perf_counter_ns
        least_ns = math.inf
        for _ in range(1 + RETAKES):
            run(None, feed)
            switches = forced_switches()
            for _ in range(self.runs):
                start = clock()
                run(None, feed)
                least_ns = min(least_ns, clock() - start)
            if forced_switches() == switches:
                break
        return least_ns / 1e6


def session_options(threads):
    """Sequential, all graph optimisations, `threads` threads that spin during a run and stop when it ends."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def random_input(argument, rng):
    """Values for one input of a model, in the shape that it asks for; an open size counts as 1."""
    shape = [size if isinstance(size, int) else 1 for size in argument.shape]
    if argument.type not in _NUMPY_TYPES:
        raise ValueError(f"input {argument.name} is a {argument.type}; it can be {', '.join(_NUMPY_TYPES)}")
    kind = _NUMPY_TYPES[argument.type]
    if np.issubdtype(kind, np.integer):
        limits = np.iinfo(kind)
        return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)
    return rng.standard_normal(shape).astype(kind)


def forced_switches():
    """How often the system has taken the processor away from this process; always 0 where it does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def time_group(request, answer):
    """Times the models of one request together and calls `answer` with each piece of the reply."""
    threads = request["threads"]
    if not 1 <= threads <= cores():
        raise ValueError(f"{threads} threads were asked for; this machine has {cores()} processors")
    settings = (threads, request["sample_ms"], request["warm_up_runs"], request["seed"])
    models = {}
    for index, path in enumerate(request["models"]):
        try:
            models[index] = TimedModel(path, *settings)
        except Exception as error:  # whatever a foreign model does, the others must be timed
            answer({"model": index, "error": f"{type(error).__name__}: {error}"})
    samples_ms = {index: [] for index in models}
    order = list(models)
    rng = random.Random(request["seed"])
    for _ in range(request["rounds"]):
        rng.shuffle(order)
        for index in order:
            samples_ms[index].append(models[index].sample_ms())
    for index, samples in samples_ms.items():
        answer({"model": index, "samples_ms": [float(f"{sample:.6g}") for sample in samples]})
    answer({"done": len(samples_ms)})


# ---- one model, node by node -------------------------------------------------------------------------------------

CONTROL_FLOW = ("If", "Loop", "Scan")
KEPT_INSIDE_BYTES = 1 << 14
"""Constants up to this size travel with the optimised graph: orders of channels do, kernels do not."""


def profile_model(request, answer):
    """Times one model in turn without and with the runtime's profile, and calls `answer` with each piece of the reply.

    The request: `{"profile": "a.onnx", "threads": 1, "rounds": 30, "sample_ms": 0.5, "warm_up_runs": 3, "seed": 0}`.
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
        answer(profile_of(request, answer))
    except Exception as error:  # whatever a foreign model does, it is this model's failure
        answer({"model": 0, "error": f"{type(error).__name__}: {error}"})


def profile_of(request, answer):
    """The last answer of `profile_model`."""
    path, threads, seed = request["profile"], request["threads"], request["seed"]
    plain = TimedModel(path, threads, request["sample_ms"], request["warm_up_runs"], seed)
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
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for number in range(request["rounds"]):
            samples_ms.append(plain.sample_ms())
            for _ in range(1 + plain.runs):
                session.run(None, plain.feed)
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


# ---- the machine -------------------------------------------------------------------------------------------------


def cores():
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def conditions():
    """What and where this is; see `hwnas.latency.Conditions`."""
    return {
        "chip": chip(),
        "cores": cores(),
        "runtime": "ONNX Runtime CPU",
        "runtime_version": onnxruntime.__version__,
        "governor": first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not shown",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    }


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


def first_line(path):
    """The first line of a file, or nothing if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return ""


def main():
    """Answers requests until standard input ends."""

    def answer(piece):
        print(json.dumps(piece), flush=True)

    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request.get("conditions"):
                answer({"conditions": conditions()})
            elif "profile" in request:
                profile_model(request, answer)
            else:
                time_group(request, answer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
