"""The near end of a board: sent down the line each time, never stored there, needs Python 3.10 and nothing else.

It keeps files by their SHA-256 sums, starts a program of them on the board's processors, hands it requests and passes
its answers on. When the line is cut, or silent for `silence_s`, it kills what it started and ends. Each message is a
line of JSON; an empty line only tells that the other side is alive:

    {"missing": {"NAME": bytes, ...}}     -> {"missing": ["NAME", ...]}: makes room for those that are not here
    {"hold": "NAME", "bytes": 12} + bytes -> {"held": "NAME"}: a name is the sum of the bytes, and a suffix
    {"start": "NAME", "words": [...], "python": [...], "cores": [2, 3], "silence_s": 60}  -> {"started": true}: in the
                                             place of another program; on all processors if `cores` is empty, and
                                             without a claim to any if it is null
    anything else                         -> as that program answers

    {"fault": "disk", "what": "..."}      instead of an answer; the faults are listed in `hwnas.ssh.MENDS`
"""

import contextlib
import errno
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time

CACHE_BYTES = 512 << 20
"""Files that were not asked for lately make room for new ones beyond this."""

CLAIM_S = 5.0
"""How long another may go on holding the processors: an agent whose line was cut takes a moment to end."""

READY = "hwnas agent ready"
"""What comes before it on the line is the talk of a login shell."""

CLAIMS = os.environ.get("HWNAS_CLAIMS", "hwnas")
"""What claims of processors begin with; those of another name are not seen, as of boards that are only in tests."""

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
)  # fmt: skip
"""Of a folder that is full or may not be written."""


class FaultError(Exception):
    """What keeps the board from answering: one of the known faults, and what was seen."""


def say(message):
    """A line to the other side."""
    write(json.dumps(message).encode() + b"\n")


def write(data):
    while data:
        data = data[os.write(1, data) :]


class Line:
    """Standard input, read without ever waiting longer than the silence that is allowed."""

    def __init__(self):
        self.waiting = b""

    def fill(self):
        """Takes in what has come; ends the agent if the line is cut."""
        data = os.read(0, 1 << 20)
        if not data:
            raise SystemExit
        heard()
        self.waiting += data

    def take(self):
        """The next whole line if there is one."""
        line, end, rest = self.waiting.partition(b"\n")
        if not end:
            return None
        self.waiting = rest
        return line

    def exactly(self, count):
        """Pieces of so many bytes together."""
        while count:
            if not self.waiting:
                self.fill()
            piece, self.waiting = self.waiting[:count], self.waiting[count:]
            count -= len(piece)
            yield piece


silence_s = 60.0


def heard():
    """The other side is alive: SIGALRM ends this process, even in a blocked write, if it is not heard again."""
    signal.setitimer(signal.ITIMER_REAL, silence_s)


# ---- files by their sums -----------------------------------------------------------------------------------------


class Store:
    """Files in a folder; the name of each is the SHA-256 sum of what is in it, and a suffix."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        if os.path.basename(name) != name or len(name.partition(".")[0]) != 64:
            raise ValueError(f"{name!r} is no name of a file here")
        return os.path.join(self.folder, name)

    def has(self, name):
        """Whether the file is here and whole; if so it was just asked for."""
        try:
            with open(self.path(name), "rb") as file:
                whole = hashlib.sha256(file.read()).hexdigest() == name.partition(".")[0]
            os.utime(self.path(name))
            return whole
        except OSError:
            return False

    def missing(self, sizes):
        """Those of the named files that are not here, after room was made for them."""
        names = [name for name in sizes if not self.has(name)]
        self.make_room(CACHE_BYTES - sum(sizes[name] for name in names), sizes)
        return names

    def make_room(self, most_bytes, keep):
        files = [(entry.stat(), entry) for entry in os.scandir(self.folder) if entry.is_file()]
        total = sum(stat.st_size for stat, _ in files)
        for stat, entry in sorted(files, key=lambda pair: pair[0].st_mtime):
            stale = entry.name.startswith("part-") and stat.st_mtime < time.time() - 86400
            if stale or (total > most_bytes and entry.name not in keep and not entry.name.startswith("part-")):
                os.unlink(entry.path)
                total -= stat.st_size

    def hold(self, name, pieces):
        """Keeps a file, all at once or not at all. All its pieces are read even if the disk is full."""
        found, failure, temporary = hashlib.sha256(), None, None
        try:
            handle, temporary = tempfile.mkstemp(prefix="part-", dir=self.folder)
            with open(handle, "wb") as file:
                for piece in pieces:
                    found.update(piece)
                    file.write(piece)
                file.flush()
            if found.hexdigest() != name.partition(".")[0]:
                raise FaultError("garbage", f"{name} came with another sum than its name")
            os.replace(temporary, self.path(name))
        except OSError as error:
            failure = error
        for _ in pieces:
            pass
        if failure:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)
            raise failure


# ---- the program that measures -----------------------------------------------------------------------------------


def lock(cores):
    """Claims processors until this process ends; two that measure on the same ones would disturb each other.

    An abstract socket (Linux) for each: it needs no file, no rights, and is gone with its process.
    """
    claims, end = [], time.monotonic() + CLAIM_S
    for core in cores:
        claim = socket.socket(socket.AF_UNIX)
        while not claimed(claim, core):
            if time.monotonic() > end:
                raise FaultError("busy", f"processor {core} is being measured on{holder(core)}")
            time.sleep(0.05)
        claims.append(claim)
    return claims


def claimed(claim, core):
    """Whether nobody else holds this processor; it is then claimed, where the system knows such sockets."""
    try:
        claim.bind(f"\0{CLAIMS}-core-{core}")
        claim.listen(1)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def holder(core):
    """Who claims a processor, as far as the system tells."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(f"\0{CLAIMS}-core-{core}")
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        number, user = (int.from_bytes(credentials[at : at + 4], sys.byteorder) for at in (0, 4))
        return f" by process {number} of user {user}"
    except OSError:
        return ""


