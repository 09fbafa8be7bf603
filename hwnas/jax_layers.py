"""The layers that the supernet and the single network share, written for how XLA runs them.

Feature maps are `[N, H, W, C]`. XLA on CPU runs a depthwise convolution written as `feature_group_count = C` many times
slower than the same thing as shifted multiply-adds, and its gradient by the kernel fastest as products with a row of
ones, image by image.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

EPSILON = 1e-5


def channel_sum(x: Array) -> Array:
    """The sum over every axis but the last: `[..., C] -> [C]`."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def he_normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """Normal values of variance `2 / fan_in` (He et al. 2015, section 2.2).

    Drawn by numpy: `jax.random.normal` compiles for each shape anew, half a minute for a supernet.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_in)))


# ---- batch norm --------------------------------------------------------------------------------------------------


def batch_norm(x: Array, scale: Array, offset: Array, epsilon: float = EPSILON) -> tuple[Array, Array, Array]:
    """Batch norm by this batch's statistics: `(y, mean [C], variance [C])`. No gradient flows to the statistics."""
    return _batch_norm(epsilon, x, scale, offset)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(epsilon: float, x: Array, scale: Array, offset: Array) -> tuple[Array, Array, Array]:
    return _normalised(epsilon, x, scale, offset)[:3]


def _normalised(epsilon: float, x: Array, scale: Array, offset: Array) -> tuple[Array, Array, Array, Array]:
    count = x.size // x.shape[-1]
    mean = channel_sum(x) / count
    centred = x - mean
    variance = channel_sum(centred * centred) / count
    inverse = lax.rsqrt(variance + epsilon)
    return centred * (inverse * scale) + offset, mean, variance, inverse


def _batch_norm_forward(epsilon, x, scale, offset):
    y, mean, variance, inverse = _normalised(epsilon, x, scale, offset)
    return (y, mean, variance), (x, scale, mean, inverse)


def _batch_norm_backward(epsilon, saved, cotangents):
    x, scale, mean, inverse = saved
    g = cotangents[0]
    count = x.size // x.shape[-1]
    normal = (x - mean) * inverse
    g_offset = channel_sum(g)
    g_scale = channel_sum(g * normal)
    g_x = (g - g_offset / count - normal * (g_scale / count)) * (inverse * scale)
    return g_x, g_scale, g_offset


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def fixed_norm(x: Array, scale: Array, offset: Array, mean: Array, variance: Array, epsilon: float = EPSILON) -> Array:
    """Batch norm by given statistics."""
    factor = lax.rsqrt(variance + epsilon) * scale
    return x * factor + (offset - mean * factor)


# ---- depthwise convolution ---------------------------------------------------------------------------------------


def _pad(x: Array, kernel: int) -> Array:
    margin = kernel // 2
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def _windows(padded: Array, i: int, j: int, size: tuple[int, int], stride: int) -> Array:
    """What tap (i, j) of a kernel sees: `[..., height, width, C]` of a padded `[..., H, W, C]`."""
    rows, columns = (slice(at, at + stride * (n - 1) + 1, stride) for at, n in zip((i, j), size, strict=True))
    return padded[..., rows, columns, :]


def _gather_sum(x: Array, kernel: Array, stride: int) -> Array:
    """A depthwise convolution as a sum of shifted products, one fused loop; kernel is `[k, k, C]`."""
    side, size = kernel.shape[0], (x.shape[1] // stride, x.shape[2] // stride)
    padded = _pad(x, side)
    taps = [_windows(padded, i, j, size, stride) * kernel[i, j] for i in range(side) for j in range(side)]
    return sum(taps[1:], start=taps[0])


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
    whole = jnp.stack(rows, axis=2).reshape(count, 2 * tall, 2 * wide, channels)
    return whole[:, margin : margin + 2 * height, margin : margin + 2 * width]


def _kernel_gradient(x: Array, g: Array, side: int, stride: int) -> Array:
    """The gradient of `_gather_sum` by its kernel: one image at a time, which stays in the cache."""
    _, height, width, channels = g.shape
    ones = jnp.ones((1, height * width), x.dtype)

    def one_image(total, pair):
        image, g_image = pair

        def one_row(i):
            rows = lax.dynamic_slice_in_dim(image, i, stride * (height - 1) + 1)
            products = [_windows(rows, 0, j, (height, width), stride) * g_image for j in range(side)]
            return jnp.concatenate([ones @ product.reshape(-1, channels) for product in products])

        return total + lax.map(one_row, jnp.arange(side)), None

    return lax.scan(one_image, jnp.zeros((side, side, channels), x.dtype), (_pad(x, side), g))[0]


def _centre(kernel: Array, side: int) -> Array:
    margin = (kernel.shape[0] - side) // 2
    return kernel[margin : margin + side, margin : margin + side]


def _uncentre(kernel: Array, side: int) -> Array:
    margin = (side - kernel.shape[0]) // 2
    return jnp.pad(kernel, ((margin, margin), (margin, margin), (0, 0)))


def depthwise(x: Array, kernel: Array, choice: Array, sides: tuple[int, ...], stride: int = 1) -> Array:
    """A depthwise convolution by the centre of `kernel`, `sides[choice]` wide, padded by half of that.

    Every side is compiled once; only the chosen one runs.

    Args:
        x: `[N, H, W, C]`; H and W divide by the stride.
        kernel: `[k, k, C]`, as wide as the widest side at least.
        choice: an integer scalar, the index into `sides`.
        sides: the widths to choose from, all odd.
        stride: 1 or 2.
    """
    return _depthwise(sides, stride, x, kernel, choice)


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


# ---- the rest ----------------------------------------------------------------------------------------------------


def convolution(x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """A convolution by a kernel `[kh, kw, in / groups, out]`, in the fastest form there is for its kind."""
    side, channels = kernel.shape[0], x.shape[-1]
    even = stride == 1 or (stride == 2 and x.shape[1] % 2 == x.shape[2] % 2 == 0)
    if groups == channels == kernel.shape[3] and padding == side // 2 and side % 2 and even:
        return depthwise(x, kernel[:, :, 0], jnp.int32(0), (side,), stride)
    if side == 1 and padding == 0:
        return _pointwise(x[:, ::stride, ::stride], kernel[0, 0], groups)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _pointwise(x: Array, kernel: Array, groups: int) -> Array:
    """A 1x1 convolution as a matrix product for each group; XLA's own grouped convolution is far slower on CPU."""
    if groups == 1:
        return x @ kernel
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    kernels = kernel.reshape(kernel.shape[0], groups, -1)
    return jnp.einsum("nhwgi,igo->nhwgo", grouped, kernels).reshape(*x.shape[:-1], -1)


def pool(x: Array, reduction: str, side: int, stride: int, padding: int) -> Array:
    """Maximum pooling, or average pooling that counts the padding."""
    window, strides = (1, side, side, 1), (1, stride, stride, 1)
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    if reduction == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, margins)
    return lax.reduce_window(x, 0.0, lax.add, window, strides, margins) / side**2
