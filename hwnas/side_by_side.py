"""Networks of one space that train from scratch side by side, as many as fit on an accelerator at a time.

A small network leaves most of an accelerator idle, and each would be compiled anew. Here all of them are one program: a
supernet's, of which each network uses its own part with its own weights (`supernet.with_weights`). The numbers are
those of training each on its own, up to rounding.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hwnas.network import memory_access
from hwnas.space import Architecture, lower
from hwnas.stages import Job, step_listener

if TYPE_CHECKING:
    from hwnas.jax_layers import Form

MEMORY_SHARE, BYTES_A_VALUE = 0.6, 0.6
"""How much of an accelerator's memory the feature maps of all networks may take, and the bytes that training needs for
each value that a run of the largest network reads or writes: 0.54 in `docs/measured/nvidia-h200-training.log`."""


def helps() -> bool:
    """Whether this process computes on devices on which several networks together are faster."""
    from hwnas.jax_layers import native_form

    return not native_form().control_flow


def at_a_time(job: Job, count: int) -> int:
    """How many of `count` networks to train at a time, in equal groups as far as they go."""
    import jax

    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 4 * 1024**3)
    each = BYTES_A_VALUE * job.batch_size * memory_access(lower(job.space, job.space.largest))
    most = max(1, int(MEMORY_SHARE * memory / each))
    groups = -(-count // most)
    return -(-count // groups)


def accuracies_from_scratch(
    job: Job, architectures: Sequence[Architecture], folder: Path, form: "Form | None" = None
) -> tuple[list[float], str]:
    """Validation accuracies after `job.retrain_epochs` from new weights, those that `trained.retrained` starts from.

    Also where in the folder the checkpoints lie.

    Args:
        job: data and settings.
        architectures: what to train.
        folder: the checkpoints go to one in it that is named after what is trained and how.
        form: how it is computed; without it the fastest for the device.
    """
    from flax import nnx

    from hwnas.candidate_scoring import scorer_of
    from hwnas.jax_network import FixedNetwork
    from hwnas.supernet import Supernet, with_weights
    from hwnas.training import Recipe, train_many

    def start(architecture: Architecture) -> Supernet:
        network = FixedNetwork(lower(job.space, architecture), rngs=nnx.Rngs(job.seed), form=form)
        weights = {name: weight[...] for name, weight in network.weights.items()}
        return with_weights(Supernet(job.space, rngs=nnx.Rngs(0), form=form), architecture, weights)

    recipe = Recipe(job.retrain_epochs, job.batch_size, job.learning_rate)
    codes = [job.space.encode(architecture) for architecture in architectures]
    digits = hashlib.sha256(repr((job.space.digest, codes, recipe, job.seed)).encode()).hexdigest()[:8]
    checkpoints = f"checkpoints/{digits}"
    job.listener.stage(f"Training {len(codes)} networks side by side from new weights, {recipe.epochs} epochs")
    with step_listener(job, folder / "events" / digits) as on_step:
        models = train_many(
            [start(architecture) for architecture in architectures],
            codes,
            job.data,
            recipe,
            folder / checkpoints,
            seed=job.seed,
            on_step=on_step,
        )
    scorer = scorer_of(models[0], job.data, calibration_images=1024)
    of_each = zip(models, codes, strict=True)
    return [scorer.of(model).accuracy(job.data.validation, code) for model, code in of_each], checkpoints