def die_with_parent():
    """Linux ends the child if this process is killed; elsewhere it ends when it finds its input closed."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (ImportError, OSError, AttributeError):
        pass


class Program:
    """A file of the store that runs as a child, in a process group of its own."""

    def __init__(self, path, words, python, cores):
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        unknown = sorted(set(cores or []) - set(allowed))
        if unknown:
            raise FaultError("cores", f"processors {unknown} are not among {allowed}, which may be used")
        self.claims = lock([] if cores is None else cores or allowed)
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        environment = dict(os.environ, HWNAS_PYTHON=json.dumps(python))
        if cores:
            environment["HWNAS_CORES"] = json.dumps(cores)
        self.child = subprocess.Popen(
            [*python, path, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert self.child.stdin
        assert self.child.stdout
        self.stdin, self.output = self.child.stdin, self.child.stdout.fileno()

    def ask(self, line):
        try:
            self.stdin.write(line + b"\n")
            self.stdin.flush()
        except OSError:
            raise self.fault() from None

    def end(self):
        kill_group(self.child.pid)
        self.child.wait()
        for claim in self.claims:
            claim.close()

    def pass_on(self):
        """Hands on what the child has written."""
        data = os.read(self.output, 1 << 20)
        if not data:
            raise self.fault()
        write(data)

    def fault(self):
        """Why the child has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(timeout=1.0)  # its output ends a moment before it does
        status = self.child.poll()
        kill_group(self.child.pid)
        self.complaints.seek(0)
        lines = self.complaints.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"its status was {status}"
        imports = [line for line in lines if line.startswith(("ModuleNotFoundError", "ImportError"))]
        if imports:
            return FaultError("packages", imports[0])
        memory = [line for line in lines if "MemoryError" in line or "bad_alloc" in line or "allocate memory" in line]
        if memory or status == -signal.SIGKILL:
            return FaultError("memory", memory[0] if memory else "the measuring process was killed")
        return FaultError("died", last)


def kill_group(number):
    with contextlib.suppress(OSError):
        os.killpg(number, signal.SIGKILL)


# ---- the conversation --------------------------------------------------------------------------------------------


class Agent:
    """Answers messages until the line is cut."""

    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self.store, self.line, self.program = Store(folder), Line(), None

    def answer(self, line):
        global silence_s
        message = json.loads(line)
        if "missing" in message:
            say({"missing": self.store.missing(message["missing"])})
        elif "hold" in message:
            self.store.hold(message["hold"], self.line.exactly(message["bytes"]))
            say({"held": message["hold"]})
        elif "start" in message:
            silence_s = message["silence_s"]
            if self.program:
                self.program.end()
            path, python = self.store.path(message["start"]), message["python"] or [sys.executable]
            self.program = Program(path, message["words"], python, message["cores"])
            say({"started": True})
        elif self.program is None:
            raise ValueError("no program was started")
        else:
            self.program.ask(line)

    def run(self):
        say({READY: self.store.folder})
        while True:
            line = self.line.take()
            if line is None:
                self.wait()
            elif line.strip():
                self.answer(line)

    def wait(self):
        """Until there is something to read from either side, which is then read."""
        output = [self.program.output] if self.program else []
        ready, _, _ = select.select([0, *output], [], [])
        if 0 in ready:
            self.line.fill()
        elif ready:
            assert self.program
            self.program.pass_on()


def main(folder):
    """Runs the agent with its files in a folder, which it makes; ends when the line is cut or at the first fault."""
    agent = None

    def end(*_):
        if agent and agent.program:
            kill_group(agent.program.child.pid)
        os._exit(0)

    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    heard()
    try:
        agent = Agent(os.path.abspath(os.path.expanduser(folder)))
        agent.run()
    except FaultError as fault:
        say({"fault": fault.args[0], "what": fault.args[1]})
    except OSError as error:
        if error.errno == errno.EPIPE:
            end()
        say({"fault": "disk" if error.errno in DISK_ERRORS else "died", "what": str(error)})
    except MemoryError:
        say({"fault": "memory", "what": "Python has no memory left"})
    except (ValueError, KeyError, TypeError) as error:
        say({"fault": "garbage", "what": f"{type(error).__name__}: {error}"})
    except SystemExit:
        pass
    end()
