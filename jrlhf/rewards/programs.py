"""Answers that are Python programs, run against the tests of their row in a process that can reach nothing.

A model's program is foreign code. It runs only where a config allows it, on Linux alone, and behind these walls:

* namespaces of its own for network (no interface at all), processes, mounts, IPC and, without root, users;
* a file system of its own: an empty temporary one in memory, with the Python installation and the system's libraries
  to read. No home, no data, no /proc;
* no privileges and no way to new ones; as root, another user;
* limits of CPU time, wall time, memory, processes, file size and output; an empty environment;
* its first process is ours, out of the program's reach: it ends with the program, when the time is over, or with the
  worker, however that dies; and with it the kernel ends every other in the namespace.

`isolated()` says what of that the machine cannot do, and tries it: there is no running without. These walls are the
kernel's. They keep mistakes and mischief in; against an attacker who knows a hole in the kernel use a virtual machine.
"""

import ctypes
import functools
import os
import resource
import secrets
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

from jrlhf.config import UserError
from jrlhf.rewards.verifiers import WRONG, Check, _short, _wrong_field, last_fence

# What the process itself runs. First comes what it is to do, then what the program reads, untouched by any buffer.
_TAKE = """
import os, sys
def take(n):
    got = b""
    while len(got) < n:
        got += os.read(0, n - len(got))
    return got
given = eval(take(int(take(12))))
"""
# The word is said only if program and test end without an error: a program that calls sys.exit(0) does not pass.
_ASSERT = """
program, test, word = given
world = {"__name__": "__main__"}
exec(compile(program, "answer", "exec"), world)
exec(compile(test, "test", "exec"), world)
sys.__stdout__.write("\\n" + word)
"""
_SCRIPT = """
exec(compile(given, "answer", "exec"), {"__name__": "__main__"})
"""
_FIRST_USER, _USERS = 60_000, 5_000  # ids that nobody has: as root, each process is another of them
_NO_WALLS = 126  # the exit code where they cannot be built


class Ran(NamedTuple):
    """How a process ended."""

    code: int | None  # None: it was killed for want of time
    output: str
    cut: bool  # it wrote more than it may


@dataclass(frozen=True)
class Limits:
    """Of one process and all that it starts."""

    seconds: float = 4.0  # of wall time, and of CPU time
    memory: int = 512  # MiB of each process, and of its files together
    processes: int = 16
    output: int = 64  # KiB


@dataclass(frozen=True)
class Program(Check):
    """The answer's Python program passes the tests of its row: the last ``` block, or all of the answer.

    `tests` of a row: a list of Python texts such as "assert add(1, 2) == 3" (one text is one test), each run after the
    program, or of {"input": ..., "output": ...}, what the program reads and must write (compared without trailing
    whitespace). Each test runs in a process of its own with the standard library. Set `allow_execution` to agree to
    run code that a model wrote; it runs on Linux only, isolated as `jrlhf.rewards.programs` describes.
    """

    allow_execution: bool = False
    tests: str = "tests"  # the row's field
    score_by: Literal["all", "share"] = "all"  # 1 if every test passes, or the share that does
    limits: Limits = Limits()  # of one test

    def needs(self) -> tuple[str, ...]:
        return (self.tests,)

    def validate(self) -> None:
        if not self.allow_execution:
            raise _wrong_field(
                self,
                "allow_execution",
                "is false: this check runs code that a model wrote. Set it to agree to that.",
            )
        if min(self.limits.seconds, self.limits.memory, self.limits.processes, self.limits.output) <= 0:
            raise _wrong_field(self, "limits", f"must be positive, got {self.limits}")

    def prepare(self) -> None:
        self.validate()
        isolated()

    def score(self, prompt: str, completion: str, row: dict) -> float:
        tests = self._tests(row[self.tests])
        block = last_fence(completion)
        program = completion if block is None else block
        passed = 0
        for test in tests:
            if self._passes(program, test):
                passed += 1
            elif self.score_by == "all":
                return WRONG
        return passed / len(tests)

    def _tests(self, tests: Any) -> list[Any]:
        tests = [tests] if isinstance(tests, str) else tests
        if not tests or not isinstance(tests, list) or not all(map(_is_test, tests)):
            raise UserError(
                f"Program: the row's {self.tests!r} must be Python texts or {{'input': text, 'output': text}}, got "
                f"{_short(tests)}"
            )
        return tests

    def _passes(self, program: str, test: Any) -> bool:
        if isinstance(test, str):
            word = secrets.token_hex(16)
            ran = _unless_no_walls(run_isolated(_ASSERT, (program, test, word), "", self.limits))
            return ran.code == 0 and "\n" + word in ran.output
        ran = _unless_no_walls(run_isolated(_SCRIPT, program, test["input"], self.limits))
        return ran.code == 0 and not ran.cut and _lines(ran.output) == _lines(test["output"])


