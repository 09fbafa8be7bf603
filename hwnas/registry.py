"""The devices that a user has: a TOML file, with a table for each, written by hand or by `hwnas devices add`.

    [devices.arm]
    target = "pi@board"            # or pi@board:2222, as OpenSSH takes it: the user's own configuration, keys and jump
                                   # hosts count; "local" is this machine
    ssh_options = ["-J", "gate"]   # more words for ssh
    python = "hwnas/bin/python"    # the command that runs Python there
    folder = "~/.cache/hwnas"      # where files are kept there
    runtime = "openvino"           # what runs the models there; ONNX Runtime on the processor, cpu, if not given
    threads = 4                    # what --threads is if it is not given
    cores = [4, 5, 6, 7]           # processors to measure on; all if not given
    notes = "with a fan"
    found = "Raspberry Pi 5, ..."  # what hwnas devices add saw there

    [devices.lab]                  # a farm: boards of a kind that measure together; of the others it has threads, notes
    boards = ["arm", "arm2"]       # and found only

    [devices.phone]
    target = "adb:R58M123ABC"      # a phone's serial number or HOST:PORT; "adb" is the only one plugged in
    runner = "/home/me/onnxruntime_perf_test"       # what times models there: a file of this computer
    libraries = ["/home/me/libonnxruntime.so"]      # what it needs

`hwnas --config FILE` names the file; else it is `hwnas.toml` in the working folder, and for what that does not have,
`hwnas/hwnas.toml` in the user's folder of configurations.
"""

import json
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hwnas.errors import HwnasError

LOCAL, ADB = "local", "adb"
FOLDER = "~/.cache/hwnas"
"""Where files are kept on a board if nothing else is said."""
CONFIG, PROJECT_FILE = "HWNAS_CONFIG", "hwnas.toml"
"""The environment's variable for `--config`, and the file of a working folder."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ADDRESS = re.compile(r"(?!-)(?P<host>[^\s:\[\]]+|[^\s\[\]]*\[[^\s\]]+\])(:(?P<port>\d{1,5}))?")
_PHONE = re.compile(r"adb(:(?!-)[A-Za-z0-9._:\[\]-]+)?")
_TABLE_HEAD = re.compile(r"^[ \t]*\[(?P<name>[ \t]*devices[ \t]*\..+?)\]", re.M)


_FARM_FIELDS = ("name", "boards", "threads", "notes", "found")


@dataclass(frozen=True, slots=True)
class Entry:
    """One device of the registry.

    Attributes:
        name: what `--device` takes.
        target: `local`, or where ssh goes, with a port if need be, or `adb:` and a serial number, or `adb`.
        ssh_options: further words for ssh.
        python: a command line, as a shell reads it, that runs Python there; this Python's own if empty and local.
        folder: where models and the measuring program are kept there.
        runtime: one of `runtimes.RUNTIMES`.
        threads: of a run of a model, where none are asked for.
        cores: the processors to measure on; empty for all.
        notes: of the user.
        found: what was seen there when it was added.
        boards: the names of other devices that measure together as this one, which then has no target.
        runner: of a phone: the file on this computer that times models there; see `perf_test.py`.
        libraries: of a phone: shared libraries that the runner needs, files on this computer too.
    """

    name: str
    target: str = ""
    ssh_options: tuple[str, ...] = ()
    python: str = ""
    folder: str = FOLDER
    runtime: str = "cpu"
    threads: int = 1
    cores: tuple[int, ...] = ()
    notes: str = ""
    found: str = ""
    boards: tuple[str, ...] = ()
    runner: str = ""
    libraries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"The device '{self.name}'"
        if not _NAME.fullmatch(self.name):
            raise HwnasError(f"A device's name has letters, digits and . _ - only, such as 'arm'; it is '{self.name}'.")
        if self.boards:
            self._check_farm(where)
        else:
            self._check_target(where)
        if self.threads < 1 or any(core < 0 for core in self.cores):
            raise HwnasError(f"{where}: threads are at least 1 and processors are numbered from 0.")
        try:
            shlex.split(self.python)
        except ValueError as error:
            raise HwnasError(f"{where}: no shell can read its python, {self.python!r}: {error}.") from None

    def _check_target(self, where: str) -> None:
        if not (_PHONE.fullmatch(self.target) if self.is_phone else _ADDRESS.fullmatch(self.target)):
            raise HwnasError(
                f"{where}: a target is local or USER@HOST, with :PORT if need be, or adb:SERIAL; it is '{self.target}'."
            )
        if self.is_phone != bool(self.runner):
            raise HwnasError(
                f"{where}: a phone, and nothing else, has a runner, as in --runner onnxruntime_perf_test; "
                f"its target is '{self.target}', its runner '{self.runner}'."
            )

    def _check_farm(self, where: str) -> None:
        if len(set(self.boards)) < max(2, len(self.boards)):
            raise HwnasError(f"{where}: boards are the names of two or more other devices; they are {[*self.boards]}.")
        own = [f.name for f in fields(self) if f.name not in _FARM_FIELDS and getattr(self, f.name) != f.default]
        if own:
            raise HwnasError(
                f"{where} has boards: say {', '.join(own)} of each of those, as they are devices themselves."
            )

    @property
    def is_local(self) -> bool:
        return self.target == LOCAL

    @property
    def is_phone(self) -> bool:
        return self.target.partition(":")[0] == ADB

    @property
    def adb_words(self) -> tuple[str, ...]:
        """What a command that reaches the phone starts with."""
        serial = self.target.partition(":")[2]
        return (ADB, *(("-s", serial) if serial else ()))

    @property
    def ssh_words(self) -> tuple[str, ...]:
        """What follows `ssh` in a command that reaches the device."""
        found = _ADDRESS.fullmatch(self.target)
        assert found
        port = ("-p", found["port"]) if found["port"] else ()
        return (*port, *self.ssh_options, found["host"].replace("[", "").replace("]", ""))

    def to_toml(self) -> str:
        """The entry as a table of a TOML file; fields at their defaults are left out."""
        lines = [f"[devices.{_key(self.name)}]"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and value != field.default:
                lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"


def files() -> tuple[Path, ...]:
    """The files that devices are looked for in, the most specific first; the first is where new ones are written."""
    if chosen := os.environ.get(CONFIG):
        return (Path(chosen),)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hwnas" / "hwnas.toml"
    project = Path(PROJECT_FILE)
    return (project, home) if project.exists() else (home,)


def registered() -> dict[str, tuple[Entry, Path]]:
    """Every device that is registered, by name, and the file that says so.

    Raises:
        HwnasError: a file is not TOML, or holds what no device has.
    """
    found: dict[str, tuple[Entry, Path]] = {}
    for path in files():
        for name, entry in read(path).items():
            found.setdefault(name, (entry, path))
    return found


def read(path: Path) -> dict[str, Entry]:
    """The devices of one file; none if it is not there."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HwnasError(f"The devices in {path} cannot be read: {error}. Mend the file.") from None
    devices = data.pop("devices", {})
    if data or not isinstance(devices, Mapping):
        raise HwnasError(f"{path} has tables for devices, as in [devices.arm], and nothing else; mend '{[*data][:1]}'.")
    return {name: _entry(name, table, path) for name, table in devices.items()}


