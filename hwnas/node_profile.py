"""The times of a model's nodes, as ONNX Runtime's own profile tells them. Runs on a board, with `measure.py`."""

import base64
import json
import os
import tempfile

CONTROL_FLOW = ("If", "Loop", "Scan")
KEPT_INSIDE_BYTES = 1 << 14
"""Constants up to this size travel with the optimised graph: orders of channels do, kernels do not."""


def profile_of(runtime, path, threads, rounds, feed, plain, on_round):
    """The last answer of `measure.profile_model`: rounds of samples without the profile and of runs with it.

    Args:
        runtime: ONNX Runtime's.
        feed: the inputs.
        plain: the same model without a profile, a `measure.TimedModel`.
        on_round: called with the number of each round that is finished.
    """
    from hwnas.runtime_onnxruntime import session_options

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
        for number in range(rounds):
            samples_ms.append(plain.sample_ms())
            for _ in range(1 + plain.runs):
                session.run(None, feed)
            on_round(number + 1)
        with open(session.end_profiling(), encoding="utf-8") as file:
            runs = node_runs(json.load(file))
        with open(graph, "rb") as file:
            content = base64.b64encode(file.read()).decode()
    nodes_ms, kept = kept_runs(runs, rounds)
    return {"samples_ms": samples_ms, "nodes_ms": nodes_ms, "nodes": kept, "graph": content}


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
