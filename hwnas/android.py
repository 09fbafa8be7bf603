"""What an Android phone shows of itself to its shell: a script, and what it printed as a `Look`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROPERTIES = (
    "ro.product.manufacturer", "ro.product.model", "ro.soc.manufacturer", "ro.soc.model", "ro.board.platform",
    "ro.product.cpu.abilist", "ro.build.version.release", "ro.kernel.qemu", "ro.boot.qemu",
)  # fmt: skip

LOOK = """
say() { v=; { read -r v < "$2"; } 2> /dev/null; echo "$1 $v"; }
for p in PROPERTIES; do echo "property $p $(getprop $p 2> /dev/null)"; done
echo "uname $(uname -s -r -m)"
say load /proc/loadavg
for c in /sys/devices/system/cpu/cpu[0-9]*; do
  [ -d $c ] || continue
  say "core ${c##*/cpu} most" $c/cpufreq/cpuinfo_max_freq
  say "core ${c##*/cpu} now" $c/cpufreq/scaling_max_freq
  say "core ${c##*/cpu} governor" $c/cpufreq/scaling_governor
done
for z in /sys/class/thermal/thermal_zone*; do
  [ -d $z ] || continue
  say "zone ${z##*zone} type" $z/type
  say "zone ${z##*zone} temp" $z/temp
  for t in $z/trip_point_*_type; do
    v=; { read -r v < $t; } 2> /dev/null
    if [ "$v" = passive ]; then say "zone ${z##*zone} limit" ${t%type}temp; fi
  done
