"""XLA through JAX, on the processor or the first GPU, as a runtime of `measure.py`; needs numpy, onnx and jax.

The ONNX graph is run with channels last, as JAX's own networks are, and convolutions take the form that is fastest in
XLA (`jax_layers.convolution` has the reasons): a depthwise one is a sum of shifted products, a 1x1 one a matrix
product. Batch norms are folded in the file already. Arithmetic is float, without the shorter products of tensor cores.

On a GPU one call is `RUNS` runs in a loop on the device, each on an input that the loop's counter picks, so that
nothing can be moved out of it; what a call costs that does nothing is told apart (`launch_ms`). Autotuning is off: it
would take a second or more for each of hundreds of models, and choose another kernel for the same layer now and then.
Serve with the same options, `GPU_OPTIONS`.
"""

import hashlib
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # another process may train on the same GPU

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import onnx
    from jax import lax
    from onnx import numpy_helper
except ImportError as error:
    raise ImportError(f"{error.name} is not installed: pip install jax onnx") from None

RUNS, INPUTS = 16, 2
"""Of a call on a GPU: how many runs, and on how many inputs in turn."""

GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

KEPT = 512
"""Compiled models that are remembered: the anchor comes with each group, and what was disturbed is timed again."""

LAUNCHES = 50
"""Calls that do nothing, of which the median is told."""


class Runtime:
    """See `hwnas.runtimes.Runtime`; `where` is `cpu` or `gpu`."""

    precisions = ("fp32",)

    def __init__(self, where: str) -> None:
        jax.config.update("jax_default_matmul_precision", "highest")
        self._compiled: OrderedDict[str, Model] = OrderedDict()
        self._threads: int | None = None
        self._options: dict[str, str | bool] = {}
        self.name, self.version, self.chip = f"XLA {where.upper()}", f"jax {jax.__version__}", ""
        self.on_processor, self.openers, self.launch_ms = where == "cpu", 1, 0.0
        self.shows_memory = False  # what compiling takes hides what running does
        if self.on_processor:  # its pool of threads is made at the first use, when the process is pinned
            jax.config.update("jax_platforms", "cpu")
            return
        try:
            device = jax.devices("gpu")[0]
        except RuntimeError as error:
            raise ImportError(f"JAX sees no GPU: {str(error).splitlines()[0]}") from None
        self.version += f", {' '.join(device.client.platform_version.split())}"
        self._options = {name: value for name, value in GPU_OPTIONS.items() if accepts(name, value)}
        if self._options:
            self.version += "".join(f", {name.removeprefix('xla_gpu_')} {value}" for name, value in GPU_OPTIONS.items())
        self.chip = device.device_kind
        self.openers = os.cpu_count() or 1
        self.launch_ms = launch_ms()

    def open(self, path: str, threads: int) -> "Model":
        if self.on_processor and threads != (self._threads or threads):
            raise ValueError(f"this process was started for {self._threads} threads; start another for {threads}")
        self._threads = threads
        content = Path(path).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._compiled:
            runs = 1 if self.on_processor else RUNS
            self._compiled[digest] = Model(onnx.load_model_from_string(content), runs, self._options)
        self._compiled.move_to_end(digest)
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return self._compiled[digest]


def accepts(option: str, value: str | bool) -> bool:
    """Whether this version of XLA has an option of the compiler."""
    try:
        jax.jit(lambda x: x + 1).lower(jnp.zeros(())).compile({option: value})
    except RuntimeError:
        return False
    return True


def launch_ms() -> float:
    """What a call that does next to nothing takes until its end is seen, in milliseconds: the median of some."""
    nothing, value = jax.jit(lambda x: x + 1), jnp.zeros(())
    nothing(value).block_until_ready()
    times_ns = []
    for _ in range(LAUNCHES):
        start = time.perf_counter_ns()
        nothing(value).block_until_ready()
        times_ns.append(time.perf_counter_ns() - start)
    return float(f"{statistics.median(times_ns) / 1e6:.4g}")


