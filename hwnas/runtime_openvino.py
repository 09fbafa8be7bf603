"""OpenVINO on the processor, as a runtime of `measure.py`; needs numpy and openvino.

Arithmetic is pinned to float: on processors with AMX or AVX512-BF16 OpenVINO would otherwise take bfloat16.
"""

import numpy as np

try:
    import openvino
except ImportError:
    raise ImportError("openvino is not installed: pip install openvino") from None

_NUMPY_TYPES = {"f32": np.float32, "f16": np.float16, "u8": np.uint8, "i8": np.int8}


class Runtime:
    """See `hwnas.runtimes.Runtime`."""

    name, version = "OpenVINO CPU", openvino.__version__
    chip = ""
    precisions = ("fp32", "int8")
    on_processor, shows_memory, openers, launch_ms = True, True, 1, 0.0

    def __init__(self, where: str) -> None:
        self._core = openvino.Core()

    def open(self, path: str, threads: int) -> "Model":
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # the process is pinned already
        }
        return Model(self._core.compile_model(path, "CPU", settings))


class Model:
    """See `hwnas.runtimes.Model`."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self.inputs = [(x.any_name, _NUMPY_TYPES[x.element_type.get_type_name()], x.shape) for x in compiled.inputs]

    def outputs(self, feed):
        self.repeated(feed)[0]()
        return [self._request.get_tensor(output).data.copy() for output in self._compiled.outputs]

    def repeated(self, feed):
        self._feed = feed  # whose memory the tensors share
        for name, values in feed.items():
            self._request.set_tensor(name, openvino.Tensor(values, shared_memory=True))
        return self._request.infer, 1
