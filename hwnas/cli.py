"""The command line: one verb a stage. Heavy imports wait until a verb runs."""

import errno
import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from hwnas import cli_devices, cli_training, cli_trust, processes
from hwnas.cli_options import (
    DEFAULT_DATA,
    DEFAULT_METHOD,
    DEFAULT_SPACE,
    BatchImages,
    BatchSize,
    DeviceName,
    Epochs,
    Json,
    LearningRate,
    Method,
    Paths,
    Precision,
    Processes,
    RetrainEpochs,
    Runs,
    SearchedData,
    SearchedDevice,
    SearchedSpace,
    Seed,
    Space,
    SupernetFile,
    Threads,
    WithinMs,
    budgets,
)
from hwnas.errors import HwnasError
from hwnas.terminal import print_facts, print_json, print_rows, reported

USER_ERROR, INTERRUPTED = 2, 130
"""Exit statuses."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Of a disk that is full or may not be written: not a bug, wherever they come up."""

app = typer.Typer(
    name="hwnas",
    help="Finds the most accurate image network that runs within a time budget on the device you name.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Start with: hwnas search --budget-ms 1",
)
cli_devices.add_verbs(app)
cli_training.add_verbs(app)
cli_trust.add_verbs(app)


@app.command(epilog="Example: hwnas search --budget-ms 1 --data photos/")
def search(
    budget_ms: Annotated[
        float | None, typer.Option("--budget-ms", help="What one run of the model may take on --device, in ms.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="DEVICE=MS, once for each device that the same model must run on."),
    ] = None,
    space: SearchedSpace = None,
    data: SearchedData = None,
    device: SearchedDevice = None,
    threads: Threads = None,
    batch: BatchImages = None,
    precision: Precision = "fp32",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Architectures that are scored.")] = 40,
    sampler: Annotated[str, typer.Option("--sampler", help="evolution (ours), tpe, nsgaii or random.")] = "evolution",
    storage: Annotated[str | None, typer.Option("--storage", help="An Optuna storage URL, such as a server's.")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train the winner from new weights.")] = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="Compare with ShuffleNet V2 0.5x and 1x.")] = False,
    guidelines: Annotated[
        str,
        typer.Option("--guidelines", help="What the device punishes is drawn less often (prior) or never (strict)."),
    ] = "off",
    memory_mb: Annotated[
        float | None, typer.Option("--memory-mb", help="What the model may add to a process's peak memory, in MB.")
    ] = None,
    size_mb: Annotated[
        float | None, typer.Option("--size-mb", help="What the model's file may take, in MB of 1,000,000 bytes.")
    ] = None,
    predictor: Annotated[
        int | None,
        typer.Option(
            "--predictor", help="So many trials are drawn evenly and train a predictor that chooses the rest."
        ),
    ] = None,
    supernet: SupernetFile = None,
    method: Method = DEFAULT_METHOD,
    paths: Paths = None,
    within_ms: WithinMs = None,
    epochs: Epochs = 10,
    retrain_epochs: RetrainEpochs = 5,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 0.05,
    force: Annotated[
        bool, typer.Option("--force", help="Take a table that failed its check or is no measured one.")
    ] = False,
    run: Annotated[Path | None, typer.Option("--run", help="The folder of this run.")] = None,
    runs: Runs = Path("runs"),
    processes: Processes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The main job: finds the most accurate network within a budget and proves it.

    Latency table and supernet are made first if they are missing. Run again, it goes on where it stopped. With
    --budget cpu=10 --budget gpu=1.5 the network keeps both, each as measured on its device.
    """
    from hwnas.devices import batch_of, threads_of
    from hwnas.following import gathered
    from hwnas.pipeline import Plan, find
    from hwnas.report import outcome
    from hwnas.stages import Budget, make_job
    from hwnas.supernet_file import file_facts, supernet_path

    with gathered(processes), reported(as_json) as listener:
        (device, first_ms), *others = budgets(budget_ms, device, budget or [])
        further = tuple(Budget(name, ms, threads_of(name, threads)) for name, ms in others)
        plan = Plan(
            first_ms, trials, sampler, storage, from_scratch, baselines, guidelines, memory_mb, size_mb, predictor,
            further,
        )  # fmt: skip
        if supernet:
            path = supernet_path(supernet)
            made_of, supernet = file_facts(path), str(path)
            space, data = space or made_of["space"], data or made_of["data"]
        settings = {"epochs": epochs, "retrain_epochs": retrain_epochs, "batch_size": batch_size}
        job = make_job(
            space or DEFAULT_SPACE, data or DEFAULT_DATA, listener=listener, device=device,
            threads=threads_of(device, threads), batch=batch_of(device, batch), precision=precision, seed=seed,
            runs=runs, supernet=supernet, method=method, paths=paths, within_ms=within_ms, learning_rate=learning_rate,
            force=force, **settings,
        )  # fmt: skip
        folder, result = find(job, plan, run)
    if as_json:
        from dataclasses import asdict

        print_json({"run": str(folder), **asdict(result)})
    else:
        print(outcome(result))
        if result.held_out:
            print(result.held_out.text)
        print(f"Model:  {folder / 'model.onnx'}\nReport: {folder / 'report.html'}")


@app.command(epilog="Example: hwnas profile --device cpu --space shufflenet-224")
def profile(
    space: Space = DEFAULT_SPACE,
    device: DeviceName = "cpu",
    threads: Threads = None,
    batch: BatchImages = None,
    precision: Precision = "fp32",
    classes: Annotated[int | None, typer.Option("--classes", min=2, help="Outputs of the classifier.")] = None,
    tables: Annotated[Path | None, typer.Option("--tables", help="The folder of latency tables.")] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", help="A latency table: tells whether it still holds, and measures no other."),
    ] = None,
    known: Annotated[
        Path | None,
        typer.Option("--from", help="A measured table of another device, from which this one's is estimated."),
    ] = None,
    networks: Annotated[
        int, typer.Option("--networks", help="So many whole networks are measured for an estimate with --from.")
    ] = 30,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measures the latency table of a device: every unit that a network of the space can have.

    With --check it measures new whole networks, under the table's own conditions, and tells whether the table still
    holds, as after an update of the system; if not, the exit status is 1. The table's upper bound learns from the check
    how much the machine drifts.

    With --from it measures only a few whole networks, which takes a minute or two, and estimates the table from that
    of another device. Such a table is marked as estimated, tells its error, and is searched with --force only.
    """
    from dataclasses import replace

    from hwnas import profiling
    from hwnas.devices import batch_of, threads_of
    from hwnas.estimation import estimate
    from hwnas.latency import load_table, table_path
    from hwnas.opening import open_device
    from hwnas.show import table_facts
    from hwnas.slow_tables import warned
    from hwnas.space_toml import load_space
    from hwnas.stages import tables_folder

    if check:
        _check_table(check, space, device, seed, as_json)
        return
    with reported(as_json) as listener, open_device(device, listener.note) as opened:
        loaded = load_space(space)
        loaded = replace(loaded, classes=classes or loaded.classes)
        folder = tables or tables_folder()
        how: dict[str, Any] = {
            "threads": threads_of(device, threads),
            "batch": batch_of(device, batch),
            "precision": precision,
            "folder": folder,
        }
        how |= {"on_progress": listener.progress, "seed": seed}
        if known:
            listener.stage(f"Measuring {networks} networks of {loaded.name} on {device}")
            table = estimate(load_table(known), loaded, opened, networks=networks, **how)
        else:
            listener.stage(f"Measuring the units of {loaded.name} on {device}")
            settings = (how["threads"], how["batch"], precision)
            how["on_progress"] = warned(listener.progress, listener.note, loaded, opened.conditions(*settings), folder)
            table = profiling.profile(loaded, opened, **how)
    print_facts({"file": str(table_path(folder, loaded.name, table.conditions)), **table_facts(table)}, as_json)


def _check_table(path: Path, space: str, device: str, seed: int, as_json: bool) -> None:
    from hwnas.journal import now
    from hwnas.latency import load_table
    from hwnas.opening import open_device
    from hwnas.show import check_facts
    from hwnas.space_toml import load_space
    from hwnas.whole_networks import check_table

    with reported(as_json) as listener, open_device(device, listener.note) as opened:
        table, loaded = load_table(path), load_space(space)
        if table.space != loaded.name:
            raise HwnasError(f"{path} is a table of the space '{table.space}', not of '{space}'. Add --space with it.")
        opened.anchor_ms = table.anchor_ms
        listener.stage(f"Measuring whole networks of {loaded.name} on {device}")
        found = check_table(table, loaded, opened, seed=seed + 1, on_progress=listener.progress)
    facts = {"table": str(path), "holds": found.failure is None, **check_facts(found, found.coverage)}
    kept = table.checked(found, now())
    print_facts(facts | {"upper_bound_percent_from_now_on": 100 * kept.calibration.upper_ratio}, as_json)
    kept.save(path)  # last: a file that is read-only must not hide what was found
    if found.failure:
        raise typer.Exit(1)


@app.command(epilog="Example: hwnas export runs/NAME --output model.onnx")
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run, of search or retrain.")],
    output: Annotated[Path, typer.Option("--output", help="The ONNX file to write.")] = Path("model.onnx"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Writes the ONNX model of a run and tells what was promised of it and what is measured now."""
    from dataclasses import asdict

    from hwnas.single import export_run

    with reported(as_json) as listener:
        proof = export_run(run, output, seed, listener)
    print_facts({"model": str(output), **asdict(proof)}, as_json)


@app.command(epilog="Example: hwnas show shufflenet-tiny")
def show(
    what: Annotated[str, typer.Argument(help="A run's folder, a space, a latency table, a model or a network's name.")],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Shows what is in a run, a search space, a latency table, an ONNX model or a network of the literature."""
    from hwnas.show import facts_of

    with reported(as_json):
        facts = facts_of(what)
    print_facts(facts, as_json)


@app.command(epilog="Example: hwnas breakdown mobilenet-v2-1.0 --device cpu --plot breakdown.svg")
def breakdown(
    model: Annotated[str, typer.Argument(help="An ONNX file, or the name of a network of the literature.")],
    device: DeviceName = "cpu",
    threads: Threads = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="An SVG file to draw the shares in.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measures where run time goes: convolution, data, element-wise, shuffle and other, beside the paper's shares."""
    from hwnas.breakdown import (
        break_down,
        breakdown_facts,
        breakdown_picture,
        breakdown_rows,
        element_wise_words,
        model_of,
    )
    from hwnas.devices import threads_of
    from hwnas.opening import open_device
    from hwnas.runs import write_text
    from hwnas.show import network_of_model

    if plot and plot.suffix != ".svg":
        raise HwnasError(
            f"A plot is an SVG file; {plot} is not named like one. Give --plot {plot.with_suffix('.svg')}."
        )
    with reported(as_json) as listener, open_device(device, listener.note) as opened:
        source, threads = model_of(model, seed), threads_of(device, threads)
        conditions = opened.conditions(threads=threads)
        listener.stage(f"Measuring {model} on {device}, node by node")
        found = break_down(source, opened, threads=threads, seed=seed, on_progress=listener.progress)
        facts = breakdown_facts(found)
    where = {"device": device, "chip": conditions.chip, "threads": threads}
    where["runtime"] = f"{conditions.runtime} {conditions.runtime_version}"
    if plot:
        write_text(plot, breakdown_picture(facts, Path(model).name))
    if as_json:
        print_json({"model": model, **where, **facts})
    else:
        print_facts(
            {"model": model, **where, "latency": f"{facts['total_ms']:.4g} ± {facts['spread_ms']:.2g} ms"}, False
        )
        print_rows(breakdown_rows(facts))
        print(element_wise_words(facts, network_of_model(model)))


@app.command(epilog="Example: hwnas guidelines --device cpu --plots guidelines/")
def guidelines(
    device: DeviceName = "cpu",
    space: Space = DEFAULT_SPACE,
    threads: Threads = None,
    batch: BatchImages = None,
    precision: Precision = "fp32",
    widths: Annotated[
        str | None,
        typer.Option("--widths", help="Channels of the networks: the paper's arm or gpu.", show_default="the device's"),
    ] = None,
    tables: Annotated[Path | None, typer.Option("--tables", help="The folder of latency tables.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="A folder for a plot of each experiment.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measures the paper's experiments on its guidelines G1 to G4, and keeps them in the space's latency table."""
    from dataclasses import replace

    from hwnas.conditions import profile_command
    from hwnas.devices import batch_of, threads_of
    from hwnas.experiments import EXPERIMENTS
    from hwnas.guideline_profiling import measure_guidelines
    from hwnas.guideline_report import guideline_facts, guideline_picture, guideline_rows
    from hwnas.latency import matching_table, table_path
    from hwnas.opening import open_device
    from hwnas.runs import write_text
    from hwnas.space_toml import load_space
    from hwnas.stages import tables_folder

    with reported(as_json) as listener, open_device(device, listener.note) as opened:
        threads, batch = threads_of(device, threads), batch_of(device, batch)
        conditions = opened.conditions(threads, batch, precision)
        widths = widths or ("gpu" if conditions.on_gpu else "arm")
        path = table_path(tables or tables_folder(), load_space(space).name, conditions)
        table = matching_table(path, conditions)
        kept = path.with_suffix(".guidelines")
        listener.stage(f"Measuring the paper's four experiments on {device} ({conditions.chip})")
        timings = measure_guidelines(
            opened, kept, threads=threads, batch=batch, precision=precision, widths=widths, seed=seed,
            on_progress=listener.progress,
        )  # fmt: skip
        if table:
            replace(table, guidelines=timings).save(path)
        else:
            command = profile_command(space, conditions)
            listener.note(f"Not stored: there is no latency table for these conditions. Measure one with: {command}")
        kept.unlink()
    where = {"device": device, "chip": conditions.chip, "runtime": f"{conditions.runtime} {conditions.runtime_version}"}
    where |= {"threads": threads, "batch": batch, "precision": precision, "origin": conditions.origin}
    pictures = {guideline: plots / f"{guideline}.svg" for guideline in EXPERIMENTS} if plots else {}
    for guideline, picture in pictures.items():
        write_text(picture, guideline_picture(guideline, timings))
    files = {"stored_in": str(path) if table else None, "plots": list(map(str, pictures.values()))}
    facts = guideline_facts(timings)
    if as_json:
        print_json({**where, **facts, **files})
        return
    for guideline, experiment in EXPERIMENTS.items():
        print(f"\n{guideline}: {experiment.title}, channels of the paper's {widths.upper()} x1, x2, x4")
        print_rows(guideline_rows(guideline, timings))
    print()
    print_facts(
        {**where, "verdicts": facts["verdicts"], **{name: value for name, value in files.items() if value}}, False
    )


# ---- the command as a process -------------------------------------------------------------------------------------


def main() -> None:
    """Runs the command line; a user's mistake is one message and exit status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA complains in the terminal when a compilation is slow
    _heed_interrupts()
    try:
        _run()
    except BaseException as end:
        if processes.joined():
            if not isinstance(end, SystemExit):
                traceback.print_exception(end)
            processes.end_at_once(end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 1)
        raise


def _run() -> None:
    try:
        app()
    except HwnasError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _fail(f"{error}. What was finished is kept: free some space or allow the access, and run it again.")
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer turns Ctrl-C into an exit without a word
            raise
    else:
        return
    gc.collect()  # closes what the stopped job had open
    _stop()


def _heed_interrupts() -> None:
    """Makes Ctrl-C a `KeyboardInterrupt` where one can be raised, and the end of the process where it cannot.

    In the middle of an import an exception would crash libraries that import from C++; in a callback, such as JAX's of
    the garbage collector, it would be shown and forgotten.
    """
    shown = sys.unraisablehook

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        while frame:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                _stop()
            frame = frame.f_back
        raise KeyboardInterrupt

    def on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _stop()
        shown(unraisable)

    signal.signal(signal.SIGINT, on_interrupt)
    sys.unraisablehook = on_unraisable


def _stop() -> NoReturn:
    """Ends at once: XLA may still compute, and would crash in an interpreter that takes itself apart."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
    print("Stopped. What was finished is kept; run the same command again to go on.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)
