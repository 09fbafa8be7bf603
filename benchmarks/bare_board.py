"""How many commands of the README lead from a bare arm64 Debian to the first entry of its latency table.

The Debian is made by debootstrap and has what a new board has: sudo, an sshd, no Python. All of it runs in emulation,
its own sshd too: the kernel gives ARM programs to QEMU, inside namespaces of this benchmark only. The commands are read
out of the README and typed as they stand there. What is not as on a board: Debian 12's QEMU cannot run every release of
onnxruntime, so that pip there is told which to take, and pip trusts the certificates of this machine.

It needs root, and `apt-get install debootstrap qemu-user-static openssh-client`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.arm64_userland import WHEELS, default_folder
from benchmarks.result import Result, this_machine

README = Path(__file__).parents[1] / "README.md"
MOST_COMMANDS = 3
PACKAGES = ("ca-certificates", "openssh-server", "sudo")
PATIENCE_S = 1200.0
"""For one command; an emulated one takes minutes."""

MAGIC = (
    r":hwnas-arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:FC"
)
"""ELF programs for aarch64, as the kernel's binfmt_misc takes it; from the qemu-user-static package of Debian."""

INSIDE = """
until grep -q . /proc/self/uid_map && grep -q . /proc/self/gid_map; do sleep 0.1; done
exec setpriv --reuid 0 --regid 0 --clear-groups sh -ec '
    mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
    printf %s "$1" > /proc/sys/fs/binfmt_misc/register
    root=$2
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    shift 2
    exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" "$@"
' sh "$@"
"""
"""Its words: `MAGIC`, the root of the user land, and the command."""

FINISH = """
useradd --create-home --shell /bin/bash pi
echo "pi ALL=(ALL) NOPASSWD: ALL" > /etc/sudoers.d/pi
mkdir -p /run/sshd
rm -rf /var/lib/apt/lists/*
"""
"""What an image for a board comes with, and what it does not: lists of packages."""


