"""What the processes that do not lead do: they lend their devices, order by order, until the leading one ends.

They need the images and the space, under the names or paths that the leading process has them from, and nothing else:
weights come from it, and it alone writes files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas import processes
from hwnas.errors import HwnasError
from hwnas.network_json import from_json
from hwnas.stages import Job, make_job

if TYPE_CHECKING:
    from hwnas.candidate_scoring import SupernetScorer


@contextmanager
def gathered(where: str | None) -> Iterator[None]:
    """Runs the block in the leading process; the others follow its orders meanwhile, and then end.

    Args:
        where: as `processes.join` takes it; without it this process is alone.
    """
    if where is None:
        yield
        return
    processes.join(where)
    leads = processes.leads()
    try:
        if leads:
            yield
            processes.order("end")
        else:
            follow()
    except Exception as error:
        processes.fail(error)
        raise
    processes.part()
    if not leads:
        raise SystemExit(0)


def follow() -> None:
    """Does what the leading process orders until it ends."""
    job: Job | None = None
    scorer: SupernetScorer | None = None
    for order in processes.orders():
        if order["do"] == "work on":
            job = _same_job(order)
            processes.answer("ready")
            continue
        assert job
        if order["do"] == "train":
            _train(job, order)
        elif order["do"] == "train many":
            _train_many(job, order)
        elif order["do"] == "score with":
            scorer = _scorer(job)
        elif order["do"] == "score":
            assert scorer
            part = processes.index(), processes.count()
            processes.answer(str(scorer.correct(job.data.validation, tuple(order["code"]), *part)))


def _same_job(order: dict[str, Any]) -> Job:
    """The job of the leading process; `HwnasError` if this one sees another space or other images."""
    settings = order["settings"]
    job = make_job(settings.pop("space"), settings.pop("data"), **settings)
    for what, ours, theirs in (
        ("search space", job.space.digest, order["space_digest"]),
        ("images", job.data.fingerprint, order["data_fingerprint"]),
    ):
        if ours != theirs:
            raise HwnasError(
                f"The processes work on the same {what}; those of {processes.name()} are not those of the leading one. "
                f"Every host must see the same files under --space {job.sources[0]} --data {job.sources[1]}."
            )
    return job


def _train(job: Job, order: dict[str, Any]) -> None:
    import jax
    import numpy as np
    from flax import nnx

    from hwnas.jax_network import FixedNetwork
    from hwnas.supernet import Supernet
    from hwnas.training import Recipe, train

    network, nothing_chosen, new = order["network"], np.zeros(order["paths"], np.int32), nnx.Rngs(0)
    model: Any = FixedNetwork(from_json(network), rngs=new) if network else Supernet(job.space, rngs=new)
    train(
        model,
        job.data,
        Recipe(**order["recipe"]),
        Path(order["folder"]),
        paths=lambda step: nothing_chosen,  # the leading process chooses
        distils=order["distils"],
        seed=order["seed"],
    )
    if network:
        jax.clear_caches()  # what was compiled for one network is of no use to the next


def _train_many(job: Job, order: dict[str, Any]) -> None:
    from flax import nnx

    from hwnas.supernet import Supernet
    from hwnas.training import Recipe, train_many

    models = [Supernet(job.space, rngs=nnx.Rngs(0))] * len(order["codes"])
    train_many(models, order["codes"], job.data, Recipe(**order["recipe"]), Path(order["folder"]), seed=order["seed"])


def _scorer(job: Job) -> "SupernetScorer":
    from flax import nnx

    from hwnas.candidate_scoring import scorer_of, with_weights_of_leader
    from hwnas.supernet import Supernet

    return scorer_of(with_weights_of_leader(Supernet(job.space, rngs=nnx.Rngs(0))), job.data)
