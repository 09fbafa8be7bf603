"""A network computed piece by piece, each compiled for the shapes that it meets: the form for long trainings on a CPU.

A piece is a function of some weights and of feature maps hardly larger than the architecture has them. A space has a
fixed number of pieces, by its widths, kernels and the like, however many architectures come; which of them an
architecture runs, Python decides. `Tape` runs them, and then their gradients in the opposite order; or it only has
compiled, on all cores, what it would run.

Compiling takes as long as there are loops over memory. So the weights stay on the host, where numpy cuts out what a
piece takes and adds what comes back; and a gradient's program is given the batch norms' statistics.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hwnas.jax_layers import Array
from hwnas.programs import Programs
from hwnas.row_layers import norm_again, norm_once, rows_at

Weights = Mapping[str, np.ndarray]

Unit = tuple[str, int | None]
"""The prefix of a unit's weights' names, and where those of several units are stacked, its place there."""

# ---- weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """Some places of an axis of a weight, a slice or an array, and zeros behind them up to a size."""

    places: Any
    size: int

    @property
    def count(self) -> int:
        """How many places there are."""
        places = self.places
        return len(places) if isinstance(places, np.ndarray) else places.stop - places.start


def first(count: int, size: int | None = None) -> Axis:
    """The first places of an axis, and zeros."""
    return Axis(slice(0, count), size or count)


def centre(side: int, within: int) -> Axis:
    """The places in the middle of an axis."""
    margin = (within - side) // 2
    return Axis(slice(margin, margin + side), side)


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What a piece takes of a weight.

    Attributes:
        name: of the weight in its unit.
        axes: which places of each axis, an array of places for one at most; of none at all, the whole weight.
        joined: which of those elements count, the others being zero; None if all do.
    """

    name: str
    axes: tuple[Axis, ...] = ()
    joined: np.ndarray | None = None

    def of(self, weight: np.ndarray) -> np.ndarray:
        """What is taken."""
        taken = weight[self._places]
        if self.joined is not None:
            taken = taken * self.joined
        if all(axis.size == axis.count for axis in self.axes):
            return taken
        part = np.zeros([axis.size for axis in self.axes], np.float32)
        part[self._there] = taken
        return part

    def shape_of(self, weight: np.ndarray) -> jax.ShapeDtypeStruct:
        """Its shape alone."""
        shape = tuple(axis.size for axis in self.axes) or weight.shape
        return jax.ShapeDtypeStruct(shape, np.float32)

    def add(self, total: np.ndarray, gradient: np.ndarray) -> None:
        """Adds a gradient by what was taken to that by the weight."""
        gradient = gradient[self._there]
        total[self._places] += gradient if self.joined is None else gradient * self.joined

    @property
    def _places(self) -> tuple[Any, ...]:
        return tuple([axis.places for axis in self.axes])

    @property
    def _there(self) -> tuple[slice, ...]:
        return tuple([slice(axis.count) for axis in self.axes])


Cuts = Mapping[str, Cut]
"""What a piece takes of the weights of a unit, by the names that the piece has for it."""

OfUnit = tuple[Unit, Cuts, dict[str, Array]]
"""Gradients by what was taken of a unit's weights."""


def add_all(totals: Weights, gradients: Iterable[OfUnit]) -> None:
    """Adds gradients to those of all weights."""
    for unit, cuts, of_own in gradients:
        for name, gradient in of_own.items():
            cuts[name].add(_weight(totals, unit, cuts[name]), np.asarray(gradient))


def _weight(weights: Weights, unit: Unit, cut: Cut) -> np.ndarray:
    """The weight that a cut is of."""
    prefix, index = unit
    weight = weights[prefix + cut.name]
    return weight if index is None else weight[index]


# ---- pieces ------------------------------------------------------------------------------------------------------


class Norms:
    """The batch norms of a piece, by this batch's statistics; those that are not known yet are found.

    Args:
        known: what an earlier run of the piece found, so that this one is differentiable.
    """

    def __init__(self, known: Sequence[tuple[Array, Array]] = ()) -> None:
        self.known, self.found = list(known), []

    def __call__(self, x: Array, own: Mapping[str, Array]) -> Array:
        """A map normalised, then with the scale and offset among the piece's weights."""
        pair = own["scale"], own["offset"]
        if self.known:
            return norm_again(x, *pair, self.known.pop(0))
        y, known = norm_once(x, *pair)
        self.found.append(known)
        return y


