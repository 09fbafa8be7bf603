"""What a machine shows of itself: processors, frequencies, temperatures, load. Runs on a board, even without numpy.

    python machine_facts.py FOLDER PACKAGE ... < lines

answers each line of standard input with `facts` of the folder's disk and of the packages.
"""

import glob
import json
import os
import platform
import shutil
import sys
import threading
from contextlib import suppress


def allowed_cores():
    """The processors that this process may use, by number: those of `$HWNAS_CORES`, a JSON list, if it is set."""
    try:
        if chosen := os.environ.get("HWNAS_CORES"):
            os.sched_setaffinity(0, json.loads(chosen))
        return sorted(os.sched_getaffinity(0))
    except AttributeError:
        return list(range(os.cpu_count() or 1))


CORES = allowed_cores()
"""Asked once, before a measurement pins the process to some of them."""


def pin(threads):
    """Keeps this process on as many of its fastest processors as it has threads; of equals on the last ones."""
    fastest = sorted(CORES, key=lambda core: (int(core_fact(core, "cpuinfo_max_freq") or 0), core))
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, fastest[-threads:])


def emulated():
    """Whether this process runs in QEMU's user-mode emulation, where milliseconds mean nothing.

    QEMU shows a process what it emulates as its `exe`, but not as that of its thread.
    """
    try:
        return "qemu" in os.path.basename(os.readlink(f"/proc/self/task/{threading.get_native_id()}/exe"))
    except OSError:
        return False


def load_average():
    """How many processes wanted to run in the last minute, on average; 0 where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def core_fact(core, name):
    """What the system says of a processor's frequency; nothing where it does not."""
    return first_line(f"/sys/devices/system/cpu/cpu{core}/cpufreq/{name}")


def megahertz():
    """The present frequency of the fastest processor; None where it is not shown."""
    shown = [int(found) / 1000 for core in CORES if (found := core_fact(core, "scaling_cur_freq")).isdigit()]
    return max(shown, default=None)


def celsius():
    """The highest temperature of the machine, and the lowest at which it would slow down; None where not shown."""
    temperatures, limits = [], []
    for zone in sorted(glob.glob("/sys/class/thermal/thermal_zone*")):
        if (found := first_line(f"{zone}/temp")).lstrip("-").isdigit():
            temperatures.append(int(found) / 1000)
            for kind in glob.glob(f"{zone}/trip_point_*_type"):
                limit = first_line(kind.removesuffix("_type") + "_temp")
                if first_line(kind) == "passive" and limit.isdigit():
                    limits.append(int(limit) / 1000)
    return max(temperatures, default=None), min(limits, default=None)


def stolen_ticks():
    """Ticks of all processors since the start, and those that the host of a virtual machine gave to others."""
    counts = [int(count) for count in first_line("/proc/stat").split()[1:9]]
    return {"ticks": sum(counts), "stolen_ticks": counts[7]} if len(counts) == 8 else {}


def chip():
    """The processor's name; on ARM, which has none, implementer and part as in `ARM 0x41 0xd0b`."""
    if emulated():
        return f"{platform.machine()} in QEMU"
    facts = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    if "CPU implementer" in facts:
        return f"ARM {facts['CPU implementer']} {facts.get('CPU part', '')}".strip()
    return facts.get("model name") or platform.processor() or platform.machine()


def first_line(path):
    """The first line of a file, or nothing if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return ""


# ---- for the doctor ----------------------------------------------------------------------------------------------


def facts(folder, packages):
    """What this machine is and has, as far as it shows it."""
    now, limit = celsius()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "chip": chip(),
        "board": first_line("/proc/device-tree/model").strip("\0"),
        "emulated": emulated(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in packages},
        "free_bytes": shutil.disk_usage(nearest(folder)).free,
        "kinds": kinds(),
        "governor": core_fact(CORES[-1], "scaling_governor") or "not shown",
        "celsius": now,
        "slows_down_at_celsius": limit,
        "throttled": throttled(),
        "load_average": load_average(),
    }


def nearest(folder):
    """The folder, or that above it which is there already."""
    folder = os.path.abspath(os.path.expanduser(folder))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder


def version_of(package):
    """The installed version of a package, or nothing."""
    from importlib import metadata

    for name in (package, f"{package}-gpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def kinds():
    """The processors of each kind, told apart by the highest frequency, the fastest first."""
    by_kilohertz = {}
    for core in CORES:
        by_kilohertz.setdefault(int(core_fact(core, "cpuinfo_max_freq") or 0), []).append(core)
    return [{"megahertz": k / 1000 or None, "cores": by_kilohertz[k]} for k in sorted(by_kilohertz, reverse=True)]


def throttled():
    """Whether heat or a weak supply slowed the processors down since the start, in words; `None` where not shown."""
    if flags := first_line("/sys/devices/platform/soc/soc:firmware/get_throttled"):  # Raspberry Pi
        seen = [text for bit, text in RASPBERRY.items() if int(flags, 16) >> bit & 1]
        return f"since the start: {', '.join(seen)}" if seen else "no"
    counts = [first_line(path) for path in glob.glob("/sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")]
    if not counts:
        return None
    times = sum(int(count) for count in counts if count.isdigit())
    return f"since the start: {times} times" if times else "no"


RASPBERRY = {16: "under-voltage", 17: "frequency capped", 18: "throttled", 19: "soft temperature limit"}
"""Bits of what the firmware of a Raspberry Pi tells of the time since its start."""


def main():
    """Answers lines until standard input ends."""
    folder, *packages = sys.argv[1:]
    for _ in sys.stdin:
        print(json.dumps({"facts": facts(folder, packages)}), flush=True)


if __name__ == "__main__":
    main()
