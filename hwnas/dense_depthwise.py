"""A depthwise convolution as one matrix product for each channel: the form for accelerators.

A window is a block of rows of a channel, and a matrix takes it to the block's output: it holds the kernel's value
wherever a tap joins an input place to an output place, and zero elsewhere. Most of it is zero, and the arithmetic is
many times that of the convolution; but matrix units do it, and the products of both gradients, faster than shifted maps
can be multiplied by the few values of a kernel (docs/gpu.md). A kernel whose rim is zero costs the same as any other,
so one program serves every side.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

OUTPUTS = 64
"""Output places of a window, at least, where the map has as many: fewer do not fill a matrix unit, and more rows at
once make matrices that are larger than what they are multiplied by."""


@partial(jax.checkpoint, static_argnums=0)  # windows and matrices are made again for the gradients, not kept
def dense_depthwise(stride: int, x: Array, kernel: Array) -> Array:
    """A depthwise convolution padded by half of the kernel: `[C, N, H, W]` by `[k, k, C]` to `[C, N, H / s, W / s]`."""
    channels, count, height, width = x.shape
    side, tall, wide = kernel.shape[0], height // stride, width // stride
    block = next(n for n in range(1, tall + 1) if tall % n == 0 and (n == tall or n * wide >= OUTPUTS))
    joins = _joins(side, height, width, stride, block)
    matrix = jnp.einsum("tc,tio->cio", kernel.reshape(side**2, channels), joins).astype(x.dtype)
    if block == tall:
        windows = x
    else:
        padded = jnp.pad(x, ((0, 0), (0, 0), (side // 2, side // 2), (0, 0)))
        rows = stride * (block - 1) + side
        windows = jnp.stack([padded[:, :, n : n + rows] for n in range(0, height, stride * block)], axis=2)
    return (windows.reshape(channels, -1, joins.shape[1]) @ matrix).reshape(channels, count, tall, wide)


@cache
def _joins(side: int, height: int, width: int, stride: int, block: int) -> np.ndarray:
    """Which tap joins which places, of ones and zeros: `[taps, places of a window, places of its output]`.

    The window of a block of output rows has the rows that its taps see, or all rows if the block is the whole map.
    """
    whole = block == height // stride
    rows, margin = (height, side // 2) if whole else (stride * (block - 1) + side, 0)

    def along(inputs: int, outputs: int, margin: int) -> np.ndarray:
        tap = np.arange(inputs)[:, None] - stride * np.arange(outputs) + margin
        return tap == np.arange(side)[:, None, None]

    down, across = along(rows, block, margin), along(width, width // stride, side // 2)
    joins = down[:, None, :, None, :, None] & across[None, :, None, :, None, :]
    return joins.reshape(side**2, rows * width, -1).astype(np.float32)