def emulated(root: Path, *command: str) -> "subprocess.Popen[bytes]":
    """Starts a command as the superuser of an ARM user land; when it ends, so does all that it started."""
    words = ("unshare", "--user", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", INSIDE, "sh")
    process = subprocess.Popen([*words, MAGIC, str(root), *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    outside = os.readlink("/proc/self/ns/user")
    while os.readlink(f"/proc/{process.pid}/ns/user") == outside:
        time.sleep(0.02)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{process.pid}/{name}").write_text("0 0 4294967295")
    return process


def end_emulated(process: "subprocess.Popen[bytes]") -> str:
    """Ends a command that was started so, and all that it started; returns what it said."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)  # the first process of the namespace takes all others along
    return process.communicate(timeout=60)[0].decode(errors="replace")


def make_bare(folder: Path) -> Path:
    """Makes the bare Debian in a folder, or finds it there; returns its root."""
    root = folder / "root"
    if (folder / "done").exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    include = f"--include={','.join(PACKAGES)}"
    first = ["debootstrap", "--foreign", "--arch=arm64", "--variant=minbase", include, "bookworm", str(root)]
    subprocess.run(first, check=True, timeout=PATIENCE_S, stdout=sys.stderr)
    for command in (("/debootstrap/debootstrap", "--second-stage"), ("sh", "-ec", FINISH)):
        process = emulated(root, *command)
        said, _ = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            raise RuntimeError(said.decode(errors="replace")[-2000:])
    (folder / "done").touch()
    return root


def written(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


@contextlib.contextmanager
def running_board(bare: Path, folder: Path) -> Iterator[dict[str, str]]:
    """A copy of a bare Debian in a folder, with its sshd; gives the environment in which a user types commands.

    In it `ssh` knows the host `board`, its key, and a key of the user's, and `hwnas` is this checkout's.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = folder / "root"
    subprocess.run(["cp", "-a", bare, root], check=True, timeout=PATIENCE_S)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    written(root / "etc/ssh/sshd_config.d/key.conf", "AuthorizedKeysFile /etc/ssh/key.pub\n")
    written(root / "etc/ssh/key.pub", (folder / "key.pub").read_text())
    written(root / "etc/hosts", f"127.0.0.1 localhost {socket.gethostname()}\n")
    written(root / "etc/resolv.conf", Path("/etc/resolv.conf").read_text())
    written(root / "etc/ssl/certs" / certificates.name, certificates.read_text())
    written(root / "etc/pip.conf", f"[global]\ncert = {certificates}\nconstraint = /etc/pip-emulated\n")
    written(root / "etc/pip-emulated", "\n".join(WHEELS) + "\n")
    host_key = (bare / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
    written(folder / "known", f"[127.0.0.1]:{port} {host_key}")
    written(
        folder / "client",
        f"Host board\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder / 'key'}\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {folder / 'known'}\n",
    )
    written(folder / "bin/ssh", f'#!/bin/sh\nexec /usr/bin/ssh -F {folder / "client"} "$@"\n', 0o755)
    written(folder / "bin/hwnas", f'#!/bin/sh\nexec {sys.executable} -m hwnas "$@"\n', 0o755)
    changed = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
        "HWNAS_CONFIG": str(folder / "hwnas.toml"),
        "HWNAS_CACHE": str(folder / "cache"),
    }
    sshd = emulated(root, "/usr/sbin/sshd", "-D", "-e", "-p", str(port), "-o", "ListenAddress=127.0.0.1")
    try:
        end = time.monotonic() + 60
        while not answers(port):
            if sshd.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the board's sshd does not start: {end_emulated(sshd)}")
            time.sleep(0.2)
        yield os.environ | changed
    finally:
        end_emulated(sshd)


def answers(port: int) -> bool:
    """Whether somebody listens on a port of the loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def commands_of_the_readme() -> list[str]:
    """The commands that lead to a board's table."""
    return README.read_text().partition("## On a board of yours")[2].split("```")[1].strip().splitlines()


def entries(folder: Path) -> Sequence[str]:
    """The entries that are measured so far, as they stand in the journal of the table."""
    return [
        line for path in folder.glob("cache/latency_tables/*/*.journal") for line in path.read_text().split("\n")[1:-1]
    ]


def typed(command: str, environment: dict[str, str], folder: Path) -> float:
    """Runs a command until it ends, or until there is an entry; returns the seconds.

    Raises:
        RuntimeError: it failed, or took too long; with what it said last.
    """
    began = time.monotonic()
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            command, shell=True, env=environment, cwd=folder, stdout=said, stderr=said, start_new_session=True
        )
        while (status := process.poll()) is None and not entries(folder) and time.monotonic() < began + PATIENCE_S:
            time.sleep(0.2)
        if status is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    words = (folder / "said").read_text(errors="replace")
    print(f"$ {command}\n{words}", file=sys.stderr)
    if status or (status is None and not entries(folder)):
        raise RuntimeError(f"{command} ended with status {status}: {words[-2000:]}")
    return time.monotonic() - began


def run(name: str) -> Result:
    bare, seconds = make_bare(default_folder().with_name("hwnas-bare-arm64")), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running_board(bare, folder) as environment:
            for command in commands_of_the_readme():
                seconds.append(typed(command, environment, folder))
                if found := entries(folder):
                    break
            else:
                raise RuntimeError("all commands of the README ended, and there is no entry")
    return Result(
        name=name,
        value=len(seconds),
        unit="commands of the README to the first entry of a table",
        target=f"at most {MOST_COMMANDS}",
        met=len(seconds) <= MOST_COMMANDS,
        spread="none: it is counted",
        device=f"arm64 Debian 12 with {', '.join(PACKAGES)}, its sshd included, in QEMU on {this_machine()}",
        details={
            "seconds of each command, in emulation": ", ".join(f"{value:.0f}" for value in seconds),
            "releases for the emulator": ", ".join(WHEELS),
            "first entry": found[0][:200],
        },
    )
