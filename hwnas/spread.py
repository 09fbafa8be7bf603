"""Training on several devices: each works on its share of every batch, and the numbers are those of one device.

Weights lie on every device. A compiled function means the same however its arrays are divided, so batch norms are by
the whole batch of a path and gradients are sums over all devices; XLA adds what the devices must tell each other.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True, slots=True)
class Spread:
    """The devices that share the images of a path; one device alone has no mesh."""

    mesh: Mesh | None

    def everywhere(self, tree: Any) -> Any:
        """Arrays, the same on each device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec())) if self.mesh else tree

    def path_images(self, x: jax.Array) -> jax.Array:
        """Images or labels `[P, N, ...]` inside a compiled function: each device has its share of every path's N."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(None, "images")))


def spread_of(images: int) -> Spread:
    """As many of this process's devices as divide the images of a path evenly."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if images % n == 0)
    return Spread(Mesh(np.array(devices[:count]), ("images",)) if count > 1 else None)
