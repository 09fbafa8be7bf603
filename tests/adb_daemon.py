"""A phone's end of adb: the messages of `adbd` over TCP, with a shell and a place for files, on this machine.

It speaks the transport (CNXN, AUTH, OPEN, OKAY, WRTE, CLSE), `shell:` in both forms and `sync:`, and does with the
processes of a client that is gone what adbd does: it sends SIGHUP to their shell. `/data` and `/sys` are folders of its
own. The shell is mksh with toybox, as on Android, where they are installed.
"""

import os
import queue
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HEADER = struct.Struct("<6I")
VERSION, MOST_BYTES = 0x01000001, 1 << 18
TOKEN, SIGNATURE = 1, 2
STDIN, STDOUT, STDERR, EXIT = 0, 1, 2, 3
APPLETS = (
    "cat", "chmod", "date", "df", "grep", "mkdir", "mv", "rm", "rmdir", "sha256sum", "stat", "tail", "taskset", "touch",
    "uname",
)  # fmt: skip


def command(word: str) -> int:
    return int.from_bytes(word.encode(), "little")


def hears_hang_up() -> None:
    """As on a phone, also where the tests run under `nohup`: what a shell finds ignored it can never trap."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Stream:
    """One service that a client has opened."""

    def __init__(self, connection: "Connection", own: int, theirs: int) -> None:
        self.connection, self.own, self.theirs = connection, own, theirs
        self.inbox: queue.Queue[bytes | None] = queue.Queue()
        self.taken = threading.Semaphore(0)
        self.is_open = True
        self.child: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def write(self, data: bytes) -> None:
        while data and self.is_open:
            piece, data = data[:MOST_BYTES], data[MOST_BYTES:]
            self.connection.send("WRTE", self.own, self.theirs, piece)
            self.taken.acquire()

    def exactly(self, count: int) -> bytes:
        """So many bytes of the client; `EOFError` if it is gone."""
        while len(self._rest) < count:
            data = self.inbox.get()
            if data is None:
                raise EOFError
            self._rest += data
        found, self._rest = self._rest[:count], self._rest[count:]
        return found

    def end(self) -> None:
        """The client, or the service, is gone."""
        self.is_open = False
        self.inbox.put(None)
        self.taken.release()
        if self.child and self.child.poll() is None:
            with suppress(OSError):
                os.kill(self.child.pid, signal.SIGHUP)


class Connection:
    """One adb server that is connected."""

    def __init__(self, daemon: "Daemon", link: socket.socket) -> None:
        self.daemon, self.link = daemon, link
        self.streams: dict[int, Stream] = {}
        self._lock = threading.Lock()

    def send(self, word: str, first: int, second: int, data: bytes = b"") -> None:
        number = command(word)
        head = HEADER.pack(number, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self._lock, suppress(OSError):
            self.link.sendall(head + data)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.link.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def run(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                number, first, second, size, _, _ = HEADER.unpack(self.exactly(HEADER.size))
                data = self.exactly(size)
                if not self.daemon.deaf:
                    self.answer(number.to_bytes(4, "little").decode(), first, second, data)
        self.link.close()
        for stream in list(self.streams.values()):
            stream.end()

    def answer(self, word: str, first: int, second: int, data: bytes) -> None:
        if word in ("CNXN", "AUTH"):
            if word == "AUTH" and self.daemon.authorised:
                self.send("CNXN", VERSION, MOST_BYTES, b"device::ro.product.name=test;features=shell_v2,cmd")
            elif word == "CNXN" or first == SIGNATURE:
                self.send("AUTH", TOKEN, 0, bytes(20))
        elif word == "OPEN":
            stream = Stream(self, own=len(self.streams) + 1, theirs=first)
            self.streams[stream.own] = stream
            self.send("OKAY", stream.own, stream.theirs)
            service = data.rstrip(b"\0").decode()
            threading.Thread(target=self.serve, args=(stream, service), daemon=True).start()
        elif stream := self.streams.get(second):
            if word == "WRTE":
                stream.inbox.put(data)
                self.send("OKAY", stream.own, stream.theirs)
            elif word == "OKAY":
                stream.taken.release()
            elif word == "CLSE":
                stream.end()

    def serve(self, stream: Stream, service: str) -> None:
        kind, _, words = service.partition(":")
        with suppress(EOFError):
            if kind.partition(",")[0] == "shell":
                self.daemon.run_shell(stream, words, packets="v2" in kind)
            elif kind == "sync":
                self.daemon.take_files(stream)
        if stream.is_open:
            self.send("CLSE", stream.own, stream.theirs)
        stream.end()


class Daemon:
    """A phone.

    Args:
        root: holds its `/data`, `/sys` and programs.
        properties: what `getprop` tells.
        environment: of its shell, beyond the search path.

    Attributes:
        authorised: whether its owner lets this computer in; then any signature is taken, else none, as of a new key.
        deaf: it takes messages and answers none.
        disk_bytes: a file that is larger does not fit.
        spoil: what the shell prints instead of each command's own output.
        pushed: the files that came, in their order.
    """

    def __init__(self, root: Path, properties: Mapping[str, str], environment: Mapping[str, str]) -> None:
        self.root, self.authorised, self.deaf, self.disk_bytes = root, True, False, 1 << 30
        self.spoil: bytes | None = None
        self.pushed: list[str] = []
        self.port = 0
        self._links: list[socket.socket] = []
        programs = root / "bin"
        for folder in (programs, root / "data/local/tmp"):
            folder.mkdir(parents=True)
        self.properties = programs / "properties"
        self.properties.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        self.program("getprop", f'sed -n "s/^$1=//p" {self.properties}')
        if toybox := shutil.which("toybox"):
            for name in APPLETS:
                (programs / name).symlink_to(toybox)
        self.shell = shutil.which("mksh") or "/bin/sh"
        self.mark = secrets.token_hex(8)
        self.environment = {"PATH": f"{programs}:{os.environ['PATH']}", **environment, "TEST_PHONE": self.mark}
        self.plug()

    def program(self, name: str, script: str) -> None:
        """Puts a program onto the search path of its shell."""
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def here(self, text: str) -> str:
        """A path of the phone, or a command with some, as it is on this machine."""
        return text.replace("/data/", f"{self.root}/data/").replace("/sys/", f"{self.root}/sys/")

    def plug(self) -> None:
        """Begins to listen, always at the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=8)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, args=(self._listener,), daemon=True).start()

    def unplug(self) -> None:
        """Cuts all connections, and lets none in."""
        for link in (self._listener, *self._links):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self._links.clear()

    def _listen(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                link, _ = listener.accept()
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._links.append(link)
                threading.Thread(target=Connection(self, link).run, daemon=True).start()

    @property
    def running(self) -> list[int]:
        """The shells that have not ended, and what they started: known by a word in their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if self.mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    # ---- services ------------------------------------------------------------------------------------------------

    def run_shell(self, stream: Stream, words: str, packets: bool) -> None:
        child = subprocess.Popen(
            [self.shell, "-c", self.here(words)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=self.root, env=self.environment, start_new_session=True, preexec_fn=hears_hang_up,
        )  # fmt: skip
        stream.child = child
        if not stream.is_open:
            stream.end()
        assert child.stdout
        output = child.stdout.fileno()
        for data in iter(lambda: os.read(output, 1 << 16), b""):
            data = data if self.spoil is None else self.spoil
            stream.write(struct.pack("<BI", STDOUT, len(data)) + data if packets else data)
        status = child.wait()
        child.stdout.close()
        if packets:
            stream.write(struct.pack("<BIB", EXIT, 1, status & 0xFF))

    def take_files(self, stream: Stream) -> None:
        while True:
            word, size = struct.unpack("<4sI", stream.exactly(8))
            if word == b"QUIT":
                return
            name = stream.exactly(size).decode()
            if word == b"STAT":
                stream.write(b"STAT" + self.stat(Path(self.here(name))))
            elif word == b"SEND":
                path, _, mode = name.rpartition(",")
                failure = self.take(stream, Path(self.here(path)), int(mode))
                stream.write(struct.pack("<4sI", b"FAIL" if failure else b"OKAY", len(failure)) + failure)

    def stat(self, path: Path) -> bytes:
        try:
            found = path.stat()
        except OSError:
            return bytes(12)
        return struct.pack("<III", found.st_mode, found.st_size, int(found.st_mtime))

    def take(self, stream: Stream, path: Path, mode: int) -> bytes:
        """Takes the pieces of one file; what went wrong, in the words of adbd."""
        content, failure = b"", b""
        while True:
            word, size = struct.unpack("<4sI", stream.exactly(8))
            if word == b"DONE":
                break
            content += stream.exactly(size)
        if len(content) > self.disk_bytes:
            return b"write failed: No space left on device"
        try:
            path.write_bytes(content)
            path.chmod(stat.S_IMODE(mode))
            self.pushed.append(path.name)
        except OSError as error:
            failure = f"couldn't create file: {error.strerror}".encode()
        return failure
