"""The sandbox: what hostile programs try, and that neither the host nor the next program notices."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from guerdon.errors import ConfigError
from guerdon.sandbox import Call, Job, Limits, LocalSandbox, SandboxError, Status, run_sql

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="what the kernel enforces is Linux's"),
]
SHORT = Limits(cpu_s=1, wall_s=8)
ASLEEP = Limits(cpu_s=1, wall_s=0.5)


@pytest.fixture(scope="module")
def sandbox():
    with LocalSandbox(1) as box:
        yield box


def test_a_program_reads_its_input_and_writes_its_output(sandbox: LocalSandbox) -> None:
    result = sandbox.run(Job("import sys\nprint(input()[::-1])\nprint('e', file=sys.stderr)", stdin="abc\n"))
    assert (result.status, result.stdout, result.stderr, result.exit_code) == (Status.OK, "cba\n", "e\n", 0)


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("while True: pass", Status.CPU, "CPU time"),
        ("x = []\nwhile True: x.append(' ' * 10**7)", Status.MEMORY, "512 MiB"),
        ("while True: print('a' * 1000)", Status.OUTPUT, "1048576 bytes"),
        ("import os\nwhile True: os.fork()", Status.ERROR, "Operation not permitted"),
        ("import subprocess; subprocess.run(['true'])", Status.ERROR, "Operation not permitted"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", Status.ERROR, "Operation not permitted"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", Status.ERROR, "Operation not permitted"),
        ("import os, signal; os.kill(-1, signal.SIGKILL)", Status.ERROR, "Operation not permitted"),
        ("open('/etc/passwd')", Status.ERROR, "Permission denied"),
        ("import os; os.listdir('/proc')", Status.ERROR, "Permission denied"),
        ("open('/tmp/guerdon-evil', 'w')", Status.ERROR, "Permission denied"),
        ("import os; os.chroot('.')", Status.ERROR, "Operation not permitted"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 45, 1 << 45))", Status.ERROR, "maximum limit"),
        ("open('big', 'wb').write(b'0' * (17 << 20))", Status.KILLED, "SIGXFSZ"),
        ("import ctypes; ctypes.string_at(0)", Status.KILLED, "SIGSEGV"),
        ("raise SystemExit(3)", Status.ERROR, "code 3"),
        ("def f(:", Status.ERROR, "SyntaxError"),
        ("x = '\\udc80'\nprint(x)", Status.OK, ""),
    ],
)
def test_hostile_programs_fail_alone(sandbox: LocalSandbox, code: str, status: Status, says: str) -> None:
    # Filling half a gigabyte takes most of a second of CPU on a slow machine.
    limits = Limits(cpu_s=10, wall_s=30) if status is Status.MEMORY else SHORT
    result = sandbox.run(Job(code, limits=limits))
    assert result.status is status, result
    assert says in (result.error or "")
    assert sandbox.run(Job("print(1)")).stdout == "1\n"
    assert not Path("/tmp/guerdon-evil").exists()


def test_a_sleeping_program_is_woken_by_its_end(sandbox: LocalSandbox) -> None:
    result = sandbox.run(Job("import time; time.sleep(9)", limits=ASLEEP))
    assert result.status is Status.TIMEOUT and "longer than 0.5 s" in (result.error or "") and result.wall_s < 3


def test_ignored_signals_do_not_save_a_program(sandbox: LocalSandbox) -> None:
    code = "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\nwhile True: pass"
    assert sandbox.run(Job(code, limits=SHORT)).status in (Status.CPU, Status.TIMEOUT)


def test_nothing_of_the_callers_environment_is_there(sandbox: LocalSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-do-not-leak")
    with LocalSandbox(1) as fresh:
        result = fresh.run(Job("import os; print(dict(os.environ))"))
    assert result.ok and "SECRET" not in result.stdout and "sk-do" not in result.stdout


def test_files_are_written_into_a_folder_that_the_next_run_finds_empty(sandbox: LocalSandbox) -> None:
    job = Job("print(open('in/data.txt').read()); open('out', 'w').write('x')", files={"in/data.txt": "hello"})
    assert sandbox.run(job).stdout == "hello\n"
    assert sandbox.run(Job("import os; print(os.listdir('.'))")).stdout == "[]\n"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b"])
def test_files_outside_the_folder_are_refused(sandbox: LocalSandbox, name: str) -> None:
    with pytest.raises(ConfigError, match="below the run's own folder"):
        sandbox.run(Job("", files={name: ""}))


def test_calls_return_plain_values_and_say_what_went_wrong(sandbox: LocalSandbox) -> None:
    code = "def f(x, y=1): return {'a': (x, y), 2: {x}, 'b': b'\\0', 'n': float('nan'), 'big': 2**70}\nclass Solution:\n    def m(self, x): return [x / 0]"
    calls = (Call("f", (3,), {"y": 4}), Call("g"), Call("Solution.m", (1,)))
    result = sandbox.run(Job(code, "calls", calls=calls))
    assert result.ok
    (ok, value), missing, divided = result.values
    assert ok and value["a"] == (3, 4) and value[2] == {3} and value["b"] == b"\0" and value["big"] == 2**70
    assert value["n"] != value["n"]
    assert missing == (False, "the code defines no 'g'")
    assert divided == (False, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)\ndef f(): return 1",
        "import os\nos.write(3, b'done\\n')\nos._exit(0)",
        "import sys\nsys.exit(0)",
    ],
)
def test_ending_early_answers_no_call(sandbox: LocalSandbox, code: str) -> None:
    result = sandbox.run(Job(code, "calls", calls=(Call("f"),)))
    assert not result.values


def test_an_object_that_equals_everything_is_no_value(sandbox: LocalSandbox) -> None:
    code = "class E(int):\n    def __eq__(self, other): return True\ndef f(): return E()"
    ((ok, why),) = sandbox.run(Job(code, "calls", calls=(Call("f"),))).values
    assert not ok and "cannot be compared" in why


def test_patched_modules_do_not_reach_the_report(sandbox: LocalSandbox) -> None:
    code = "import json, os\njson.dumps = lambda *a, **k: 'x'\nos.write = None\ndef f(): return 1"
    assert sandbox.run(Job(code, "calls", calls=(Call("f"),))).values == ((True, 1),)


def test_threads_and_event_loops_work(sandbox: LocalSandbox) -> None:
    code = (
        "import asyncio, threading\nasync def f(): await asyncio.sleep(0.001)\nasyncio.run(f())\n"
        "t = threading.Thread(target=print, args=('hi',)); t.start(); t.join()"
    )
    assert sandbox.run(Job(code)).stdout == "hi\n"


def test_processes_that_are_allowed_end_with_the_job(sandbox: LocalSandbox) -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('parent')"
    result = sandbox.run(Job(code, limits=Limits(processes=4, wall_s=5)))
    assert result.stdout == "parent\n" and result.wall_s < 4


def test_a_lost_worker_is_replaced(sandbox: LocalSandbox) -> None:
    with LocalSandbox(1) as box:
        box.run(Job("pass"))
        worker = box._idle.get()
        os.kill(worker._process.pid, signal.SIGKILL)
        box._idle.put(worker)
        assert box.run(Job("pass")).status is Status.KILLED
        assert box.run(Job("print(1)")).stdout == "1\n"


def test_jobs_run_on_all_workers_and_beside_an_event_loop() -> None:
    with LocalSandbox(2) as box:
        assert [r.stdout for r in box.map([Job(f"print({k})") for k in range(6)])] == [f"{k}\n" for k in range(6)]

        async def three():
            return await asyncio.gather(*(box.arun(Job(f"print({k})")) for k in range(3)))

        assert [r.stdout for r in asyncio.run(three())] == ["0\n", "1\n", "2\n"]
    with pytest.raises(SandboxError, match="closed"):
        box.run(Job("pass"))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "a b.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (a INTEGER, b TEXT)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [(k, str(k)) for k in range(5)])
    connection.commit()
    connection.close()
    return path


def test_sql_reads(database: Path) -> None:
    result = run_sql("SELECT a, b FROM t WHERE a > ? ORDER BY a", database, (2,))
    assert result.values == ((True, (["a", "b"], [(3, "3"), (4, "4")])),)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("DELETE FROM t", "authoriz"),
        ("DROP TABLE t", "authoriz"),
        ("ATTACH 'other.db' AS o", "authoriz"),
        ("PRAGMA writable_schema = 1", "authoriz"),
        ("VACUUM INTO 'copy.db'", "authoriz"),
        ("SELECT load_extension('x')", "authoriz"),
        ("SELECT 1; DELETE FROM t", "one statement at a time"),
        ("WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r", "CPU time"),
        ("SELECT x.a FROM t x, t y, t z, t u, t v, t w, t q", "more than 10000 rows"),
        ("SELECT nope FROM t", "no such column"),
        ("", "returns no rows"),
        ("SELECT zeroblob(900000000)", ""),
    ],
)
def test_hostile_sql_fails_alone(database: Path, query: str, says: str) -> None:
    before = database.read_bytes()
    result = run_sql(query, database, limits=SHORT)
    assert not result.ok and not result.values
    assert says in (result.error or "")
    assert database.read_bytes() == before and len(list(database.parent.iterdir())) == 1


def test_a_missing_or_foreign_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'.*none.db' does not exist"):
        run_sql("SELECT 1", tmp_path / "none.db")
    (tmp_path / "text.db").write_text("hello there, this is text")
    result = run_sql("SELECT 1", tmp_path / "text.db")
    assert not result.ok and "not a database" in (result.error or "")


def test_a_locked_database_is_one_clear_error(database: Path) -> None:
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        result = run_sql("SELECT * FROM t", database)
        assert not result.ok and "locked" in (result.error or "")
    finally:
        holder.close()


@pytest.mark.parametrize(
    "values",
    [
        {"cpu_s": 0},
        {"wall_s": float("inf")},
        {"memory_mb": 8},
        {"processes": -1},
        {"open_files": 2},
        {"output_bytes": -1},
    ],
)
def test_senseless_limits_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Limits(**values)
