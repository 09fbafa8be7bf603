"""What a benchmark prints."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Result:
    """One figure with its target.

    Attributes:
        name: of the benchmark.
        value, unit: the figure.
        target: in words.
        met: whether the value meets it.
        spread: how far the figure scattered, in words with units.
        device: what it was measured on, and how busy that was.
        details: further figures.
    """

    name: str
    value: float
    unit: str
    target: str
    met: bool
    spread: str
    device: str
    details: dict[str, object]

    def text(self) -> str:
        """The result for a person."""
        lines = [
            f"{self.name}: {self.value:.4g} {self.unit} (target: {self.target}; {'met' if self.met else 'missed'})",
            f"  spread: {self.spread}",
            f"  device: {self.device}",
        ]
        return "\n".join([*lines, *(f"  {name}: {value}" for name, value in self.details.items())])


def this_machine() -> str:
    """Processor, cores, system and load of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    chip = names[0] if names else platform.processor() or platform.machine()
    load = f"{os.getloadavg()[0]:.1f}"
    return f"{chip}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, load average {load}"
