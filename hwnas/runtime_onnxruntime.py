"""ONNX Runtime with one of its providers, as a runtime of `measure.py`; needs numpy and onnxruntime."""

import subprocess
from contextlib import suppress

import numpy as np

try:
    import onnxruntime
except ImportError:
    raise ImportError("onnxruntime is not installed: pip install onnxruntime") from None

PROVIDERS = {
    "cpu": ("ONNX Runtime CPU", "CPUExecutionProvider"),
    "cuda": ("ONNX Runtime CUDA", "CUDAExecutionProvider"),
    "tensorrt": ("ONNX Runtime TensorRT", "TensorrtExecutionProvider"),
}
"""What a provider of ONNX Runtime is called in tables, and in ONNX Runtime."""

RUNS_A_CALL = 16
"""A GPU is given so many runs before it is waited for, so that it never waits for the processor."""


class Runtime:
    """See `hwnas.runtimes.Runtime`; `where` is one of `PROVIDERS`."""

    def __init__(self, where):
        self.name, self.provider = PROVIDERS[where]
        self.version = onnxruntime.__version__
        self.on_processor = self.shows_memory = where == "cpu"
        self.precisions = ("fp32", "int8") if self.on_processor else ("fp32",)
        self.openers = 1
        self.launch_ms = 0.0
        self.chip = "" if self.on_processor else first_gpu()
        if self.provider not in onnxruntime.get_available_providers():
            raise ImportError(f"this ONNX Runtime has no {self.provider}: pip install onnxruntime-gpu")

    def open(self, path, threads):
        return Model(self.session(path, session_options(threads)), on_gpu=not self.on_processor)

    def session(self, path, options):
        """A session that runs where it was asked to, as ONNX Runtime goes on without a provider that fails."""
        further = ["CUDAExecutionProvider"] if self.provider == "TensorrtExecutionProvider" else []
        session = onnxruntime.InferenceSession(path, options, providers=[self.provider, *further])
        if session.get_providers()[0] != self.provider:
            raise ValueError(f"{self.provider} does not start here; ONNX Runtime offers {session.get_providers()}")
        return session


class Model:
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


def first_gpu():
    """The name of the first NVIDIA GPU, as its driver tells it."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError):
        return (subprocess.run(asked, capture_output=True, text=True).stdout.splitlines() or ["GPU"])[0].strip()
    return "GPU"
