"""The verbs about devices: which there are, a further one, and what is wrong with one."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from hwnas.cli_options import Json
from hwnas.errors import HwnasError
from hwnas.registry import CONFIG, FOLDER, LOCAL, Entry, files, registered, store
from hwnas.terminal import print_json

devices = typer.Typer(invoke_without_command=True)


@devices.callback(epilog="Example: hwnas devices")
def list_devices(context: typer.Context, as_json: Json = False) -> None:
    """Lists the devices that are registered, and what of this machine needs no registration; adds and checks them."""
    if context.invoked_subcommand:
        return
    from hwnas.runtimes import RUNTIMES

    known = registered()
    if as_json:
        here = {name: {"target": LOCAL, "runtime": name, "notes": text} for name, text in RUNTIMES.items()}
        print_json({name: {**asdict(entry), "file": str(path)} for name, (entry, path) in known.items()} | here)
        return
    rows = [
        (name, entry.target or ", ".join(entry.boards), "; ".join(filter(None, (entry.found, entry.notes))))
        for name, (entry, _) in known.items()
    ]
    rows += [(name, LOCAL, text) for name, text in RUNTIMES.items()]
    names, targets = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, target, what in rows:
        print(f"{name:<{names}}  {target:<{targets}}  {what}")
    if not known:
        print("\nNone is registered. Add a board: hwnas devices add arm USER@HOST")
        print("Or a phone: hwnas devices add phone adb:SERIAL --runner onnxruntime_perf_test")


@devices.command(epilog="Example: hwnas devices add arm pi@board --python hwnas/bin/python")
def add(
    name: Annotated[str, typer.Argument(help="What --device shall take.")],
    target: Annotated[
        str,
        typer.Argument(
            help="local, or USER@HOST as ssh takes it, with :PORT if need be, or adb:SERIAL.", show_default=False
        ),
    ] = "",
    python: Annotated[str, typer.Option("--python", help="The command that runs Python there.")] = "",
    runtime: Annotated[str, typer.Option("--runtime", help="What runs models there, such as cpu, openvino.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="What --threads shall be if it is not given.")] = 1,
    cores: Annotated[str, typer.Option("--cores", help="The processors to measure on, as 4,5,6,7; or all.")] = "",
    folder: Annotated[str, typer.Option("--folder", help="Where models are kept there.")] = FOLDER,
    runner: Annotated[
        Path | None, typer.Option("--runner", help="Of a phone: onnxruntime_perf_test, a file of this computer.")
    ] = None,
    library: Annotated[
        list[Path] | None,
        typer.Option("--library", help="Of a phone: a shared library that the runner needs; as often as need be."),
    ] = None,
    boards: Annotated[
        str, typer.Option("--boards", help="In the place of a target: devices of a kind that measure together.")
    ] = "",
    notes: Annotated[str, typer.Option("--notes", help="For you.")] = "",
    as_json: Json = False,
) -> None:
    """Tries a device, and registers it if models can be timed on it.

    With --boards pi1,pi2,pi3 it is a farm: boards that are registered, and of a kind, profile one table together.
    """
    from hwnas.runtimes import RUNTIMES

    if name in RUNTIMES:
        raise HwnasError(f"'{name}' is {RUNTIMES[name]}. Give the new device another name.")
    if not all(word.strip().isdigit() for word in filter(None, cores.split(","))):
        raise HwnasError(f"--cores are numbers of processors, as 4,5,6,7; they are '{cores}'.")
    numbers = tuple(int(word) for word in filter(None, cores.split(",")))
    names = tuple(word.strip() for word in filter(None, boards.split(",")))
    entry = Entry(
        name,
        target,
        python=python,
        folder=folder,
        runtime=runtime,
        threads=threads,
        cores=numbers,
        notes=notes,
        boards=names,
        runner=str(runner.absolute()) if runner else "",
        libraries=tuple(str(file.absolute()) for file in library or ()),
    )
    if _shown(entry, as_json, stored=files()[0]):
        raise HwnasError(f"'{name}' is not registered: nothing can be timed on it yet. Mend what is above, and add it.")


@devices.command(epilog="Example: hwnas devices check cpu")
def check(
    name: Annotated[str, typer.Argument(help="A device: one that is registered, or of this machine.")],
    as_json: Json = False,
) -> None:
    """Tells what is wrong with a device, and the command that mends it; the exit status is 1 if it cannot measure."""
    from hwnas.devices import entry_of

    if _shown(entry_of(name), as_json):
        raise typer.Exit(1)


def _shown(entry: Entry, as_json: bool, stored: Path | None = None) -> bool:
    """Examines a device and prints what was found; whether something is fatal. If not, the device is stored."""
    from hwnas.doctor import examine

    found = []
    for finding in examine(entry):
        found.append(finding)
        if not as_json:
            print(f"{'!' if finding.mend else ' '} {finding.what}: {finding.found}")
            if finding.mend:
                print(f"      {finding.mend}")
    fatal = any(finding.fatal for finding in found)
    if stored and not fatal:
        seen = {finding.what: finding.found for finding in found}
        store(replace(entry, found=f"{seen['system']}; {seen['runtime']}"), stored)
    if as_json:
        kept = {"stored_in": str(stored)} if stored and not fatal else {}
        print_json({"device": entry.name, "can_measure": not fatal, **kept, "findings": [asdict(f) for f in found]})
    elif stored and not fatal:
        print(f"Stored in {stored}. Measure a latency table: hwnas profile --device {entry.name}")
    return fatal


def _configure(
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The file of devices, in place of ./hwnas.toml and the user's."),
    ] = None,
) -> None:
    if config:
        os.environ[CONFIG] = str(config)


def add_verbs(app: typer.Typer) -> None:
    """Adds the verbs, and the option that names the file of devices, to the command line."""
    app.callback()(_configure)
    app.add_typer(devices, name="devices")
