"""A network computed piece by piece, each compiled for the shapes that it meets: the form for long trainings on a CPU.

A piece is a function of some weights and of feature maps hardly larger than the architecture has them. A space has a
fixed number of pieces, by its widths, kernels and the like, however many architectures come; which of them an
architecture runs, Python decides. `Tape` runs them, and then their gradients in the opposite order. `Survey` finds
what a tape would run, so that it can be compiled beforehand, on all cores.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hwnas.jax_layers import Array
from hwnas.row_layers import one_of, rows_at

Function = Callable[..., Array]
"""A function of a module, `(own, maps, places, **options) -> y`.

`own` are weights by name and `maps` feature maps; y is differentiable by both. `places` are arrays of integers, or
images and targets. The options are constants.
"""

Weights = Mapping[str, Array]

Unit = tuple[str, int | None]
"""The prefix of a unit's weights' names, and where those of several units are stacked, its place there."""

OfUnit = tuple[Unit, dict[str, Array]]
"""Gradients by some of a unit's weights, by name."""


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
        self._back: list[Callable[[dict[object, Array]], OfUnit | None]] = []

    def run(
        self,
        function: Function,
        unit: Unit,
        names: Sequence[str],
        maps: Sequence[Value],
        places: tuple[Any, ...] = (),
        **options: Any,
    ) -> Value:
        """What a piece makes of feature maps.

        Args:
            function: the piece.
            unit: whose piece it is.
            names: the weights that it takes.
            maps, places, options: its other arguments.
        """
        prefix, index = unit
        own, piece = {name: self.weights[prefix + name] for name in names}, Piece(function, tuple(options.items()))
        arrays, at = tuple(value.array for value in maps), () if index is None else (np.int32(index),)
        made = Value(self.call(_forward, piece, own, at, arrays, places))
        key, keys = made.key, [value.key for value in maps]

        def back(gradients: dict[object, Array]) -> OfUnit:
            of_own, of_maps = self.call(_backward, piece, own, at, arrays, places, gradients.pop(key))
            for map_key, one in zip(keys, of_maps, strict=True):
                known = gradients.get(map_key)
                gradients[map_key] = one if known is None else self.call(_added, known, one)
            return unit, of_own

        self._back.append(back)
        return made

    def enter(self, x: Value, order: Any) -> tuple[Value, Value]:
        """Row `order[i]` of x as row i, zeros where that is -1; and x, in which `leave` must replace those rows."""
        rest, entry = Value(x.array), Value(self.call(_taken, x.array, order))
        key, rest_key, entry_key = x.key, rest.key, entry.key

        def back(gradients: dict[object, Array]) -> None:
            gradients[key] = self.call(_replaced, gradients.pop(rest_key), order, gradients.pop(entry_key))

        self._back.append(back)
        return rest, entry

    def leave(self, rest: Value, order: Any, y: Value) -> Value:
        """x with row i of y as row `order[i]`; the memory of x is given away."""
        x = Value(self.call(_replaced, rest.array, order, y.array))
        key, rest_key, y_key = x.key, rest.key, y.key

        def back(gradients: dict[object, Array]) -> None:
            g = gradients[rest_key] = gradients.pop(key)
            gradients[y_key] = self.call(_taken, g, order)

        self._back.append(back)
        return x

    def gradients(self, of: Value) -> list[OfUnit]:
        """The gradients of a scalar by all weights that were used."""
        found: dict[object, Array] = {of.key: self.call(_one, of.array)}
        of_units = []
        while self._back:  # each lets go of what it kept
            if of_unit := self._back.pop()(found):
                of_units.append(of_unit)
        return of_units


def add_all(totals: Mapping[str, np.ndarray], gradients: Iterable[OfUnit]) -> None:
    """Adds gradients to those of all weights; numpy does, for which nothing need be compiled."""
    for (prefix, index), of_own in gradients:
        for name, gradient in of_own.items():
            total = totals[prefix + name]
            if index is not None:
                total = total[index]
            total += np.asarray(gradient)


@partial(jax.jit, static_argnums=0)
def _forward(piece, weights, at, maps, places):
    return piece(_own(weights, at), maps, places)


@partial(jax.jit, static_argnums=0)
def _backward(piece, weights, at, maps, places, g):
    return jax.vjp(lambda own, maps: piece(own, maps, places), _own(weights, at), maps)[1](g)


def _own(weights: Any, at: tuple[Array, ...]) -> Any:
    if not at:
        return weights
    return one_of(weights, at[0])


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
    """Stands in for the calls of a tape: nothing is computed, but what would be compiled for it is, on all cores.

    Of what such a tape is given only the shapes count, and feature maps are `jax.ShapeDtypeStruct`.
    """

    def __init__(self) -> None:
        self._shapes: dict[Any, Any] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._begun: list[Future[Any]] = []

    def __call__(self, program: Any, *arguments: Any) -> Any:
        """The shapes of what a compiled function would return; if they are new, it begins to compile it."""
        pieces = tuple(argument for argument in arguments if isinstance(argument, Piece))
        leaves, tree = jax.tree.flatten(arguments[len(pieces) :])
        key = program, pieces, tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._shapes:
            shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            traced = program.trace(*pieces, *jax.tree.unflatten(tree, shapes))
            self._shapes[key] = traced.out_info
            self._begun.append(self._pool.submit(lambda: traced.lower().compile()))
        return self._shapes[key]

    def __len__(self) -> int:
        """How many different calls there were."""
        return len(self._shapes)

    def wait(self) -> None:
        """Until all is compiled that tapes would have compiled when run."""
        begun, self._begun = self._begun, []
        for compiling in begun:
            compiling.result()