def _unless_no_walls(ran: Ran) -> Ran:
    """Where the machine has run out of something, the program is not wrong: it failed."""
    if ran.code == _NO_WALLS:
        raise OSError(f"a process could not be isolated: {ran.output}")
    return ran


def _is_test(test: Any) -> bool:
    if isinstance(test, dict):
        return isinstance(test.get("input"), str) and isinstance(test.get("output"), str)
    return isinstance(test, str) and bool(test.strip())  # an empty test would pass anything


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@functools.cache
def isolated() -> None:
    """UserError unless this machine can isolate a process, which is tried: it must run, and reach neither a port of
    this machine nor a file of this user."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"Program: programs are isolated by Linux namespaces, and this is {sys.platform}")
    with socket.socket() as server, tempfile.NamedTemporaryFile("w") as secret:
        server.bind(("127.0.0.1", 0))
        server.listen()
        secret.write("secret")
        secret.flush()
        ran = run_isolated(_PROBE, (server.getsockname()[1], secret.name), "", Limits(seconds=60.0))
    if ran.code != 0 or ran.output != "isolated":
        raise UserError(
            "Program: this machine cannot isolate a process, so that no program is run: "
            f"{ran.output.strip()[-300:] or f'exit code {ran.code}'}. It takes user namespaces, or root with "
            "CAP_SYS_ADMIN (in a container: --cap-add SYS_ADMIN, or a runtime that allows user namespaces)."
        )


_PROBE = """
import socket
port, secret = given
reached = []
try:
    socket.create_connection(("127.0.0.1", port), 1)
    reached.append("the network")
except OSError:
    pass
if os.path.exists(secret) or os.path.exists("/proc/1"):
    reached.append("files")
if (os.getppid(), os.getpid()) != (1, 2) or os.getuid() == 0:
    reached.append("privileges")
sys.stdout.write("it reached " + ", ".join(reached) if reached else "isolated")
"""


# --- the walls -------------------------------------------------------------------------------------------------

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (1 << n for n in (17, 26, 27, 28, 29, 30))
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 1 << 12, 1 << 14, 1 << 18
_DETACH, _PDEATHSIG, _NO_NEW_PRIVS = 2, 1, 38
# Where the program's file system is mounted, in a namespace that sees no other. Every Linux has this folder, and
# nothing that a program may read is below it; a folder of its own would be left behind by a worker that is killed.
_ROOT = "/proc"


def run_isolated(source: str, given: Any, stdin: str, limits: Limits) -> Ran:
    """Run Python source behind the walls, which finds in `given` plain values, and reads `stdin`.

    When the walls cannot be built the code is 126, and the output says why; a program's own 126 is given as 1.
    """
    word = secrets.token_hex(16)
    # The interpreter itself, not a virtual environment's link to it.
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    process = subprocess.Popen(
        [python, "-I", "-S", "-B", "-X", "utf8", "-c", _TAKE + source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if source is _PROBE else subprocess.DEVNULL,
        bufsize=0,
        env={"LD_LIBRARY_PATH": os.path.join(sys.base_prefix, "lib"), "HOME": "/", "LC_ALL": "C.UTF-8"},
        preexec_fn=functools.partial(_enter, _readable(python), limits, os.getpid(), word),
    )
    words = ascii(given).encode()
    ran = _attend(process, b"%012d" % len(words) + words + stdin.encode("utf-8", "surrogatepass"), limits)
    if ran.code != _NO_WALLS:
        return ran
    _, honest, why = ran.output.partition(word)
    return ran._replace(output=why) if honest else ran._replace(code=1)


def _readable(python: str) -> list[str]:
    """Folders that the interpreter needs: its own, and the system's libraries."""
    wanted = [
        sys.base_prefix,
        os.path.dirname(python),
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/lib",
        "/lib64",
    ]
    return sorted({os.path.realpath(p) for p in wanted if os.path.isdir(p)})


