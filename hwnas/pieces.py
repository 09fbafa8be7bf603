"""A network computed piece by piece, each compiled for the shapes that it meets: the form for long trainings on a CPU.

A piece is a function of some weights and of feature maps hardly larger than the architecture has them. A space has a
fixed number of pieces, by its widths, kernels and the like, however many architectures come; which of them an
architecture runs, Python decides. `Tape` runs them, and then their gradients in the opposite order. `Survey` finds
what a tape would run, so that it can be compiled beforehand, on all cores.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hwnas.jax_layers import Array
from hwnas.row_layers import rows_at

Function = Callable[..., Array]
"""A function of a module, `(own, maps, places, **options) -> y`.

`own` are weights by name and `maps` feature maps; y is differentiable by both. `places` are arrays of integers, or
images and targets. The options are constants.
"""

Weights = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Piece:
    """A function with its options; it is compiled for each."""

    function: Function
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, own: Any, maps: Any, places: Any) -> Array:
        return self.function(own, maps, places, **dict(self.options))


class Value:
    """A feature map of a tape; two may share an array."""

    __slots__ = ("array", "key")

    def __init__(self, array: Array) -> None:
        self.array, self.key = array, object()


class Tape:
    """Runs pieces, keeps what their gradients need, and runs these.

    Args:
        weights: by prefix and name.
        call: runs a compiled function; a `Survey` only notes it.
    """

    def __init__(
        self, weights: Weights, call: Callable[..., Any] = lambda program, *arguments: program(*arguments)
    ) -> None:
        self.weights, self.call = weights, call
        self._back: list[Callable[[dict[object, Array], dict[str, Array]], None]] = []

    def run(
        self,
        function: Function,
        unit: tuple[str, int | None],
        names: Sequence[str],
        maps: Sequence[Value],
        places: tuple[Any, ...] = (),
        **options: Any,
    ) -> Value:
        """What a piece makes of feature maps.

        Args:
            function: the piece.
            unit: the prefix of its weights' names, and where those of several units are stacked, its place there.
            names: the weights that it takes.
            maps, places, options: its other arguments.
        """
        prefix, index = unit
        own, piece = {name: self.weights[prefix + name] for name in names}, Piece(function, tuple(options.items()))
        arrays, at = tuple(value.array for value in maps), () if index is None else (np.int32(index),)
        made = Value(self.call(_forward, piece, own, at, arrays, places))
        key, keys = made.key, [value.key for value in maps]

        def back(gradients: dict[object, Array], totals: dict[str, Array]) -> None:
            of_own = {name: totals[prefix + name] for name in names}
            of_own, of_maps = self.call(_backward, piece, of_own, own, at, arrays, places, gradients.pop(key))
            totals.update({prefix + name: total for name, total in of_own.items()})
            for map_key, one in zip(keys, of_maps, strict=True):
                known = gradients.get(map_key)
                gradients[map_key] = one if known is None else self.call(_added, known, one)

        self._back.append(back)
        return made

    def enter(self, x: Value, order: Any) -> tuple[Value, Value]:
        """Row `order[i]` of x as row i, zeros where that is -1; and x, in which `leave` must replace those rows."""
        rest, entry = Value(x.array), Value(self.call(_taken, x.array, order))
        key, rest_key, entry_key = x.key, rest.key, entry.key

        def back(gradients: dict[object, Array], totals: dict[str, Array]) -> None:
            gradients[key] = self.call(_replaced, gradients.pop(rest_key), order, gradients.pop(entry_key))

        self._back.append(back)
        return rest, entry

    def leave(self, rest: Value, order: Any, y: Value) -> Value:
        """x with row i of y as row `order[i]`; the memory of x is given away."""
        x = Value(self.call(_replaced, rest.array, order, y.array))
        key, rest_key, y_key = x.key, rest.key, y.key

        def back(gradients: dict[object, Array], totals: dict[str, Array]) -> None:
            g = gradients[rest_key] = gradients.pop(key)
            gradients[y_key] = self.call(_taken, g, order)

        self._back.append(back)
        return x

    def gradients(self, of: Value, totals: dict[str, Array]) -> None:
        """Adds the gradient of a scalar by each weight to its total; the memory of the totals is given away."""
        found: dict[object, Array] = {of.key: self.call(_one, of.array)}
        while self._back:  # each lets go of what it kept
            self._back.pop()(found, totals)


@partial(jax.jit, static_argnums=0)
def _forward(piece, weights, at, maps, places):
    return piece(_own(weights, at), maps, places)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _backward(piece, totals, weights, at, maps, places, g):
    _, pull = jax.vjp(lambda own, maps: piece(own, maps, places), _own(weights, at), maps)
    of_own, of_maps = pull(g)
    added = (lambda total, one: total.at[at[0]].add(one)) if at else jnp.add
    return jax.tree.map(added, totals, of_own), of_maps


def _own(weights: Any, at: tuple[Array, ...]) -> Any:
    if not at:
        return weights
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, at[0], 0, keepdims=False), weights)


_taken = jax.jit(rows_at)


@partial(jax.jit, donate_argnums=0)
def _replaced(x: Array, order: Array, y: Array) -> Array:
    return x.at[jnp.where(order >= 0, order, len(x))].set(y, mode="drop", unique_indices=True)


@partial(jax.jit, donate_argnums=0)
def _added(x: Array, y: Array) -> Array:
    return x + y


@jax.jit
def _one(x: Array) -> Array:
    return jnp.ones_like(x)


# ---- compiling beforehand ----------------------------------------------------------------------------------------


class Survey:
    """Stands in for the calls of a tape: nothing is computed, but what would be compiled for it is found.

    Of what such a tape is given only the shapes count, and feature maps are `jax.ShapeDtypeStruct`.
    """

    def __init__(self) -> None:
        self._shapes: dict[Any, Any] = {}
        self._missing: list[tuple[Any, tuple[Any, ...]]] = []

    def __call__(self, program: Any, *arguments: Any) -> Any:
        pieces = tuple(argument for argument in arguments if isinstance(argument, Piece))
        leaves, tree = jax.tree.flatten(arguments[len(pieces) :])
        key = program, pieces, tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._shapes:
            shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            arguments = (*pieces, *jax.tree.unflatten(tree, shapes))
            self._shapes[key] = program.eval_shape(*arguments)
            self._missing.append((program, arguments))
        return self._shapes[key]

    def __len__(self) -> int:
        """How many different calls there were."""
        return len(self._shapes)

    def compile(self) -> None:
        """Compiles what the tapes since the last time would have compiled when run."""
        missing, self._missing = self._missing, []
        missing.sort(key=lambda found: found[0] is not _backward)  # what takes longest comes first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda found: found[0].lower(*found[1]).compile(), missing))
