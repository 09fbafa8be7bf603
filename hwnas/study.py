"""The Optuna study that a search lies in: its storage, which search it belongs to, and whose trials are still alive."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hwnas.errors import HwnasError

BUSY_SECONDS = 60
"""How long a worker waits for a locked SQLite file."""

TABLE_ATTEMPTS = 20
"""How often a worker tries to make the tables while others do."""

FOREIGN_STALE = timedelta(days=1)
"""A trial of another host, whose processes cannot be seen from here, is given up after this time."""


def storage_url(storage: str | Path) -> sqlalchemy.URL:
    """A path as the URL of its SQLite file, a URL as it is, with the PostgreSQL driver that hwnas installs."""
    if "://" not in str(storage):
        return sqlalchemy.URL.create("sqlite", database=str(Path(storage).absolute()))
    try:
        url = sqlalchemy.make_url(str(storage))
    except (SQLAlchemyError, ValueError):
        # the text is not shown: it may hold a password
        raise HwnasError(
            "The storage is a file or a URL such as postgresql://user:password@host/database. It is a URL that cannot "
            "be read; characters such as @ and / in a password are written as %40 and %2F."
        ) from None
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url


def shown(url: sqlalchemy.URL) -> str:
    """The URL for messages: a file as its path, a database without its password."""
    return str(url.database) if url.drivername == "sqlite" else url.render_as_string(hide_password=True)


@contextmanager
def storage_errors(storage: str | Path) -> Iterator[None]:
    """Turns what a broken storage raises into one `HwnasError` that names the storage without its password."""
    url = storage_url(storage)
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
        if url.drivername == "sqlite":
            advice = "If the file is damaged, restore it or move it away; without it the search starts again."
        else:
            advice = "Check that the server runs, and the URL's user, password, host and database."
        raise HwnasError(f"The study's storage {shown(url)} cannot be used: {reason}. {advice}") from error


def open_storage(url: sqlalchemy.URL) -> RDBStorage:
    """Optuna's storage, with tables made if they are missing."""
    arguments: dict[str, object] = {}
    if url.drivername == "sqlite":
        arguments = {"timeout": BUSY_SECONDS}
    elif url.get_backend_name() == "postgresql":
        arguments = {"connect_timeout": 10}
    # Optuna fills {SCHEMA_VERSION} into the URL
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    try:
        if url.drivername == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        return RDBStorage(text, engine_kwargs={"connect_args": arguments, "pool_pre_ping": True})
    except OSError as error:
        raise HwnasError(f"The study's file {shown(url)} cannot be made: {error.strerror}.") from None
    except ImportError:
        raise HwnasError(
            f"The driver of the study's storage {shown(url)} is missing. For PostgreSQL it comes with: "
            f"pip install 'hwnas[postgresql]'."
        ) from None
    except RuntimeError as error:
        raise HwnasError(f"The study's storage {shown(url)} was made by another version of Optuna: {error}") from None


def open_study(storage: str | Path, name: str, sampler: BaseSampler) -> Study:
    """The study of that name, made if it is missing."""
    for attempt in range(TABLE_ATTEMPTS):
        try:
            return optuna.create_study(
                storage=open_storage(storage_url(storage)),
                study_name=name,
                sampler=sampler,
                direction="maximize",
                load_if_exists=True,
            )
        except SQLAlchemyError as error:
            # workers that start together all make the tables; the later ones find them when they try again
            made = any(word in str(error).lower() for word in ("already exists", "unique"))
            if attempt == TABLE_ATTEMPTS - 1 or not made:
                raise
    raise AssertionError


def check_identity(study: Study, identity: dict[str, str]) -> None:
    """Writes what the study's scores depend on into a new study; raises `HwnasError` if an old one has other."""
    stored: dict[str, str] | None = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", identity)
        return
    keys = [key for key in {**stored, **identity} if stored.get(key) != identity.get(key)]
    if keys:
        differences = "; ".join(f"{key} was {stored.get(key)}, is {identity.get(key)}" for key in keys)
        raise HwnasError(
            f"The study '{study.study_name}' belongs to another search: {differences}. Scores of the two do not "
            f"compare. Give another run folder, or the settings of the first search."
        )


# ---- who runs a trial ------------------------------------------------------------------------------------------------


def this_host() -> str:
    """The name of the host and, on Linux, the process-id namespace, which tells containers apart."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """Something that tells a process from a later one with the same id; None if no such process runs."""
    if Path("/proc/self/stat").exists():
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        # fields from the third on: what stands before the last ")" is the command's name, which may hold spaces
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def owner() -> list[str | int | None]:
    """This process, as the trials that it runs carry it."""
    return [this_host(), os.getpid(), process_start(os.getpid())]


def is_stale(trial: FrozenTrial) -> bool:
    """Whether the process that runs a trial is gone.

    A trial of this host is stale when its process no longer runs; one of another host after `FOREIGN_STALE`. One that
    does not carry its owner yet holds no architecture and is nobody's hindrance.
    """
    if "owner" not in trial.user_attrs:
        return False
    host, pid, start = trial.user_attrs["owner"]
    if host == this_host():
        return process_start(pid) != start
    return trial.datetime_start is not None and datetime.now() - trial.datetime_start > FOREIGN_STALE


def fail_stale_trials(study: Study) -> None:
    """Marks the trials of killed processes as failed, so that their architectures may be proposed again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_stale(trial):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
