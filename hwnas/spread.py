"""Training on several devices: each works on its share of every batch, and the numbers are those of one device.

Weights lie on every device. A compiled function means the same however its arrays are divided, so batch norms are by
the whole batch of a path and gradients are sums over all devices; XLA adds what the devices must tell each other. The
devices may belong to several processes (`processes.py`): each reads and sends its own share of the images.
"""

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hwnas import processes
from hwnas.errors import HwnasError


@dataclass(frozen=True, slots=True)
class Spread:
    """The devices that share the images of a path; one device alone has no mesh."""

    mesh: Mesh | None = None

    # ---- outside of compiled functions

    def everywhere(self, tree: Any) -> Any:
        """Arrays, the same on each device; all processes give the same ones."""
        if self.mesh is None:
            return jax.device_put(tree)
        same = NamedSharding(self.mesh, PartitionSpec())
        if processes.count() == 1:
            return jax.device_put(tree, same)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(same, np.asarray(x)), tree)

    def of_leader(self, tree: Any) -> Any:
        """The arrays of the leading process on each device; the others give arrays of the same shapes.

        All processes first wait for each other, so that the devices find each other in the time that they have.
        """
        if processes.count() == 1:
            return self.everywhere(tree)
        told = self.told(tree)
        processes.meet()
        with processes.together(), _quiet_output():
            return jax.block_until_ready(jax.jit(self.heard)(told))

    def told(self, tree: Any) -> Any:
        """Numbers of the leading process for a compiled function, which `heard` makes of them."""
        if self.mesh is None or processes.count() == 1:
            return tree
        rows, own = NamedSharding(self.mesh, PartitionSpec("images")), len(self.mesh.local_devices)

        def rows_of(x: Any) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_process_local_data(rows, np.broadcast_to(x, (own, *x.shape)))

        return jax.tree.map(rows_of, tree)

    def images(self, x: np.ndarray) -> Any:
        """Images or labels `[P, N, ...]`, of N this process's `share`: each device has its part of every path's."""
        if self.mesh is None:
            return x
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, PartitionSpec(None, "images")), x)

    def share(self, images: int) -> range:
        """Which of the images of a path this process reads."""
        own = images // processes.count()
        return range(processes.index() * own, (processes.index() + 1) * own)

    def alone(self, tree: Any) -> Any:
        """Arrays that are the same on each device, on one device of this process."""
        return jax.tree.map(lambda x: x.addressable_data(0), tree) if self.mesh else tree

    # ---- inside

    def heard(self, tree: Any) -> Any:
        """What was `told`, on each device."""
        if self.mesh is None or processes.count() == 1:
            return tree
        return self.same(jax.tree.map(lambda x: x[0], tree))

    def path_images(self, x: jax.Array) -> jax.Array:
        """Images or labels `[P, N, ...]`: each device has its share of every path's N."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(None, "images")))

    def same(self, tree: Any) -> Any:
        """Has each device hold all of the arrays."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))


def spread_of(images: int) -> Spread:
    """As many devices as divide the images of a path evenly, equally many of each process.

    Raises:
        HwnasError: there are not so many images that each process has one, or they do not divide.
    """
    devices = jax.devices()
    owners = sorted(Counter(device.process_index for device in devices).items())
    fit = [n for n in range(1, min(own for _, own in owners) + 1) if images % (n * len(owners)) == 0]
    if not fit:
        raise HwnasError(
            f"Each of the {len(owners)} processes takes an equal part of the images of a path; {images} images do not "
            f"divide. Give a --batch-size that is a multiple of {len(owners)} times the paths of a step."
        )
    chosen = [[d for d in devices if d.process_index == owner][: max(fit)] for owner, _ in owners]
    mesh = Mesh(np.array(chosen).ravel(), ("images",))
    return Spread(mesh if mesh.size > 1 else None)


@contextmanager
def _quiet_output() -> Iterator[None]:
    """Gloo prints on the standard output when processes find each other, where `--json` has its place."""
    output, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # it may still lie in C's buffer
        os.dup2(output, 1)
        os.close(output)
        os.close(nothing)
