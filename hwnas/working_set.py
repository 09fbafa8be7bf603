"""How many bytes a network works on at a time: a walk over the live ranges of its tensors."""

import math

from hwnas.network import Activation, BatchNorm, Flatten, Network, weight_shapes

_IN_PLACE = (BatchNorm, Activation, Flatten)
"""Operators that write over their input if nothing else reads it."""

_VALUE_BYTES = {"fp32": 4, "int8": 1}


def working_bytes(network: Network, *, batch: int = 1, precision: str = "fp32") -> int:
    """The most bytes, over all nodes in their order, of the tensors that are still to be read and the node's weights.

    A tensor lives from the node that makes it to the last one that reads it; the network's outputs live to the end.
    """
    last = {t.name: index for index, node in enumerate(network.nodes) for t in node.inputs}
    last |= {t.name: len(network.nodes) for t in network.outputs}
    alive = {network.input.name: network.input.size}
    peak = 0
    for index, node in enumerate(network.nodes):
        ended = {t.name for t in node.inputs if last[t.name] == index}
        if isinstance(node.operator, _IN_PLACE):
            for name in ended:
                alive.pop(name)
        alive |= {t.name: t.size for t in node.outputs}
        weights = sum(map(math.prod, weight_shapes(node).values()))
        peak = max(peak, sum(alive.values()) * batch + weights)
        alive = {name: size for name, size in alive.items() if last.get(name, index) > index}
    return peak * _VALUE_BYTES[precision]
