"""A depthwise convolution of a small feature map as one matrix product for each channel: the form for accelerators.

The matrix `[input places, output places]` of a channel holds the kernel's value wherever a tap of the kernel joins the
two places, and zero elsewhere. Most of it is zero, and the arithmetic is many times that of the convolution; but matrix
units do it, and both gradients, faster than the few values of a kernel can be multiplied by shifted maps (docs/gpu.md).
Kernels whose rim is zero cost the same as any other, so one program serves every side.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PLACES = 1024
"""The largest feature map, in places; the matrices grow with the square."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense_depthwise(stride: int, x: Array, kernel: Array) -> Array:
    """A depthwise convolution padded by half of the kernel: `[C, N, H, W]` by `[k, k, C]` to `[C, N, H / s, W / s]`."""
    return _by_matrix(stride, x, kernel)


def _by_matrix(stride: int, x: Array, kernel: Array) -> Array:
    channels, count, height, width = x.shape
    y = x.reshape(channels, count, -1) @ _matrix(kernel, height, width, stride, x.dtype)
    return y.reshape(channels, count, height // stride, width // stride)


def _backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    channels, count, height, width = x.shape
    side, flat = kernel.shape[0], g.reshape(channels, count, -1)
    matrix = _matrix(kernel, height, width, stride, x.dtype)
    g_x = jnp.einsum("cnt,cst->cns", flat, matrix).reshape(x.shape)
    joined = jnp.einsum("cns,cnt->cst", x.reshape(channels, count, -1), flat, preferred_element_type=jnp.float32)
    inputs = _inputs(side, height, width, stride)
    outputs = np.arange(inputs.shape[1])
    taps = jnp.where(inputs >= 0, joined[:, np.maximum(inputs, 0), outputs], 0).sum(2)
    return g_x, taps.T.reshape(kernel.shape)


dense_depthwise.defvjp(lambda stride, x, kernel: (_by_matrix(stride, x, kernel), (x, kernel)), _backward)


def _matrix(kernel: Array, height: int, width: int, stride: int, dtype: jnp.dtype) -> Array:
    """`[C, input places, output places]` of a kernel `[k, k, C]`."""
    side = kernel.shape[0]
    values = jnp.pad(kernel.astype(dtype).reshape(side**2, -1), ((0, 1), (0, 0)))  # the last tap is none at all
    return values.T[:, _taps(side, height, width, stride)]


@cache
def _inputs(side: int, height: int, width: int, stride: int) -> np.ndarray:
    """Which input place each tap sees from each output place, `[taps, output places]`; -1 in the padding."""

    def along(length: int) -> np.ndarray:
        seen = np.arange(side)[:, None] - side // 2 + stride * np.arange(length // stride)
        return np.where((seen >= 0) & (seen < length), seen, -1)

    rows, columns = along(height)[:, None, :, None], along(width)[None, :, None, :]
    places = np.where((rows >= 0) & (columns >= 0), rows * width + columns, -1)
    return places.reshape(side**2, -1)


@cache
def _taps(side: int, height: int, width: int, stride: int) -> np.ndarray:
    """Which tap joins each input place to each output place, `[input places, output places]`; `side ** 2` for none."""
    inputs = _inputs(side, height, width, stride)
    taps = np.full((height * width, inputs.shape[1]), side**2, np.int32)
    tap, output = np.nonzero(inputs >= 0)
    taps[inputs[tap, output], output] = tap
    return taps
