"""Programs of a model: what passes, and what they cannot do."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jrlhf.config import UserError
from jrlhf.rewards import programs
from jrlhf.rewards.pool import CheckPool
from jrlhf.rewards.programs import Limits, Program, run_isolated

# Whether the machine allows it is asked of another program: were it the product that cannot, that is no reason to skip.
ASKED = ["unshare", "--mount", "--net", "--pid", "--fork", *(["--user"] if os.getuid() else []), "true"]
if not shutil.which("unshare") or subprocess.run(ASKED, capture_output=True, check=False).returncode:
    pytest.skip("this machine allows no namespaces", allow_module_level=True)

# The product forks in workers alone, which have no JAX. Here another test may have begun a backend, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

LIMITS = Limits(seconds=10.0, memory=256, processes=8, output=16)
RUN = Program(allow_execution=True, limits=LIMITS)
ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add('a', 'b') == 'ab'"]


def score(program: str, tests, check: Program = RUN) -> float:
    return check.score("", program, {"tests": tests})


def said(source: str, stdin: str = "", limits: Limits = LIMITS) -> str:
    """What a program prints; it must end well."""
    ran = run_isolated("exec(given)", source, stdin, limits)
    assert ran.code == 0, ran
    return ran.output


# --- right and wrong ----------------------------------------------------------------------------------------


def test_asserts():
    assert score(ADD, TESTS) == 1.0
    assert score(f"Here it is:\n```python\n{ADD}```\nEasy!", TESTS) == 1.0
    assert score(ADD.replace("+", "-"), TESTS) == 0.0
    assert score("", TESTS) == 0.0
    assert score("def add(", TESTS) == 0.0
    assert score("add = \ud800\0", TESTS) == 0.0
    assert score(ADD, "assert add(1, 2) == 3") == 1.0


def test_a_share_of_the_tests():
    share = Program(allow_execution=True, score_by="share", limits=LIMITS)
    wrong = "def add(a, b):\n    return 3\n"
    assert score(wrong, TESTS, share) == pytest.approx(1 / 3)
    assert score(wrong, TESTS) == 0.0
    assert score(ADD, TESTS, share) == 1.0


def test_input_and_output():
    double = "print(2 * int(input()))"
    assert score(double, [{"input": "4\n", "output": "8\n"}]) == 1.0
    assert score(double, [{"input": "4", "output": "8"}, {"input": "5", "output": "10  \n\n"}]) == 1.0
    assert score(double, [{"input": "4", "output": "9"}]) == 0.0
    assert score("print(8); raise SystemExit(1)", [{"input": "", "output": "8"}]) == 0.0
    raw = "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))"
    assert score(raw, [{"input": "1 2\n3\n", "output": "6"}]) == 1.0
    most = "x" * (LIMITS.output << 10)
    assert score(f"print('x' * {2 * len(most)})", [{"input": "", "output": most}]) == 0.0  # it wrote too much
    big = "x" * 1_000_000
    assert score("print(len(input()))", [{"input": big, "output": "1000000"}]) == 1.0
    assert score("print(1)", [{"input": big, "output": "1"}]) == 1.0  # what is not read is no fault


@pytest.mark.parametrize(
    "cheat",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os; os._exit(126)",  # as where there are no walls
        "import os; os.kill(os.getpid(), 9)",
        "print('passed', '0' * 32)",
        "class Any:\n    pass",
        "import builtins; builtins.AssertionError = int",
        "import signal; signal.raise_signal(signal.SIGTERM)",
    ],
)
def test_ending_early_is_not_passing(cheat):
    assert score(cheat, ["assert add(1, 2) == 3"]) == 0.0


def test_rows_without_usable_tests():
    for tests in ([], "", [1], [{"input": "1"}], {"input": "1", "output": "2"}):
        with pytest.raises(UserError, match="must be Python texts or"):
            score(ADD, tests)
    with pytest.raises(UserError, match="needs the field 'cases'"):
        Program(allow_execution=True, tests="cases").reads({"tests": TESTS})


REACH = """
import socket
try:
    socket.create_connection(("127.0.0.1", PORT), 2)
    print("in")
