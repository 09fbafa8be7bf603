"""A space so small that the whole job takes seconds, and one finished run of it, for the tests of the whole line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import steady

from benchmarks.loopback import Board, NoServerError, running_sshd
from hwnas.cli import main

TINY = """
name = "tiny"
input_size = 16
classes = 10
[stem]
channels = 8
stride = 1
max_pool = false
[unit]
split_ratio = ["1/2"]
kernel = [3]
squeeze_excite = [false]
residual = [false]
groups = [1, 2]
extra_depthwise = [false]
[[stage]]
depth = [1]
width = [16, 32]
[[stage]]
depth = [1, 2]
width = [32]
[head]
channels = 32
"""
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of XLA's compiler for programs that a test runs a few times."""

SHORT = ("--epochs", "1", "--retrain-epochs", "1", "--trials", "4")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command printed and its exit status."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Home:
    """A folder with `tiny.toml` and a cache of its own, on a machine that nothing disturbs (`steady.py`).

    Attributes:
        folder: where commands run.
        environment: of the commands.
    """

    folder: Path
    environment: dict[str, str]

    @property
    def space(self) -> str:
        return str(self.folder / "tiny.toml")

    @property
    def table(self) -> Path:
        return self.folder / "cache/latency_tables/cpu/tiny-fp32-t1-b1.json"

    def process(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Runs `hwnas` as a user does, in a process of its own."""
        return subprocess.run(
            [sys.executable, steady.__file__, *arguments],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300, **options,
        )  # fmt: skip


def make_home(folder: Path) -> Home:
    (folder / "tiny.toml").write_text(TINY)
    environment = os.environ | {"HWNAS_CACHE": str(folder / "cache"), "NO_COLOR": "1", "COLUMNS": "100"}
    environment.pop("HWNAS_TABLES", None)
    return Home(folder, environment)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """This machine as a board, behind a real sshd on the loopback; skips where there is none."""
    try:
        with running_sshd(tmp_path_factory.mktemp("sshd")) as started:
            yield started
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def found(home: Home) -> dict[str, Any]:
    """What `hwnas search --json` printed in a process of its own, from nothing; `run` is the run's folder."""
    done = home.process("search", "--budget-ms", "1000", "--space", "tiny.toml", *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    return result | {"run": home.folder / result["run"]}


@pytest.fixture
def here(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """The same home for commands that run inside the test's process."""
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hwnas.devices.command_of", steady.command_of)
    monkeypatch.delenv("HWNAS_TABLES", raising=False)
    with contextlib.chdir(home.folder):
        yield home


@pytest.fixture
def hwnas(here: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command inside the test's process, through the same door as the real one."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    heeds_interrupts = signal.getsignal(signal.SIGINT)

    def command(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["hwnas", *map(str, arguments)])
        capsys.readouterr()
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            signal.signal(signal.SIGINT, heeds_interrupts)
        assert isinstance(status, int)
        return Answer(status, *capsys.readouterr())

    return command


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are compiled without the passes that take long and change nothing but speed and rounding."""
    import jax

    from hwnas import steps

    monkeypatch.setattr(
        steps,
        "compiled",
        lambda function, donated=(): jax.jit(function, donate_argnums=donated, compiler_options=QUICK_COMPILE),
    )


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list that grows with each program that XLA compiles or takes from its cache, whoever asked for it."""
    import jax

    found: list[str] = []

    def count(event: str, duration_secs: float, **facts: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(facts.get("fun_name")))

    jax.clear_caches()  # what another test compiled must count here, too
    jax.monitoring.register_event_duration_secs_listener(count)
    yield found
    jax.monitoring.unregister_event_duration_listener(count)
