"""A board that is this machine: a real sshd on the loopback, with keys of its own, for one user who may log in."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hwnas.registry import Entry


class NoServerError(Exception):
    """There is no sshd, or it does not start."""


@dataclass(frozen=True, slots=True)
class Board:
    """An sshd, and the folder that holds what it and its clients need.

    Attributes:
        folder: with `client`, the configuration of ssh in which the host is called `board`.
        port: where it listens on 127.0.0.1.
    """

    folder: Path
    port: int

    def entry(self, name: str = "board", **changes: object) -> Entry:
        """The registry's entry of this board, with a store of files of its own."""
        fields = {
            "target": "board",
            "ssh_options": ("-F", str(self.folder / "client")),
            "python": sys.executable,
            "folder": str(self.folder / "files"),
        }
        return Entry(name, **(fields | changes))  # pyright: ignore[reportArgumentType]

    def configure(
        self, name: str, *, known: str = "known", key: str = "key", port: int | None = None
    ) -> tuple[str, str]:
        """Options of ssh that take another list of known hosts, key or port."""
        (self.folder / name).write_text(
            f"Host board\n HostName 127.0.0.1\n Port {port or self.port}\n User {getpass.getuser()}\n"
            f" IdentityFile {self.folder / key}\n IdentitiesOnly yes\n UserKnownHostsFile {self.folder / known}\n"
        )
        return "-F", str(self.folder / name)


@contextlib.contextmanager
def running_sshd(folder: Path) -> Iterator[Board]:
    """An sshd with a new host key, for a new key of the user who runs this."""
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(program).exists():
        raise NoServerError("there is no sshd: apt-get install openssh-server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # of its privilege separation
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("host", "key", "talks", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    talks = 'command="echo Welcome to board; echo {}; eval \\"$SSH_ORIGINAL_COMMAND\\"" '
    allowed = (folder / "key.pub").read_text() + talks + (folder / "talks.pub").read_text()
    (folder / "allowed").write_text(allowed)
    (folder / "sshd").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'allowed'}\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\nMaxStartups 100\n"
        f"SetEnv HWNAS_CLAIMS=board-{port}\n"  # tests beside each other have a board each
    )
    for name, key in (("known", "host"), ("strange", "other")):
        (folder / name).write_text(f"[127.0.0.1]:{port} {(folder / f'{key}.pub').read_text()}")
    server = subprocess.Popen([program, "-D", "-f", folder / "sshd", "-E", folder / "log"], start_new_session=True)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            raise NoServerError(f"sshd does not start: {(folder / 'log').read_text()}")
        board = Board(folder, port)
        board.configure("client")
        yield board
    finally:
        server.terminate()
        server.wait()


def measuring_there(board: Board) -> list[int]:
    """The processes that run a program out of the board's store of files."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{board.folder}/files/" in path.read_text() and ".pyz" in path.read_text():
                found.append(int(path.parent.name))
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def listening_deaf() -> Iterator[int]:
    """The port of a socket that takes connections and never says a word."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        yield deaf.getsockname()[1]