Function = Callable[..., Array]
"""A function of a module, `(own, maps, places, norm, **options) -> y`.

`own` are weights by name and `maps` feature maps; y is differentiable by both. `places` are arrays of integers, or
images and targets; `norm` is a `Norms`. The options are constants.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A function with its options; it is compiled for each."""

    function: Function
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, own: Any, maps: Any, places: Any, norm: Norms) -> Array:
        return self.function(own, maps, places, norm, **dict(self.options))


@partial(jax.jit, static_argnums=0)
def _forward(piece, own, maps, places):
    norm = Norms()
    y = piece(own, maps, places, norm)
    return y, norm.found


@partial(jax.jit, static_argnums=0)
def _backward(piece, own, maps, places, known, g):
    return jax.vjp(lambda own, maps: piece(own, maps, places, Norms(known)), own, maps)[1](g)


_taken = jax.jit(rows_at)


@partial(jax.jit, donate_argnums=0)
def _replaced(x: Array, order: Array, y: Array) -> Array:
    return x.at[jnp.where(order >= 0, order, len(x))].set(y, mode="drop", unique_indices=True)


@partial(jax.jit, donate_argnums=0)
def _added(x: Array, y: Array) -> Array:
    return x + y


# ---- tapes -------------------------------------------------------------------------------------------------------


class Value:
    """A feature map of a tape; two may share an array."""

    __slots__ = ("array", "key")

    def __init__(self, array: Array) -> None:
        self.array, self.key = array, object()


class Tape:
    """Runs pieces, keeps what their gradients need, and runs these.

    Args:
        weights: by prefix and name.
        programs: what it runs.
        surveys: nothing is computed, but all that would be run begins to be compiled.
    """

    def __init__(self, weights: Weights, programs: Programs, *, surveys: bool = False) -> None:
        self.weights, self.surveys = weights, surveys
        self._call = programs.shapes if surveys else programs
        self._back: list[Callable[[dict[object, Array]], OfUnit | None]] = []

    def run(
        self,
        function: Function,
        unit: Unit,
        cuts: Cuts,
        maps: Sequence[Value],
        places: tuple[Any, ...] = (),
        **options: Any,
    ) -> Value:
        """What a piece makes of feature maps.

        Args:
            function: the piece.
            unit: whose piece it is.
            cuts: what it takes of its weights.
            maps, places, options: its other arguments.
        """
        piece, arrays, own = Piece(function, tuple(options.items())), tuple(value.array for value in maps), {}
        for name, cut in cuts.items():
            weight = _weight(self.weights, unit, cut)
            own[name] = cut.shape_of(weight) if self.surveys else cut.of(weight)
        array, known = self._call(_forward, piece, own, arrays, places)
        made = Value(array)
        key, keys = made.key, [value.key for value in maps]

        def back(gradients: dict[object, Array]) -> OfUnit:
            of_own, of_maps = self._call(_backward, piece, own, arrays, places, known, gradients.pop(key))
            for map_key, one in zip(keys, of_maps, strict=True):
                before = gradients.get(map_key)
                gradients[map_key] = one if before is None else self._call(_added, before, one)
            return unit, cuts, of_own

        self._back.append(back)
        return made

    def enter(self, x: Value, order: Any) -> tuple[Value, Value]:
        """Row `order[i]` of x as row i, zeros where that is -1; and x, in which `leave` must replace those rows."""
        rest, entry = Value(x.array), Value(self._call(_taken, x.array, order))
        key, rest_key, entry_key = x.key, rest.key, entry.key

        def back(gradients: dict[object, Array]) -> None:
            gradients[key] = self._call(_replaced, gradients.pop(rest_key), order, gradients.pop(entry_key))

        self._back.append(back)
        return rest, entry

    def leave(self, rest: Value, order: Any, y: Value) -> Value:
        """x with row i of y as row `order[i]`; the memory of x is given away."""
        x = Value(self._call(_replaced, rest.array, order, y.array))
        key, rest_key, y_key = x.key, rest.key, y.key

        def back(gradients: dict[object, Array]) -> None:
            g = gradients[rest_key] = gradients.pop(key)
            gradients[y_key] = self._call(_taken, g, order)

        self._back.append(back)
        return x

    def gradients(self, of: Value) -> list[OfUnit]:
        """The gradients of a scalar by all weights that were used."""
        found: dict[object, Any] = {of.key: np.float32(1)}
        of_units = []
        while self._back:  # each lets go of what it kept
            if of_unit := self._back.pop()(found):
                of_units.append(of_unit)
        return of_units