class Model:
    """See `hwnas.runtimes.Model`: a compiled graph, whose feature maps are `[N, H, W, C]` outside too.

    Args:
        model: of one float input.
        runs: how many are in a call.
        options: of the compiler.
    """

    def __init__(self, model: onnx.ModelProto, runs: int, options: Mapping[str, str | bool]) -> None:
        graph = model.graph
        (argument,) = graph.input
        self.inputs = [(argument.name, np.float32, shape_of(argument))]
        self._runs = runs
        self._weights, constants = split_initializers(graph)
        shape = channels_last(np.zeros(shape_of(argument), np.float32)).shape

        def once(weights, x):
            return run_graph(graph, weights | constants, x)

        def loop(weights, images):
            def body(i, _):
                return once(weights, lax.dynamic_index_in_dim(images, i % INPUTS, keepdims=False))

            nothing = tuple(channels_last(np.zeros(shape_of(output), np.float32)) for output in graph.output)
            return lax.fori_loop(0, runs, body, nothing)

        function, shape = (once, shape) if runs == 1 else (loop, (INPUTS, *shape))
        program = jax.jit(function).lower(self._weights, jax.ShapeDtypeStruct(shape, np.float32))
        self._call = program.compile({**options})

    def outputs(self, feed):
        return [channels_first(np.asarray(y)) for y in self.repeated(feed)[0]()]

    def repeated(self, feed):
        (image,) = (channels_last(values) for values in feed.values())
        call, weights = self._call, jax.device_put(self._weights)
        x = jax.device_put(image if self._runs == 1 else np.stack([image] * INPUTS))
        return lambda: jax.block_until_ready(call(weights, x)), self._runs


# ---- an ONNX graph in JAX ----------------------------------------------------------------------------------------


def shape_of(value: onnx.ValueInfoProto) -> list[int]:
    return [size.dim_value for size in value.type.tensor_type.shape.dim]


def channels_last(x: np.ndarray) -> np.ndarray:
    """`[N, C, H, W]` -> `[N, H, W, C]`; anything else as it is."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def channels_first(x: np.ndarray) -> np.ndarray:
    """`[N, H, W, C]` -> `[N, C, H, W]`; anything else as it is."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def split_initializers(graph: onnx.GraphProto) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights, kernels as `[height, width, in / groups, out]`, and the constants that shape the program."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kernels = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    settings = {
        name for node in graph.node if node.op_type in ("Clip", "Gather", "Reshape", "Split") for name in node.input[1:]
    }
    weights = {name: x.transpose(2, 3, 1, 0) if name in kernels else x for name, x in values.items()}
    return (
        {name: np.ascontiguousarray(x) for name, x in weights.items() if name not in settings},
        {name: x for name, x in values.items() if name in settings},
    )


def run_graph(graph: onnx.GraphProto, values: dict, image) -> tuple:
    """The outputs of a graph made by `onnx_model.to_onnx`, feature maps channels last."""
    values = values | {graph.input[0].name: image}
    for node in graph.node:
        made = run_node(node, [values[name] for name in node.input])
        values |= zip(node.output, made, strict=True)
    return tuple(values[output.name] for output in graph.output)


