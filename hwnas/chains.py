"""How a unit is timed: as the difference that it makes to a short chain of units, its host.

The host gives the unit the neighbours that it has in the space, so that what the runtime does at its borders (changes
of layout, fusions) is paid as in a whole network:

| unit                        | host                                   | with the unit                          |
|-----------------------------|----------------------------------------|----------------------------------------|
| stem                        | nothing                                | the stem                               |
| stride 2, first stage       | the stem, whose layout it takes over   | the stem, then the unit                |
| stride 2, later stages      | a plain stride-1 unit of its width     | the unit, then the plain one           |
| stride 1                    | a plain stride-1 unit of its width     | the unit `COPIES` times, the plain one |
| head                        | a plain stride-1 unit of its width     | the plain one, then the head           |

A chain that begins with the stem ends with the mean over height and width. Else the runtime would lay out a large map
anew for the user, as in no network: OpenVINO takes longer for a stem alone than for one with a unit behind it.
"""

from collections.abc import Sequence

from hwnas.network import GlobalAveragePool, Network
from hwnas.places import Place, network_at, stem_place
from hwnas.space import SearchSpace
from hwnas.units import UnitChoice

COPIES = 2
"""How often a stride-1 unit stands in its chain: more copies, less noise, more time."""


def host_of(space: SearchSpace, place: Place) -> tuple[Place, ...]:
    """The chain in whose company the unit at a place is timed; see the table at the top of this module."""
    if place.stage == 1:
        return ()
    if place.stage == 2 and place.stride == 2:
        return (stem_place(space),)
    stage, channels = (place.stage - 1, place.channels_in) if place.choice is None else (place.stage, place.channels)
    return (Place(stage, channels, channels, 1, UnitChoice()),)


def chain_of(space: SearchSpace, place: Place) -> tuple[Place, ...]:
    """The host of a place with the unit added to it."""
    host = host_of(space, place)
    if place.choice is None or (place.stage == 2 and place.stride == 2):
        return (*host, place)
    return (*[place] * copies_of(place), *host)


def copies_of(place: Place) -> int:
    """How often the unit at a place stands in its chain."""
    return COPIES if place.stride == 1 and place.choice is not None else 1


def network_of(space: SearchSpace, chain: Sequence[Place]) -> Network:
    """A chain, or a host, as the network that is timed."""
    return network_at(space, chain, ends_with=GlobalAveragePool() if chain[0].stage == 1 else None)
