"""What keeps a device from being measured on, or measured well, and the command that mends each of these things."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hwnas.calibration import Measurement
from hwnas.devices import Device, anchor_model, boards_of, facts_of, line_to
from hwnas.errors import DeviceError, HwnasError, UnfitDeviceError
from hwnas.farm import Farm
from hwnas.registry import Entry
from hwnas.runtimes import packages_of

GOVERNORS = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"

LEAST_FREE_BYTES = 1 << 30
"""Models and the measuring program are kept up to half of it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it is.
        found: in words.
        mend: what to do about it, a command where there is one; empty if all is well.
        fatal: nothing can be measured until it is mended.
    """

    what: str
    found: str
    mend: str = ""
    fatal: bool = False


def examine(entry: Entry) -> Iterator[Finding]:
    """Looks at a device, thing by thing, and at last times the anchor network there; ends at what is fatal.

    Of a farm it looks at each board so, and then at what they are to each other.
    """
    if entry.boards:
        yield from examine_farm(entry)
        return
    try:
        facts = facts_of(entry)
    except DeviceError as error:
        yield unreached(entry, error)
        return
    yield Finding("reached", reached(entry))
    yield from findings(entry, facts)
    if not all(facts["packages"].values()):
        return
    with Device(entry.name, line_to(entry)) as device:
        try:
            conditions = device.conditions()
            found = device.measure_steadily([anchor_model()])[0]
        except DeviceError as error:
            yield failed("measuring", error)
            return
    yield Finding("runtime", f"{conditions.runtime} {conditions.runtime_version}")
    yield timed(found)


def examine_farm(entry: Entry) -> Iterator[Finding]:
    """Looks at each board of a farm; one of them that cannot measure is not fatal while others can."""
    boards = boards_of(entry)
    for board in boards:
        for finding in examine(board):
            yield replace(finding, what=f"{board.name}: {finding.what}", fatal=False)
    with Farm(entry.name, [Device(board.name, line_to(board)) for board in boards]) as farm:
        try:
            conditions = farm.conditions(entry.threads)
            relations = farm.relate(entry.threads)
        except HwnasError as error:
            yield Finding("boards together", "no", str(error), fatal=True)
            return
    for relation in relations:
        mend = f"Mend it, or take it out of boards: hwnas devices check {relation.board}" if relation.left_out else ""
        yield Finding(f"{relation.board}: relation", relation.text, mend)
    left = sum(not relation.left_out for relation in relations)
    yield Finding("system", f"{left} of {len(boards)} boards, {conditions.chip}, {conditions.system}")
    yield Finding("runtime", f"{conditions.runtime} {conditions.runtime_version}")


def reached(entry: Entry) -> str:
    """How a device was reached, in words."""
    if entry.is_phone:
        return f"by adb, {entry.target.partition(':')[2] or 'the only phone'}"
    return "on this machine" if entry.is_local else f"by ssh at {entry.target}"


def unreached(entry: Entry, error: DeviceError) -> Finding:
    """A device of which nothing was seen."""
    if isinstance(error, UnfitDeviceError) or entry.is_local:
        return failed("reached", error)
    if entry.is_phone:
        try_it = (
            "See that it is on and plugged in, with USB debugging on in its developer options, and try: adb devices"
        )
    else:
        try_it = f"See that it is on and in the network, and try: {shlex.join(['ssh', *entry.ssh_words])}"
    return Finding("reached", f"no: {error}", try_it, fatal=True)


def failed(what: str, error: DeviceError) -> Finding:
    """A fault that ended the examination."""
    if isinstance(error, UnfitDeviceError):
        return Finding(what, f"no: {error.found}", error.mend, fatal=True)
    return Finding(what, "no", str(error), fatal=True)


def timed(found: Measurement) -> Finding:
    """What the anchor network took."""
    text = f"{found.median_ms:.4g} ± {found.spread_ms:.2g} ms"
    if found.pace == 1:
        return Finding("anchor network", text)
    return Finding("anchor network", f"{text}, disturbed", "Close what else runs there, and check again.")


def findings(entry: Entry, facts: dict[str, Any]) -> Iterator[Finding]:
    """What the facts of a machine mean for measuring on it."""
    yield Finding("system", ", ".join(filter(None, (facts["board"] or facts["chip"], facts["system"]))))
    if facts["emulated"]:
        yield Finding("emulated", "yes", "Its milliseconds mean nothing: take a real board for tables to search with.")
    if entry.is_phone:
        yield Finding("ABI", facts["abis"])
    else:
        yield Finding("Python", facts["python"])
    for package, version in facts["packages"].items():
        yield Finding(package, version) if version else Finding(package, "missing", install(entry), fatal=True)
    yield Finding("free disk", f"{facts['free_bytes'] / 1e9:.3g} GB", "" if enough(facts) else more_disk(entry))
    yield Finding("processors", processors(facts["kinds"]), fewer_kinds(entry, facts["kinds"]))
    yield Finding("governor", facts["governor"], governor(entry, facts["governor"]))
    yield Finding("temperature", temperature(facts), cooler(facts))
    yield throttling(facts["throttled"])
    yield Finding("load", f"{facts['load_average']:.2g}", idler(entry, facts["load_average"]))


def remote(entry: Entry, command: str) -> str:
    """A command as the user types it here."""
    if entry.is_phone:
        return shlex.join([*entry.adb_words, "shell", command])
    return command if entry.is_local else shlex.join(["ssh", *entry.ssh_words, command])


def install(entry: Entry) -> str:
    """The command that installs what the runtime needs."""
    python = shlex.split(entry.python or "python3")[-1]
    return remote(entry, f"{python} -m pip install {' '.join(packages_of(entry.runtime))}")


def enough(facts: dict[str, Any]) -> bool:
    return facts["free_bytes"] >= LEAST_FREE_BYTES


def more_disk(entry: Entry) -> str:
    if entry.is_phone:
        return remote(entry, "du -k /data/local/tmp | sort -n | tail")
    return f'{remote(entry, "du -xh ~ | sort -h | tail")}   (or in the registry: folder = "/media/large/hwnas")'


def processors(kinds: list[dict[str, Any]]) -> str:
    """The processors of each kind in words."""
    return "; ".join(
        f"{len(kind['cores'])} of {kind['megahertz']:.0f} MHz ({numbers(kind['cores'])})"
        if kind["megahertz"]
        else f"{len(kind['cores'])} ({numbers(kind['cores'])})"
        for kind in kinds
    )


def numbers(cores: list[int]) -> str:
    return ", ".join(map(str, cores))


def fewer_kinds(entry: Entry, kinds: list[dict[str, Any]]) -> str:
    """Threads on processors of several kinds wait for the slowest."""
    if len(kinds) < 2 or entry.cores:
        return ""
    return f"Name those to measure on in the registry, the fastest being: cores = {kinds[0]['cores']}"


def governor(entry: Entry, found: str) -> str:
    if found in ("performance", "not shown"):
        return ""
    if entry.is_phone:
        return "With root only: " + remote(entry, f"su -c 'echo performance | tee {GOVERNORS}'")
    return remote(entry, f"echo performance | sudo tee {GOVERNORS}")


def temperature(facts: dict[str, Any]) -> str:
    if facts["celsius"] is None:
        return "not shown"
    limit = facts["slows_down_at_celsius"]
    return f"{facts['celsius']:.0f} °C" + (f", slows down at {limit:.0f} °C" if limit else "")


def cooler(facts: dict[str, Any]) -> str:
    now, limit = facts["celsius"], facts["slows_down_at_celsius"]
    return "Cool it: a heat sink, a fan." if now is not None and limit and now > limit - 10 else ""


def throttling(found: str | None) -> Finding:
    if found in (None, "no"):
        return Finding("throttling", found or "not shown")
    mend = "Give it a stronger supply." if "under-voltage" in str(found) else "Cool it, or lower its highest frequency."
    return Finding("throttling", str(found), mend)


def idler(entry: Entry, load_average: float) -> str:
    command = "top -b -n 1 -m 10" if entry.is_phone else "ps aux --sort=-%cpu | head"
    return f"{remote(entry, command)}   (something else runs there)" if load_average > 1 else ""