def _attend(process: subprocess.Popen, stdin: bytes, limits: Limits) -> Ran:
    """Write, read and watch the clock. What the process does not read is lost, as is what it writes too much."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    most = limits.output << 10
    output, late = b"", False
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector, process:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while process.stdout in {key.fileobj for key in selector.get_map().values()}:
                ready = selector.select(max(deadline - time.monotonic(), 0.0))
                late = time.monotonic() >= deadline
                if late or len(output) > most:
                    break
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        stdin = _write_some(process.stdin, stdin)
                        if not stdin:
                            selector.unregister(process.stdin)
                            process.stdin.close()
                    elif data := os.read(process.stdout.fileno(), 1 << 16):
                        output += data
                    else:
                        selector.unregister(process.stdout)
            if not late and len(output) <= most:
                process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            process.terminate()  # it kills the namespace's first process, and so all others
    cut = len(output) > most
    return Ran(None if late else process.returncode, output[:most].decode("utf-8", "replace"), cut)


def _write_some(pipe: Any, data: bytes) -> bytes:
    """What is left to write; nothing when the other side has closed."""
    try:
        return data[os.write(pipe.fileno(), data) :]
    except BrokenPipeError:
        return b""


def _enter(readable: Sequence[str], limits: Limits, worker: int, word: str) -> None:
    """Between fork and exec: build the walls, and go on inside them."""
    try:
        _build(readable, limits, worker)
    except BaseException as error:
        os.write(1, f"{word}{type(error).__name__}: {error}".encode())
        os._exit(_NO_WALLS)


def _build(readable: Sequence[str], limits: Limits, worker: int) -> None:
    """Three processes: this one waits outside for the worker's word, the namespace's first one inside for the program's
    end, and the third returns, to become the program. Each of the two is killed by the kernel when its parent dies; the
    program, which might undo that, dies with the first one."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")

    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        given = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
        call("mount", *given)

    root, uid, gid = os.getuid() == 0, os.getuid(), os.getgid()
    another = _FIRST_USER + os.getpid() % _USERS
    spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    call("unshare", spaces if root else spaces | _NEWUSER)
    if not root:
        _map_user(uid, gid)
    call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of privileges would undo it
    if os.getppid() != worker:  # it died before that
        os._exit(_NO_WALLS)
    alive, held = os.pipe()
    if (first := os.fork()) != 0:  # the new namespace of processes begins with a child
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        os.dup2(held, 0)
        os.closerange(1, 1024)
        _end_with(first)

    # From inside, the first process gets only signals that it handles.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()  # so that a signal to the program's group is none to the worker
    call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.close(held)
    if select.select([alive], [], [], 0)[0]:  # the end of the pipe: its parent is dead
        os._exit(_NO_WALLS)
    os.close(alive)

    mount("none", "/", "", _REC | _PRIVATE)
    mount("tmpfs", _ROOT, "tmpfs", _NOSUID | _NODEV, f"size={limits.memory}m,nr_inodes=4096,mode=755")
    for path in readable:
        inside = _ROOT + path
        if os.path.isdir(inside):
            continue  # inside a folder that is there already
        os.makedirs(inside, 0o755)
        mount(path, inside, "", _BIND)
        kept = os.statvfs(path).f_flag & 8  # noexec, which a namespace may not take away
        mount("none", inside, "", _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | kept)
    for link in ("/lib", "/lib64", "/usr/lib64"):
        if os.path.islink(link) and not os.path.lexists(_ROOT + link):
            os.makedirs(os.path.dirname(_ROOT + link), 0o755, exist_ok=True)
            os.symlink(os.readlink(link), _ROOT + link)
    os.makedirs(f"{_ROOT}/tmp", exist_ok=True)
    os.chmod(f"{_ROOT}/tmp", 0o777)
    os.chdir(_ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", _DETACH)
    os.chdir("/tmp")

    if (program := os.fork()) != 0:
        os.closerange(0, 1024)
        _end_with(program)
    if root:  # the kernel counts processes by user: those of two programs at once are not to be added up
        os.setgroups([])
        os.setresgid(another, another, another)
        os.setresuid(another, another, another)
    call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    memory, files = limits.memory << 20, limits.memory << 20
    cpu = int(limits.seconds) + 1
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _end_with(child: int) -> NoReturn:
    """Wait for it, and end as it did. Its orphans fall to the first process, which takes their leave, too."""
    while (ended := os.wait())[0] != child:
        pass
    code = os.waitstatus_to_exitcode(ended[1])
    os._exit(code if code >= 0 else 128 - code)


def _map_user(uid: int, gid: int) -> None:
    """The same user inside; after exec without any capability."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
