"""The layers that the supernet and the single network share, written for how XLA runs them.

Feature maps are `[N, H, W, C]`. What is fastest differs by device, and a `Form` says which way a network goes. XLA on
CPU runs a depthwise convolution written as `feature_group_count = C` many times slower than the same thing as shifted
multiply-adds. On a GPU matrix products are faster still (docs/gpu.md), branches wait for the host, and bfloat16 halves
the bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hwnas.dense_depthwise import dense_depthwise

Array = jax.Array

EPSILON = 1e-5
BLOCK_ROWS = 512


@dataclass(frozen=True, slots=True)
class Form:
    """How a network is computed: values that agree up to rounding, at speeds that differ many times over.

    Attributes:
        dtype: of feature maps, and of kernels where they meet them. Weights, their gradients, the statistics of batch
            norms and the logits are float32 in any case.
        control_flow: loops and branches, so that what is not chosen is not computed; else all of it is, and what was
            not chosen is left out of the result.
        in_pieces: of a supernet's training alone, on one device: it is not one program but a thousand, for all widths
            there are, and runs those that an architecture needs (`sliced_supernet.py`). They are quicker, but take
            minutes to compile, spread over the first steps.
    """

    dtype: str = "float32"
    control_flow: bool = True
    in_pieces: bool = False


CPU_FORM = Form()
LONG_CPU_FORM = Form(in_pieces=True)
LONG_WORK_IMAGES = 100_000
"""From so many images on, trained in a supernet, a CPU has gained more by `LONG_CPU_FORM` than its compiling took
(`python -m benchmarks supernet-speed` tells both)."""
ACCELERATOR_FORM = Form(dtype="bfloat16", control_flow=False)


def native_form(images: int = 0) -> Form:
    """The fastest form for the devices that JAX uses in this process, to train a supernet on so many images.

    Several devices that share the images of a path take one program.
    """
    if jax.default_backend() != "cpu":
        return ACCELERATOR_FORM
    return LONG_CPU_FORM if images >= LONG_WORK_IMAGES and jax.device_count() == 1 else CPU_FORM


GPU_COMPILER = {"xla_gpu_enable_triton_gemm": False}
"""To try out the kernels of Triton takes minutes for a network. To try out those of cuBLAS takes seconds, and the steps
are faster (docs/gpu.md); which one wins is kept with the compiled program."""


def compiled(function: Callable[..., Any], donated: tuple[int, ...] = ()) -> Any:
    """`jax.jit`, on a GPU without Triton's products; the arguments of these numbers give their memory away."""
    options = GPU_COMPILER if jax.default_backend() == "gpu" else None
    return jax.jit(function, donate_argnums=donated, compiler_options=options)


def channel_sum(x: Array) -> Array:
    """The sum over every axis but the last: `[..., C] -> [C]`."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def he_normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """Normal values of variance `2 / fan_in` (He et al. 2015, section 2.2).

    Drawn by numpy: `jax.random.normal` compiles for each shape anew, half a minute for a supernet.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jax.device_put(rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_in)))


# ---- batch norm --------------------------------------------------------------------------------------------------


def batch_norm(x: Array, scale: Array, offset: Array, epsilon: float = EPSILON) -> tuple[Array, Array, Array]:
    """Batch norm by this batch's statistics: `(y, mean [C], variance [C])`. No gradient flows to the statistics."""
    return _batch_norm(epsilon, x, scale, offset)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(epsilon: float, x: Array, scale: Array, offset: Array) -> tuple[Array, Array, Array]:
    return _normalised(epsilon, x, scale, offset)[:3]


def _normalised(epsilon: float, x: Array, scale: Array, offset: Array) -> tuple[Array, Array, Array, Array]:
    count, wide = x.size // x.shape[-1], x.astype(jnp.float32)
    mean = channel_sum(wide) / count
    centred = wide - mean
    variance = channel_sum(centred * centred) / count
    inverse = lax.rsqrt(variance + epsilon)
    return (centred * (inverse * scale) + offset).astype(x.dtype), mean, variance, inverse


def _batch_norm_forward(epsilon, x, scale, offset):
    y, mean, variance, inverse = _normalised(epsilon, x, scale, offset)
    return (y, mean, variance), (x, scale, mean, inverse)


def _batch_norm_backward(epsilon, saved, cotangents):
    x, scale, mean, inverse = saved
    g = cotangents[0].astype(jnp.float32)
    count = x.size // x.shape[-1]
    normal = (x.astype(jnp.float32) - mean) * inverse
    g_offset = channel_sum(g)
    g_scale = channel_sum(g * normal)
    g_x = (g - g_offset / count - normal * (g_scale / count)) * (inverse * scale)
    return g_x.astype(x.dtype), g_scale, g_offset


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def fixed_norm(x: Array, scale: Array, offset: Array, mean: Array, variance: Array, epsilon: float = EPSILON) -> Array:
    """Batch norm by given statistics."""
    factor = lax.rsqrt(variance + epsilon) * scale
    return (x * factor + (offset - mean * factor)).astype(x.dtype)