except OSError as e:
    print("out")
"""

WRITE = """
import sys
for folder in ("/", sys.base_prefix, "/usr/lib"):
    try:
        open(folder + "/x", "w")
        print("wrote", folder)
    except OSError:
        pass
"""

INHERITED = """
import os
found = []
for n in range(3, 64):
    try:
        os.fstat(n)
        found.append(n)
    except OSError:
        pass
print(found)
"""

FORKS = """
import os, time
n = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(600)
        n += 1
except OSError:
    print(n)
"""

ORPHAN = """
import os, sys
if os.fork() == 0:
    os.setsid()
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", "jrlhf-test-" + "orphan"])
print("done")
"""


# --- the walls ----------------------------------------------------------------------------------------------


def test_there_is_no_network():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert said(REACH.replace("PORT", str(port))) == "out\n"
    assert said("import socket; print(socket.if_nameindex())") in ("[(1, 'lo')]\n", "[]\n")


def test_there_are_no_files_but_its_own(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    assert (
        said(f"import os; print(os.path.exists({str(secret)!r}), os.path.exists('/proc/self'))")
        == "False False\n"
    )
    assert (
        said("import os; print(os.listdir('.'), os.listdir('/home') if os.path.exists('/home') else [])")
        == "[] []\n"
    )
    assert said("open('a', 'w').write('kept'); print(open('a').read())") == "kept\n"
    assert said("import os; print(os.listdir('.'))") == "[]\n"  # nothing is left of the last one
    assert said(WRITE) == ""


def test_what_it_may_read_it_may_not_write(tmp_path, monkeypatch):
    """Not even where the files would let it, as the user's own Python installation would."""
    folder = tmp_path / "library"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "module").write_text("text")
    (folder / "module").chmod(0o666)
    readable = programs._readable
    monkeypatch.setattr(programs, "_readable", lambda python: [*readable(python), str(folder)])
    assert said(f"print(open({str(folder / 'module')!r}).read())") == "text\n"
    for name in ("module", "new"):
        assert run_isolated("exec(given)", f"open({str(folder / name)!r}, 'w')", "", LIMITS).code == 1
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("module", "text")]