def run_node(node: onnx.NodeProto, inputs: list) -> list:
    """One operator; `ValueError` of one that `to_onnx` never makes."""
    x, *others = inputs
    settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    match node.op_type:
        case "Conv":
            y = convolution(x, others[0], settings["strides"][0], settings["pads"][0], settings["group"])
            return [y + others[1] if len(others) > 1 else y]
        case "Gemm":
            y = x @ others[0]
            return [y + others[1] if len(others) > 1 else y]
        case "BatchNormalization":
            scale, offset, mean, variance = others
            return [(x - mean) * (scale * lax.rsqrt(variance + settings["epsilon"])) + offset]
        case "Relu":
            return [jnp.maximum(x, 0)]
        case "Sigmoid":
            return [jax.nn.sigmoid(x)]
        case "HardSigmoid":
            return [jnp.clip(x * settings["alpha"] + settings["beta"], 0, 1)]
        case "Clip":
            return [jnp.clip(x, others[0], others[1])]
        case "MaxPool" | "AveragePool":
            return [pool(x, node.op_type, settings["kernel_shape"][0], settings["strides"][0], settings["pads"][0])]
        case "GlobalAveragePool":
            return [x.mean((1, 2), keepdims=True)]
        case "Flatten":
            return [jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)]
        case "Add":
            return [x + others[0]]
        case "Mul":
            return [x * others[0]]
        case "Concat":
            return [jnp.concatenate(inputs, axis=-1)]
        case "Split":
            return jnp.split(x, np.cumsum(others[0])[:-1], axis=-1)
        case "Gather":
            return [gather_channels(x, tuple(others[0].reshape(-1).tolist()))]
        case "Reshape":  # of a whole shuffle: its channels are in a row already
            return [x]
    raise ValueError(f"node {node.name} is a {node.op_type}, which hwnas does not run in XLA")


@partial(jax.jit, static_argnums=1)
def gather_channels(x, order: tuple[int, ...]):
    """Whole or part of a channel shuffle: reshape, transpose, reshape, which XLA fuses, and then a slice."""
    channels = x.shape[-1]
    for groups in range(2, channels + 1):
        if channels % groups == 0:
            whole = np.arange(channels).reshape(groups, -1).T.reshape(-1)
            (found,) = np.nonzero(whole == order[0])
            if np.array_equal(whole[found[0] : found[0] + len(order)], order):
                y = x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)
                return y[..., found[0] : found[0] + len(order)]
    return jnp.take(x, np.array(order), axis=-1)


@partial(jax.jit, static_argnums=(2, 3, 4))
def convolution(x, kernel, stride: int, padding: int, groups: int):
    """A convolution `[N, H, W, C]` by `[k, k, in / groups, out]`, in the fastest form that XLA has for its kind.

    It is traced once for all models that have it, which is most of the time of tracing; XLA inlines it.
    """
    side, channels = kernel.shape[0], x.shape[-1]
    if groups == channels == kernel.shape[3]:
        return depthwise(x, kernel[:, :, 0], stride, padding)
    if side == 1 and padding == 0:
        x = x[:, ::stride, ::stride]
        if groups == 1:
            return x @ kernel[0, 0]
        grouped, kernels = x.reshape(*x.shape[:-1], groups, -1), kernel.reshape(kernel.shape[2], groups, -1)
        return jnp.einsum("nhwgi,igo->nhwgo", grouped, kernels).reshape(*x.shape[:-1], -1)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def depthwise(x, kernel, stride: int, padding: int):
    """A depthwise convolution by `[k, k, C]` as a sum of shifted products."""
    side = kernel.shape[0]
    images, *sizes, channels = x.shape
    rows, columns = (stride * ((size + 2 * padding - side) // stride) + 1 for size in sizes)
    margin, none = (padding, padding, 0), (0, 0, 0)
    padded = lax.pad(x, np.float32(0), (none, margin, margin, none))
    total = None
    for i in range(side):  # `lax` itself: jax.numpy would take most of the time to trace a network
        for j in range(side):
            tap = lax.slice(kernel, (i, j, 0), (i + 1, j + 1, channels)).reshape(1, 1, 1, channels)
            part = lax.slice(padded, (0, i, j, 0), (images, i + rows, j + columns, channels), (1, stride, stride, 1))
            product = lax.mul(part, lax.broadcast_in_dim(tap, part.shape, (0, 1, 2, 3)))
            total = product if total is None else lax.add(total, product)
    return total


def pool(x, kind: str, side: int, stride: int, padding: int):
    """Maximum pooling, or average pooling that counts the padding."""
    window, strides = (1, side, side, 1), (1, stride, stride, 1)
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    if kind == "MaxPool":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, margins)
    return lax.reduce_window(x, 0.0, lax.add, window, strides, margins) / side**2
