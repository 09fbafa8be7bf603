"""Checkpoints: arrays by Orbax, with our own SHA-256 sums beside them, since Orbax restores flipped bits silently.

A checkpoint is the folder `step-00001234`. It is written under another name, summed, and renamed last, so that a kill
leaves the one before as the newest whole one.
"""

import hashlib
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
        for old in folder.glob("unfinished-*"):
            shutil.rmtree(old, ignore_errors=True)
        with _orbax_silenced():
            arrays = _filled(_named_leaves(jax.tree.map(np.asarray, tree)))
            _checkpointer().save(unfinished.absolute() / "arrays", arrays)
        (unfinished / SUMS).write_bytes(_sums(_digests(unfinished)))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    except (OSError, ValueError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, ValueError) and "os_error_code" not in str(error):
            raise  # what the operating system did not refuse is a bug
        reason = "the disk is full" if "No space left" in str(error) else error
        raise HwnasError(
            f"The checkpoint {final} could not be written: {reason}. Free some space or give another folder, and run "
            "the same command again: it goes on from the checkpoint before."
        ) from None
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and path of the newest whole checkpoint of a folder, if there is one."""
    found = _checkpoints(folder)
    return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else None


def load_checkpoint(path: Path, like: Tree) -> Tree:
    """The arrays of a checkpoint in the structure of `like`.

    Raises:
        HwnasError: a file is missing, was changed, or the arrays are not those of `like`.
    """
    _check_sums(path)
    stored, wanted = _checkpointer().restore(path.absolute() / "arrays"), _named_leaves(like)
    found, expected = ({name: leaf.shape for name, leaf in leaves.items()} for leaves in (stored, _filled(wanted)))
    for name in sorted(found | expected):
        if found.get(name) != expected.get(name):
            raise HwnasError(
                f"The checkpoint {path} belongs to another network: the shape of {name} is "
                f"{found.get(name, 'missing')} there and {expected.get(name, 'missing')} here. "
                "Give another folder, or remove that one to train anew."
            )
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [np.asarray(stored.get(name, leaf)) for name, leaf in wanted.items()])


def _check_sums(path: Path) -> None:
    rule = f"The checkpoint {path} is damaged"
    action = "Remove that folder and run the same command again: it goes on from the checkpoint before."
    try:
        text = (path / SUMS).read_bytes()
        promised = {name: digest for digest, name in (line.split("  ", 1) for line in text.decode().splitlines())}
    except (OSError, ValueError):
        raise HwnasError(f"{rule}: its {SUMS} cannot be read. {action}") from None
    found = _digests(path)
    for name in sorted(promised | found):
        if promised.get(name) != found.get(name):
            how = "is missing" if name not in found else "was changed since it was written"
            raise HwnasError(f"{rule}: {name} {how}. {action}")
    if text != _sums(found):
        raise HwnasError(f"{rule}: its {SUMS} was changed since it was written. {action}")


def _sums(digests: dict[str, str]) -> bytes:
    """What `sha256sum` prints for these files."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by a readable name that serves as a file's key."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{i:04d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _filled(leaves: dict[str, Any]) -> dict[str, Any]:
    """Without the arrays that hold nothing, such as the later units of a stage of one unit: Orbax refuses them."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


@contextmanager
def _orbax_silenced() -> Iterator[None]:
    """Orbax logs what its writers raise, with their tracebacks, and raises it again: once is enough.

    After a failure its other writers still end, and complain that nobody waits for them: that is not shown.
    """
    logger, shown = logging.getLogger("absl"), sys.unraisablehook

    def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            shown(unraisable)

    before, logger.disabled = logger.disabled, True
    sys.unraisablehook = show_others
    try:
        yield
        sys.unraisablehook = shown
    finally:
        logger.disabled = before


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    own = jax.process_index()  # other processes do not take part, and are not waited for
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process {own}"
    )
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)