def test_there_is_no_environment_and_nobody_to_be(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    shown = said(
        "import os; print(os.getuid() != 0, os.getpid(), 'SECRET_TOKEN' in os.environ, len(os.environ) < 6)"
    )
    assert shown == "True 2 False True\n"
    regain = "import os\ntry:\n    os.setuid(0); print('root')\nexcept OSError: print('no')"
    assert said(regain) == "no\n"
    assert said(INHERITED) == "[]\n"


def test_limits_hold():
    began = time.monotonic()
    ran = run_isolated("exec(given)", "while True: pass", "", Limits(seconds=1.0))
    assert ran.code is None
    ran = run_isolated("exec(given)", "import time; time.sleep(60)", "", Limits(seconds=1.0))
    assert ran.code is None
    assert time.monotonic() - began < 20
    ran = run_isolated("exec(given)", "x = 'a' * 10**9", "", LIMITS)
    assert ran.code not in (0, None)
    ran = run_isolated("exec(given)", "while True: print('x' * 1000)", "", LIMITS)
    assert ran.cut
    assert len(ran.output) == LIMITS.output << 10
    ran = run_isolated(
        "exec(given)", "open('a', 'wb').write(b'a' * 2**29)", "", Limits(seconds=10, memory=2048)
    )
    assert ran.code == 0
    ran = run_isolated(
        "exec(given)", "open('a', 'wb').write(b'a' * 2**27)", "", Limits(seconds=10, memory=100)
    )
    assert ran.code not in (0, None)


def test_processes_are_few_and_end_with_the_first():
    assert 0 < int(said(FORKS)) < LIMITS.processes
    assert said(ORPHAN) == "done\n"
    assert not running("jrlhf-test-orphan")


def _is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:  # it ended while we looked
        return False
    return True


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    said("open('a', 'w').write('a')")
    run_isolated("exec(given)", "while True: pass", "", Limits(seconds=0.5))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# --- only where it is allowed, and only behind walls --------------------------------------------------------


def test_it_is_off_by_default():
    with pytest.raises(UserError, match=r"Program\.allow_execution is false"):
        Program().validate()
    RUN.validate()
    with pytest.raises(UserError, match=r"Program\.limits must be positive"):
        Program(allow_execution=True, limits=Limits(seconds=0)).validate()
    with pytest.raises(UserError, match=r"Program\.allow_execution"):  # nor does a worker begin
        CheckPool(Program())(["p"], ["print(1)"], [{"tests": TESTS}])


def test_without_isolation_nothing_runs(tmp_path, monkeypatch):
    """On a machine that cannot, it is an error that says so; the program is not run."""

    def refuse(*arguments):
        raise OSError(1, "unshare: Operation not permitted")

    monkeypatch.setattr(programs, "_build", refuse)
    programs.isolated.cache_clear()
    try:
        with pytest.raises(UserError, match=r"so that no program is run: PermissionError.*unshare"):
            programs.isolated()
        left = tmp_path / "ran"
        ran = run_isolated("exec(given)", f"open({str(left)!r}, 'w')", "", LIMITS)
        assert ran.code == 126
        with pytest.raises(
            OSError, match="could not be isolated"
        ):  # in a worker: it failed, and is not wrong
            score(ADD, TESTS)
        assert not left.exists()
        monkeypatch.setattr(programs.sys, "platform", "darwin")
        with pytest.raises(UserError, match="Linux namespaces, and this is darwin"):
            programs.isolated()
    finally:
        programs.isolated.cache_clear()


def test_a_wall_that_leaks_is_found(monkeypatch):
    """Namespaces that the kernel grants but that hold nothing are no isolation."""
    monkeypatch.setattr(programs, "_build", lambda readable, limits, worker: os.chdir("/"))
    programs.isolated.cache_clear()
    try:
        with pytest.raises(UserError, match="it reached the network, files, privileges"):
            programs.isolated()
    finally:
        programs.isolated.cache_clear()


def test_in_the_pool():
    pool = CheckPool(RUN, workers=2, seconds=60.0)
    answers = [ADD, "import os; os._exit(0)", f"```\n{ADD}```", "while"]
    found = pool(["p"] * 4, answers, [{"tests": TESTS}] * 4)
    assert found.values.tolist() == [1, 0, 1, 0]
    assert not found.failed.any()
    slow = CheckPool(RUN, workers=1, seconds=1.0)
    found = slow(["p"] * 2, ["import time; time.sleep(60)", ADD], [{"tests": TESTS}] * 2)
    assert found.timed_out.tolist() == [True, False]
    assert found.values[1] == 1


def test_its_memory_may_be_more_than_that_of_the_worker():
    roomy = Program(allow_execution=True, limits=Limits(seconds=30.0, memory=4096))
    found = CheckPool(roomy, workers=1, seconds=60.0, memory=2048)(["p"], [ADD], [{"tests": TESTS}])
    assert found.values.tolist() == [1], found.faults


# It takes back what would kill it with its parent, gives itself a name, and leaves the group.
ESCAPE = """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
ctypes.CDLL(None).prctl(15, b"MARK", 0, 0, 0)
os.setsid()
while True:
    time.sleep(1)
"""


def test_a_program_ends_with_its_worker():
    mark = f"jrlhf-test-{os.getpid()}-escape"
    stay = ESCAPE.replace("MARK", mark)
    code = f"from jrlhf.rewards.programs import *; run_isolated({stay!r}, 0, '', Limits(seconds=600.0))"
    worker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_until(lambda: len(running(mark, "-I")) == 1)
        time.sleep(0.5)  # until it has left
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    wait_until(lambda: not running(mark))  # nor do those that watched it


@pytest.mark.parametrize("died", ["worker", "outside"])
def test_nothing_is_begun_for_a_dead_parent(died, tmp_path):
    """A worker may be killed at any moment, also while the walls are built: the kernel's signal comes too late then."""
    mark = f"jrlhf-test-{os.getpid()}-{died}"
    code = f"""
import ctypes, time
from jrlhf.rewards import programs
LIBC, asked = ctypes.CDLL(None, use_errno=True), 0
class Slow:
    def __getattr__(self, name):
        return getattr(LIBC, name)
    def prctl(self, what, *rest):
        global asked
        asked += what == programs._PDEATHSIG
        if what == programs._PDEATHSIG and asked == {1 if died == "worker" else 2}:
            open({str(tmp_path / "asks")!r}, "w").close()
            time.sleep(1)
        return LIBC.prctl(what, *rest)
programs.ctypes.CDLL = lambda *_, **__: Slow()
programs.run_isolated("import time; time.sleep(600)  # {mark}", 0, "", programs.Limits(seconds=600.0))
"""
    worker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_until((tmp_path / "asks").exists)
        if died == "outside":
            os.killpg(worker.pid, signal.SIGKILL)
    finally:
        worker.kill()
        worker.wait()
    wait_until(lambda: not running(mark))


def test_a_worker_that_is_killed_leaves_nothing(tmp_path, monkeypatch):
    mark = f"stay{os.getpid()}"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    patient = Program(allow_execution=True, limits=Limits(seconds=600.0))
    pool = CheckPool(patient, workers=1, seconds=2.0)
    found = pool(["p"], [ESCAPE.replace("MARK", mark)], [{"tests": TESTS}])
    assert found.timed_out.tolist() == [True]
    wait_until(lambda: mark.encode() + b"\n" not in names())
    pool.close()
    assert list(tmp_path.iterdir()) == []


SIGNALS = """
import ctypes, os, signal
for pid in (0, 1, -1):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGSTOP, signal.SIGKILL):
        if pid == 0:
            if number in (signal.SIGKILL, signal.SIGSTOP):
                continue  # it would end itself
            signal.signal(number, signal.SIG_IGN)
        try:
            os.kill(pid, number)
        except OSError:
            pass
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long] * 4
print(libc.ptrace(16, 1, 0, 0), libc.ptrace(0x4206, 1, 0, 0))
"""


def test_the_first_process_is_out_of_reach():
    """It gets no signal from inside, nor can it be traced."""
    assert said(SIGNALS) == "-1 -1\n"


def processes(what: str) -> list[bytes]:
    return [p.read_bytes() for p in Path("/proc").glob(f"[0-9]*/{what}") if _is_readable(p)]


def names() -> list[bytes]:
    return processes("comm")


def running(*words: str) -> list[bytes]:
    """Commands with all these words."""
    commands = processes("cmdline")
    return [c for c in commands if all(word.encode() in c for word in words)]


def wait_until(happened) -> None:
    until = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_as_an_ordinary_user():
    """Not root: the namespaces are made by way of one of users."""
    if os.getuid() != 0:
        pytest.skip("the other tests are it")
    python = "/usr/bin/python3"  # one that anybody may read
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=False).stdout
    if not version.startswith(f"Python 3.{sys.version_info.minor}."):
        pytest.skip("no other Python of this version")
    source = Path(programs.__file__).parent.parent.parent
    paths = os.pathsep.join([str(source), *(p for p in sys.path if p.endswith("site-packages"))])
    code = (
        "from jrlhf.rewards.programs import *\n"
        "isolated(); print(Program(allow_execution=True).score('', 'x = 1', {'tests': ['assert x == 1']}))\n"
        f"print(run_isolated({SIGNALS!r}, 0, '', Limits(seconds=60.0)))"
    )
    done = subprocess.run(
        [python, "-c", code],
        env={"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert done.stdout == f"1.0\n{programs.Ran(0, '-1 -1' + chr(10), False)}\n", done.stderr
