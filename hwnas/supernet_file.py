"""A trained supernet as one file: weights in 16 bit (safetensors), and what it is and how it was made as metadata.

Half the precision costs nothing here: batch norms are estimated anew for each architecture, and the winner is trained
on. Safetensors holds arrays and text only, so that a file from anyone can be opened.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwnas.errors import HwnasError
from hwnas.runs import write_bytes
from hwnas.space import SearchSpace

if TYPE_CHECKING:
    from hwnas.data import DataSet
    from hwnas.supernet import Supernet

FORMAT = "hwnas supernet 1"


def write_supernet(path: Path, supernet: "Supernet", facts: dict[str, Any]) -> None:
    """Writes weights, each array under its place in the supernet, and facts for a person or a program.

    Raises:
        HwnasError: a weight is too large for 16 bit, or the file cannot be written.
    """
    from safetensors.numpy import save

    arrays = {name: np.asarray(leaf, np.float16) for name, leaf in _named_weights(supernet).items()}
    if wrong := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise HwnasError(f"Weights are finite numbers up to 65,504 in 16 bit; {wrong[0]} holds others. Train anew.")
    space = supernet.space
    metadata = {
        "format": FORMAT,
        "space": space.name,
        "space_digest": space.digest,
        "facts": json.dumps(facts),
    }
    write_bytes(path, save(arrays, metadata))


def supernet_card(folder: Path, data: "DataSet") -> dict[str, Any]:
    """The facts of a supernet's folder, and of its data what a model must know."""
    facts = json.loads((folder / "supernet.json").read_text(encoding="utf-8"))
    del facts["settings"]
    return facts | {"classes": list(data.classes), "mean": data.mean, "std": data.std}


def read_supernet(path: Path, space: SearchSpace) -> "tuple[Supernet, dict[str, Any]]":
    """The supernet of a file and its facts, `classes` among them.

    Raises:
        HwnasError: the file cannot be read, is no supernet of this space, or was changed.
    """
    from flax import nnx
    from safetensors import SafetensorError, safe_open

    from hwnas.supernet import Supernet

    try:
        with safe_open(str(path), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise HwnasError(f"{path} is not a supernet: {error}. Give a file that hwnas train wrote.") from None
    if metadata.get("format") != FORMAT:
        raise HwnasError(f"{path} is not a supernet: its format is '{metadata.get('format')}', not '{FORMAT}'.")
    facts = json.loads(metadata["facts"])
    space = replace(space, classes=len(facts["classes"]))
    if metadata["space_digest"] != space.digest:
        raise HwnasError(
            f"{path} is a supernet of the space {metadata['space']} with other choices than this {space.name} has. "
            "Give the space's own file as --space."
        )
    supernet = Supernet(space, rngs=nnx.Rngs(0))
    graph, state = nnx.split(supernet, nnx.Param)
    import jax

    leaves = []
    for name, leaf in _named_leaves(state):
        found = arrays.get(name)
        if found is None or found.shape != leaf.shape:
            shape = "missing" if found is None else list(found.shape)
            raise HwnasError(f"{path} is damaged: {name} is {shape}, and the space needs {list(leaf.shape)}.")
        leaves.append(jax.numpy.asarray(found, jax.numpy.float32))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves)), facts


def _named_weights(supernet: "Supernet") -> dict[str, Any]:
    from flax import nnx

    return {name: leaf for name, leaf in _named_leaves(nnx.split(supernet, nnx.Param)[1]) if leaf.size}


def _named_leaves(state: Any) -> list[tuple[str, Any]]:
    import jax

    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