done
dumpsys thermalservice 2> /dev/null | grep -e 'Thermal Status' -e 'Temperature{'
d=FOLDER; while [ ! -d $d ]; do d=${d%/*}; done
df -k ${d:-/} | tail -n 1
true
""".replace("PROPERTIES", " ".join(PROPERTIES))
"""For the shell of Android: its own `read`, since further processes would be hundreds on a phone of a hundred zones."""

PROCESSOR_ZONE = re.compile(r"cpu|soc|tsens|cluster|big|mid|little|apc", re.IGNORECASE)
"""Thermal zones of the processor; the others are of the battery, the radio and such."""

STATUS = ("no", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""What Android calls how much it slows the phone down for its heat."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of a phone at one moment; `None` where it does not show it.

    Attributes:
        properties: of the system, by name.
        uname: its kernel.
        load_average: how many others wanted to run at that moment: the average of Android counts sleepers, too.
        most_mhz, now_mhz: the highest frequency of each processor, and the highest that the system allows now; 0 where
            not shown.
        governor: of the fastest.
        celsius: the highest temperature of the processor.
        limit_celsius: where it slows down at the latest.
        throttled: one of `STATUS`.
        free_bytes: of the disk.
    """

    properties: Mapping[str, str]
    uname: str
    load_average: float
    most_mhz: Mapping[int, float]
    now_mhz: Mapping[int, float]
    governor: str
    celsius: float | None
    limit_celsius: float | None
    throttled: str | None
    free_bytes: int

    @property
    def fastest(self) -> list[int]:
        """The processors, the fastest first; of equals the last one, as systems do their chores on the first."""
        return sorted(self.most_mhz, key=lambda core: (self.most_mhz[core], core), reverse=True)

    @property
    def chip(self) -> str:
        """The maker's name of the chip, and that of its platform."""
        known = self.properties
        name = " ".join(filter(None, (known["ro.soc.manufacturer"], known["ro.soc.model"])))
        platform = known["ro.board.platform"]
        return f"{name} ({platform})" if name and platform else name or platform or known["ro.product.model"] or "phone"

    @property
    def system(self) -> str:
        return f"Android {self.properties['ro.build.version.release'] or '?'}, {self.uname}"

    @property
    def emulated(self) -> bool:
        """Whether it is the emulator of the Android SDK or the like."""
        return "1" in (self.properties["ro.kernel.qemu"], self.properties["ro.boot.qemu"])

    @property
    def kinds(self) -> list[dict[str, Any]]:
        """The processors of each kind, told apart by the highest frequency, the fastest first."""
        by_mhz: dict[float, list[int]] = {}
        for core in sorted(self.most_mhz):
            by_mhz.setdefault(self.most_mhz[core], []).append(core)
        return [{"megahertz": mhz or None, "cores": by_mhz[mhz]} for mhz in sorted(by_mhz, reverse=True)]


def look_of(text: str) -> Look:
    """What the script `LOOK` printed."""
    lines = [line.split(" ", 1) for line in text.splitlines() if " " in line]
    said = {kind: [rest for word, rest in lines if word == kind] for kind in ("property", "uname", "load")}
    properties = {name: value for name, _, value in (line.partition(" ") for line in said["property"])}
    cores = _table([rest for word, rest in lines if word == "core"])
    zones = _table([rest for word, rest in lines if word == "zone"])
    most_mhz = {core: _number(seen.get("most")) / 1000 for core, seen in cores.items()}
    fastest = max(most_mhz, key=lambda core: (most_mhz[core], core), default=0)
    throttled, celsius, limit = _heat(text, zones)
    return Look(
        properties={name: properties.get(name, "").strip() for name in PROPERTIES},
        uname=(said["uname"] or [""])[0],
        load_average=_running((said["load"] or [""])[0]),
        most_mhz=most_mhz or {0: 0.0},
        now_mhz={core: _number(seen.get("now")) / 1000 for core, seen in cores.items()},
        governor=cores.get(fastest, {}).get("governor") or "not shown",
        celsius=celsius,
        limit_celsius=limit,
        throttled=throttled,
        free_bytes=_free_bytes(text),
    )


def _table(lines: Sequence[str]) -> dict[int, dict[str, str]]:
    """`NUMBER FIELD VALUE` a line; of a field that comes twice the least value."""
    found: dict[int, dict[str, str]] = {}
    for line in lines:
        number, field, value = (*line.split(" ", 2), "")[:3]
        fields = found.setdefault(int(number), {})
        if value.strip() and (field not in fields or _number(value) < _number(fields[field])):
            fields[field] = value.strip()
    return found


def _running(load: str) -> float:
    """The fourth word of /proc/loadavg tells how many run, of how many; one of them is the shell that reads it."""
    words = load.split()
    return max(0.0, _number(words[3].partition("/")[0]) - 1.0) if len(words) > 3 else 0.0


def _number(text: str | None) -> int:
    return int(text) if text and text.strip().lstrip("-").isdigit() else 0


def _heat(text: str, zones: Mapping[int, Mapping[str, str]]) -> tuple[str | None, float | None, float | None]:
    """How much the phone slows down, the processor's temperature, and where it slows down, all `None` if not shown.

    The zones are of the kernel; Android tells of its own by `dumpsys`, for the processor with `mType=0`.
    """
    status = re.search(r"Thermal Status: (\d)", text)
    throttled = STATUS[min(int(status[1]), len(STATUS) - 1)] if status else None
    of_processor = [zone for zone in zones.values() if PROCESSOR_ZONE.search(zone.get("type", ""))]
    now = [_celsius(zone["temp"]) for zone in of_processor if "temp" in zone]
    now += [float(found) for found in re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=0,", text)]
    limits = [_celsius(zone["limit"]) for zone in of_processor if "limit" in zone]
    celsius = max((value for value in now if 0 < value < 150), default=None)
    limit = min((value for value in limits if 0 < value < 150), default=None)
    if celsius is not None and throttled not in (None, "no"):
        limit = min(celsius, limit or celsius)  # it slows down at this temperature already
    return throttled, celsius, limit


def _celsius(text: str) -> float:
    """Most zones show thousandths of a degree, some degrees."""
    value = _number(text)
    return value / 1000 if abs(value) >= 1000 else float(value)


def _free_bytes(text: str) -> int:
    """From the last line of `df -k`: the column before the percentage."""
    words = (text.strip().splitlines() or [""])[-1].split()
    at = next((index for index, word in enumerate(words) if word.endswith("%")), 0)
    return _number(words[at - 1]) << 10 if at else 0