def store(entry: Entry, path: Path) -> None:
    """Writes a device into a file, in the place of one of the same name; all else there stays as it is."""
    read(path)  # a file that cannot be read is not written to
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = without(text, entry.name) + entry.to_toml()
    try:
        tomllib.loads(text)
    except ValueError as error:
        raise HwnasError(
            f"'{entry.name}' cannot be put into {path} as it is written ({error}). Add by hand:\n{entry.to_toml()}"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def without(text: str, name: str) -> str:
    """A file's text less the table of that name, ready for another one to follow."""
    heads = list(_TABLE_HEAD.finditer(text))
    for index, head in enumerate(heads):
        if [*tomllib.loads(f"[{head['name']}]").get("devices", {})] == [name]:
            end = heads[index + 1].start() if index + 1 < len(heads) else len(text)
            text = text[: head.start()] + text[end:]
            break
    text = text.rstrip()
    return f"{text}\n\n" if text else ""


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _entry(name: str, table: Any, path: Path) -> Entry:
    if not isinstance(table, Mapping):
        raise HwnasError(f'{path}: each device is a table, as in [devices.arm]; "{name}" is not one.')
    if "target" not in table and "boards" not in table:
        raise HwnasError(f"{path}: the device '{name}' does not say where it is, as in target = \"pi@board\".")
    defaults = asdict(Entry("name", LOCAL))
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in defaults or key == "name":
            raise HwnasError(f"{path}: the device '{name}' has '{key}'; it can have {', '.join([*defaults][1:])}.")
        kind = type(defaults[key])
        if kind is tuple:
            part = int if key == "cores" else str
            if not isinstance(value, list) or not all(type(item) is part for item in value):
                raise HwnasError(f"{path}: {key} of the device '{name}' is a list of {part.__name__}; it is {value!r}.")
            value = tuple(value)
        elif type(value) is not kind:
            raise HwnasError(f"{path}: {key} of the device '{name}' is a {kind.__name__}; it is {value!r}.")
        values[key] = value
    return Entry(name, **values)
