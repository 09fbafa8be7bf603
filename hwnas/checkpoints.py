"""Checkpoints: arrays by Orbax, with our own SHA-256 sums beside them, since Orbax restores flipped bits silently.

A checkpoint is the folder `step-00001234`. It is written under another name, summed, and renamed last, so that a kill
leaves the one before as the newest whole one.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from hwnas.errors import HwnasError

SUMS = "SHA256SUMS"

Tree = TypeVar("Tree")


def save_checkpoint(folder: Path, step: int, tree: Any, *, keep: int = 2) -> Path:
    """Writes a pytree of arrays as the checkpoint of `step` and removes all but the newest `keep`.

    Raises:
        HwnasError: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    final, unfinished = folder / f"step-{step:08d}", folder / f"unfinished-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (final, *folder.glob("unfinished-*")):
            shutil.rmtree(old, ignore_errors=True)
        _checkpointer().save(unfinished.absolute() / "arrays", _named_leaves(tree))
        (unfinished / SUMS).write_text("".join(f"{d}  {n}\n" for n, d in _digests(unfinished).items()))
        unfinished.rename(final)
    except (OSError, ValueError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise HwnasError(
            f"The checkpoint {final} could not be written ({error}). Free some space or give another folder, and run "
            "the same command again: it goes on from the checkpoint before."
        ) from None
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and path of the newest whole checkpoint of a folder, if there is one."""
    found = sorted(folder.glob("step-*"))
    return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else None


def load_checkpoint(path: Path, like: Tree) -> Tree:
    """The arrays of a checkpoint in the structure of `like`.

    Raises:
        HwnasError: a file is missing, was changed, or the arrays are not those of `like`.
    """
    _check_sums(path)
    stored = _checkpointer().restore(path.absolute() / "arrays")
    wanted = _named_leaves(like)
    for name, leaf in wanted.items():
        if name not in stored or stored[name].shape != leaf.shape:
            found = "missing" if name not in stored else f"of shape {stored[name].shape}"
            raise HwnasError(
                f"The checkpoint {path} belongs to another network: {name} is {found}, {leaf.shape} is wanted. "
                "Give another folder, or remove that one to train anew."
            )
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [np.asarray(stored[name]) for name in wanted])


def _check_sums(path: Path) -> None:
    rule = f"The checkpoint {path} is damaged"
    action = "Remove that folder and run the same command again: it goes on from the checkpoint before."
    try:
        lines = (path / SUMS).read_text().splitlines()
        promised = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        raise HwnasError(f"{rule}: its {SUMS} cannot be read. {action}") from None
    found = _digests(path)
    for name in sorted(promised | found):
        if promised.get(name) != found.get(name):
            how = "is missing" if name not in found else "was changed since it was written"
            raise HwnasError(f"{rule}: {name} {how}. {action}")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by a readable name that serves as a file's key."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{i:04d}{jax.tree_util.keystr(path)}".replace("/", "|"): leaf for i, (path, leaf) in enumerate(leaves)}


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.StandardCheckpointHandler())
