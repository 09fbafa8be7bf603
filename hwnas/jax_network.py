"""One fixed network in JAX: the forward pass of any `Network`, read off its nodes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hwnas.jax_layers import Array, Form, batch_norm, convolution, fixed_norm, he_normal, native_form, pool
from hwnas.network import (
    TRAINED,
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    Multiply,
    Network,
    Operator,
    Pool,
    Shape,
    Shuffle,
    Split,
    weight_shapes,
)

Statistics = dict[str, tuple[Array, Array]]
"""Mean and variance of each batch norm, by the name of its node."""

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": lambda x: jnp.clip(x / 6 + 0.5, 0, 1),
}


class FixedNetwork(nnx.Module):
    """A `Network` with weights.

    Args:
        network: what to run.
        weights: trained arrays by `node.suffix`, as `network.weight_shapes` names them; without them He-normal ones.
        rngs: draws the kernels that are not given.
        form: how it is computed; without it the fastest for the device.
    """

    def __init__(
        self,
        network: Network,
        *,
        rngs: nnx.Rngs,
        weights: Mapping[str, Any] | None = None,
        form: Form | None = None,
    ) -> None:
        self.network, self.form = network, form or native_form()
        self.weights = nnx.Dict({})
        for node in network.nodes:
            for suffix, shape in weight_shapes(node).items():
                name = f"{node.name}.{suffix}"
                if suffix in TRAINED:
                    given = None if weights is None else weights[name]
                    value = _initial(suffix, shape, rngs) if given is None else jax.device_put(given)
                    self.weights[name] = nnx.Param(value)

    def __call__(self, images: Array, statistics: Statistics | None = None) -> tuple[Any, Statistics]:
        """Runs a batch.

        Args:
            images: `[N, H, W, 3]`, normalised.
            statistics: of the batch norms; without them each batch is normalised by itself.

        Returns:
            The output (a tuple of outputs where the network has several), and the statistics that were used.
        """
        tensors = {self.network.input.name: images.astype(self.form.dtype)}
        used: Statistics = {}
        for node in self.network.nodes:
            inputs = [tensors[tensor.name] for tensor in node.inputs]
            weights = {s: self.weights[f"{node.name}.{s}"][...] for s in weight_shapes(node) if s in TRAINED}
            if isinstance(node.operator, BatchNorm):
                epsilon = node.operator.epsilon
                results = [_normalise(node.name, epsilon, inputs[0], weights, statistics, used)]
            else:
                results = _run(node.operator, inputs, weights, self.form)
            tensors |= {tensor.name: result for tensor, result in zip(node.outputs, results, strict=True)}
        outputs = tuple(tensors[tensor.name] for tensor in self.network.outputs)
        return (outputs[0] if len(outputs) == 1 else outputs), used


def _initial(suffix: str, shape: Shape, rngs: nnx.Rngs) -> Array:
    if suffix == "kernel":
        return he_normal(rngs.params(), shape, math.prod(shape[:-1]))
    return jax.device_put(np.full(shape, suffix == "scale", np.float32))


def _normalise(
    name: str, epsilon: float, x: Array, weights: dict[str, Array], statistics: Statistics | None, used: Statistics
) -> Array:
    if statistics is not None:
        used[name] = statistics[name]
        return fixed_norm(x, weights["scale"], weights["offset"], *statistics[name], epsilon)
    y, mean, variance = batch_norm(x, weights["scale"], weights["offset"], epsilon)
    used[name] = (jax.lax.stop_gradient(mean), jax.lax.stop_gradient(variance))
    return y


def _run(operator: Operator, inputs: list[Array], weights: dict[str, Array], form: Form) -> list[Array]:
    """One operator on feature maps `[N, H, W, C]` or vectors `[N, C]`."""
    x = inputs[0]
    match operator:
        case Conv(stride=stride, padding=padding, groups=groups):
            y = convolution(x, weights["kernel"], stride=stride, padding=padding, groups=groups, form=form)
            return [(y + weights["bias"]).astype(y.dtype) if operator.bias else y]
        case Linear():
            y = x.astype(jnp.float32) @ weights["kernel"]
            return [y + weights["bias"] if operator.bias else y]
        case Activation(function=function):
            return [ACTIVATIONS[function](x)]
        case Pool(reduction=reduction, kernel=kernel, stride=stride, padding=padding):
            return [pool(x, reduction, kernel, stride, padding)]
        case GlobalAveragePool():
            return [x.mean((1, 2), keepdims=True)]
        case Flatten():
            return [jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)]
        case Add():
            return [sum(inputs[1:], start=x)]
        case Multiply():
            return [x * inputs[1]]
        case Concat():
            return [jnp.concatenate(inputs, axis=-1)]
        case Split(sizes=sizes):
            return list(jnp.split(x, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)], axis=-1))
        case Shuffle(groups=groups):
            return [x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)]
        case BatchNorm():
            raise TypeError("batch norm is run by its own function, since it keeps statistics")