# ---- depthwise convolution ---------------------------------------------------------------------------------------


def _pad(x: Array, kernel: int) -> Array:
    margin = kernel // 2
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def _windows(padded: Array, i: int, j: int, size: tuple[int, int], stride: int) -> Array:
    """What tap (i, j) of a kernel sees: `[N, height, width * C]` of a padded `[N, H, W, C]`.

    Columns and channels are one axis, long enough for the vector units whatever the number of channels.
    """
    count, _, _, channels = padded.shape
    height, width = size
    rows = slice(i, i + stride * (height - 1) + 1, stride)
    if stride == 1:
        return padded.reshape(count, padded.shape[1], -1)[:, rows, j * channels : (j + width) * channels]
    return padded[:, rows, j : j + stride * (width - 1) + 1 : stride].reshape(count, height, -1)


def _gather_sum(x: Array, kernel: Array, stride: int) -> Array:
    """A depthwise convolution as a sum of shifted products, one fused loop; kernel is `[k, k, C]`."""
    side, size = kernel.shape[0], (x.shape[1] // stride, x.shape[2] // stride)
    padded, tiled = _pad(x, side), jnp.tile(kernel, (1, 1, size[1]))
    taps = [_windows(padded, i, j, size, stride) * tiled[i, j] for i in range(side) for j in range(side)]
    return sum(taps[1:], start=taps[0]).astype(x.dtype).reshape(x.shape[0], *size, x.shape[3])


def _scatter_sum(g: Array, kernel: Array, stride: int) -> Array:
    """The gradient of `_gather_sum` by its input."""
    if stride == 1:
        return _gather_sum(g, kernel[::-1, ::-1], 1)
    # An input row 2m + a meets the taps i = 2i' + a only, at output row m - i': four small sums, then interleaved.
    side, margin, (count, height, width, channels) = kernel.shape[0], kernel.shape[0] // 2, g.shape
    tall, wide = height + margin, width + margin
    padded = jnp.pad(g, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def phase(a: int, b: int) -> Array:
        taps = [
            padded[:, margin - i // 2 : margin - i // 2 + tall, margin - j // 2 : margin - j // 2 + wide] * kernel[i, j]
            for i in range(a, side, 2)
            for j in range(b, side, 2)
        ]
        return sum(taps[1:], start=taps[0])

    rows = [jnp.stack([phase(a, 0), phase(a, 1)], axis=3) for a in (0, 1)]
    whole = jnp.stack(rows, axis=2).astype(g.dtype).reshape(count, 2 * tall, 2 * wide, channels)
    return whole[:, margin : margin + 2 * height, margin : margin + 2 * width]


def _kernel_gradient(x: Array, g: Array, side: int, stride: int) -> Array:
    """The gradient of `_gather_sum` by its kernel: all taps of a row summed in one pass, image by image, over rows."""
    count, height, width, channels = g.shape
    padded, g = _pad(x, side), g.reshape(count, height, -1)

    def add(sums, products):
        return tuple(total + product for total, product in zip(sums, products, strict=True))

    rows = []
    for i in range(side):
        windows = [_windows(padded, i, j, (height, width), stride) for j in range(side)]
        products = tuple(window.astype(jnp.float32) * g.astype(jnp.float32) for window in windows)
        sums = lax.reduce(products, (0.0,) * side, add, (1,))
        rows.append(jnp.stack([channel_sum(total.reshape(-1, channels)) for total in sums]))
    return jnp.stack(rows)


def _centre(kernel: Array, side: int) -> Array:
    margin = (kernel.shape[0] - side) // 2
    return kernel[margin : margin + side, margin : margin + side]


def _uncentre(kernel: Array, side: int) -> Array:
    margin = (side - kernel.shape[0]) // 2
    return jnp.pad(kernel, ((margin, margin), (margin, margin), (0, 0)))


def depthwise(
    x: Array, kernel: Array, choice: Array, sides: tuple[int, ...], stride: int = 1, form: Form = CPU_FORM
) -> Array:
    """A depthwise convolution by the centre of `kernel`, `sides[choice]` wide, padded by half of that.

    With control flow every side is compiled once and only the chosen one runs. Without, the widest one runs, by a
    kernel whose rim is zero, as matrix products.

    Args:
        x: `[N, H, W, C]`; H and W divide by the stride.
        kernel: `[k, k, C]`, as wide as the widest side at least.
        choice: an integer scalar, the index into `sides`.
        sides: the widths to choose from, all odd.
        stride: 1 or 2.
        form: how it is computed.
    """
    if not form.control_flow:
        return depthwise_maps(x.transpose(3, 0, 1, 2), kernel, choice, sides, stride).transpose(1, 2, 3, 0)
    return _depthwise(sides, stride, x, kernel, choice)


def depthwise_maps(x: Array, kernel: Array, choice: Array, sides: tuple[int, ...], stride: int = 1) -> Array:
    """`depthwise` without control flow, of feature maps `[C, N, H, W]`."""
    widest = max(sides)
    kernel = jnp.where(_inside(widest, jnp.array(sides)[choice]), _centre(kernel, widest), 0)
    return dense_depthwise(stride, x, kernel)


def _inside(width: int, side: Array) -> Array:
    """The centre of a kernel: `[width, width, 1]`, true in the `side` by `side` places in the middle."""
    reach = jnp.abs(jnp.arange(width) - width // 2) <= side // 2
    return (reach[:, None] & reach)[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _depthwise(sides: tuple[int, ...], stride: int, x: Array, kernel: Array, choice: Array) -> Array:
    branches = [lambda x, kernel, side=side: _gather_sum(x, _centre(kernel, side), stride) for side in sides]
    return lax.switch(choice, branches, x, kernel)


def _depthwise_forward(sides, stride, x, kernel, choice):
    return _depthwise(sides, stride, x, kernel, choice), (x, kernel, choice)


def _depthwise_backward(sides, stride, saved, g):
    x, kernel, choice = saved

    def branch(side):
        def gradients(x, kernel, g):
            g_kernel = _kernel_gradient(x, g, side, stride)
            return _scatter_sum(g, _centre(kernel, side), stride), _uncentre(g_kernel, kernel.shape[0])

        return gradients

    g_x, g_kernel = lax.switch(choice, [branch(side) for side in sides], x, kernel, g)
    return g_x, g_kernel, None


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# ---- matrix products ---------------------------------------------------------------------------------------------


def product(x: Array, kernel: Array, form: Form = CPU_FORM) -> Array:
    """A 1x1 convolution, `[..., in]` by `[in, out]`."""
    return _blocked_product(x, kernel) if form.control_flow else x @ kernel.astype(x.dtype)


@jax.custom_vjp
def _blocked_product(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _blocked_backward(saved, g):
    x, kernel = saved
    return g @ kernel.T, _transposed_product(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))


def _transposed_product(x: Array, g: Array) -> Array:
    """`x.T @ g` for many rows, block by block: XLA transposes x by a copy, which then stays in the cache.

    The loop also keeps XLA from computing x or g anew, and badly, inside of that copy.
    """
    rows = x.shape[0]
    blocks = max(n for n in range(1, max(1, rows // BLOCK_ROWS) + 1) if rows % n == 0)

    def add(total, block):
        return total + block[0].T @ block[1], None

    pairs = x.reshape(blocks, -1, x.shape[1]), g.reshape(blocks, -1, g.shape[1])
    return lax.scan(add, jnp.zeros((x.shape[1], g.shape[1]), x.dtype), pairs)[0]


_blocked_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _blocked_backward)


# ---- the rest ----------------------------------------------------------------------------------------------------


def convolution(
    x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, groups: int = 1, form: Form = CPU_FORM
) -> Array:
    """A convolution by a kernel `[kh, kw, in / groups, out]`, in the fastest form there is for its kind."""
    side, channels = kernel.shape[0], x.shape[-1]
    even = stride == 1 or (stride == 2 and x.shape[1] % 2 == x.shape[2] % 2 == 0)
    if groups == channels == kernel.shape[3] and padding == side // 2 and side % 2 and even:
        return depthwise(x, kernel[:, :, 0], jnp.int32(0), (side,), stride, form)
    if side == 1 and padding == 0:
        return _pointwise(x[:, ::stride, ::stride], kernel[0, 0], groups, form)
    if groups == 1 and channels * side < 16:
        return product(_patches(x, side, stride, padding), kernel.reshape(-1, kernel.shape[3]), form)
    return _xla_convolution(x, kernel, stride, padding, groups)


def _xla_convolution(x: Array, kernel: Array, stride: int, padding: int, groups: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _patches(x: Array, side: int, stride: int, padding: int) -> Array:
    """What each place of a convolution sees, `[N, height, width, side * side * C]`.

    With few channels, as in a stem, a product with it is many times faster than XLA's gradient of a convolution.
    """
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((n + 2 * padding - side) // stride + 1 for n in x.shape[1:3])
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    taps = [padded[:, i : i + rows : stride, j : j + columns : stride] for i in range(side) for j in range(side)]
    return jnp.concatenate(taps, axis=3)


def _pointwise(x: Array, kernel: Array, groups: int, form: Form) -> Array:
    """A 1x1 convolution as a matrix product for each group; XLA's own grouped convolution is far slower on CPU."""
    if groups == 1:
        return product(x, kernel, form)
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    kernels = kernel.reshape(kernel.shape[0], groups, -1)
    return jnp.einsum("nhwgi,igo->nhwgo", grouped, kernels.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def pool(x: Array, reduction: str, side: int, stride: int, padding: int) -> Array:
    """Maximum pooling, or average pooling that counts the padding."""
    window, strides = (1, side, side, 1), (1, stride, stride, 1)
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    if reduction == "max":
        return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, window, strides, margins)
    total = lax.reduce_window(x.astype(jnp.float32), 0.0, lax.add, window, strides, margins)
    return (total / side**2).astype(x.dtype)
