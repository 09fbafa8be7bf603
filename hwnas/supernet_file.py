"""A trained supernet as one file: weights in 16 bit (safetensors), and what it is and how it was made as metadata.

Half the precision costs nothing here: batch norms are estimated anew for each architecture, and the winner is trained
on. Safetensors holds arrays and text only, so that a file from anyone can be opened.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwnas.errors import HwnasError
from hwnas.runs import write_bytes
from hwnas.space import SearchSpace
from hwnas.space_toml import shipped_folder

if TYPE_CHECKING:
    from hwnas.jax_layers import Form
    from hwnas.supernet import Supernet

FORMAT = "hwnas supernet 1"


def shipped_supernets() -> dict[str, Path]:
    """The files of the supernets that come with hwnas, by name; beside each lies its model card."""
    return {path.stem: path for path in sorted(shipped_folder("supernets").glob("*.safetensors"))}


def supernet_path(name_or_path: str) -> Path:
    """The file of the supernet of that name that comes with hwnas, or the path; `HwnasError` if it is no file."""
    path = shipped_supernets().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise HwnasError(
            f"There is no supernet '{name_or_path}': it is neither a supernet.safetensors of hwnas train nor one of "
            f"{', '.join(shipped_supernets())}."
        )
    return path


def write_supernet(path: Path, supernet: "Supernet", facts: dict[str, Any]) -> None:
    """Writes weights, each array under its place in the supernet, and facts, among them the `classes` of the data.

    Raises:
        HwnasError: a weight is too large for 16 bit, or the file cannot be written.
    """
    from safetensors.numpy import save

    with np.errstate(over="ignore"):  # told below
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
    write_bytes(path, save(arrays, metadata | {"sha256": _digest(metadata, arrays)}))


def read_supernet(path: Path, space: SearchSpace, classes: Sequence[str], form: "Form | None" = None) -> "Supernet":
    """The supernet of a file that was made of this space for data of these classes, in a form as of `Supernet`.

    Raises:
        HwnasError: the file cannot be read, is no supernet, or is one of another space or of other classes.
    """
    import jax
    from flax import nnx

    from hwnas.supernet import Supernet

    arrays = check_supernet(path, space, classes)
    graph, state = nnx.split(Supernet(space, rngs=nnx.Rngs(0), form=form), nnx.Param)
    leaves = []
    for name, leaf in _named_leaves(state):
        found = arrays.get(name, np.zeros(leaf.shape if not leaf.size else 0, np.float16))  # empty ones are left out
        if found.shape != leaf.shape:
            raise HwnasError(
                f"{path} is damaged: {name} has the shape {list(found.shape)}, not {list(leaf.shape)}. Get it again."
            )
        leaves.append(jax.device_put(found.astype(np.float32)))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def check_supernet(path: Path, space: SearchSpace, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a supernet's file; `HwnasError` as of `read_supernet`, without a network to put them in."""
    metadata, arrays = _read(path)
    if metadata["space_digest"] != space.digest:
        raise HwnasError(
            f"{path} is a supernet of a space {metadata['space']} that differs from this {space.name}, or of another "
            "number of classes. Give its own space and data: hwnas show tells what it was made of."
        )
    if (trained_on := json.loads(metadata["facts"])["classes"]) != list(classes):
        raise HwnasError(
            f"{path} tells the classes {', '.join(trained_on)} apart, and the data has {', '.join(classes)}. "
            "Give the data that it was trained on."
        )
    return arrays


def file_facts(path: Path) -> dict[str, Any]:
    """What a supernet's file says of how it was made; `HwnasError` if it is none."""
    metadata, arrays = _read(path)
    parameters = sum(array.size for array in arrays.values())
    return {"supernet": str(path), "parameters": parameters, **json.loads(metadata["facts"])}


def stated_digest(path: Path) -> str:
    """The SHA-256 that a supernet's file states of itself; only what reads its weights finds out whether it is true."""
    with _opened(path) as (metadata, _):
        return metadata.get("sha256", "")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, str], Any]]:
    """The metadata of a supernet's file, and the file, open for its arrays; `HwnasError` if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise HwnasError(f"{path} is not a supernet: its format is '{metadata.get('format')}', not '{FORMAT}'.")
            yield metadata, opened
    except (OSError, SafetensorError) as error:
        raise HwnasError(f"{path} is not a supernet: {error}. Give the supernet.safetensors of hwnas train.") from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with _opened(path) as (metadata, opened):
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    if metadata.pop("sha256", None) != _digest(metadata, arrays):
        raise HwnasError(f"The supernet {path} is damaged: it is not what was written. Get it again.")
    return metadata, arrays


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _named_weights(supernet: "Supernet") -> dict[str, Any]:
    from flax import nnx

    return {name: leaf for name, leaf in _named_leaves(nnx.split(supernet, nnx.Param)[1]) if leaf.size}


def _named_leaves(state: Any) -> list[tuple[str, Any]]:
    import jax

    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
