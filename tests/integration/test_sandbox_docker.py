"""The Docker sandbox with a stand-in for ``docker``: it records the command line and runs the container's command here.

So the flags, the conversation, the code inside the container and the handling of Docker's failures are tested for real;
that a daemon enforces the flags is not.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import guerdon as gd
from guerdon.errors import ConfigError, UnknownName
from guerdon.sandbox import (
    Call,
    DockerSandbox,
    Job,
    Limits,
    LocalSandbox,
    SandboxError,
    Status,
    default_sandbox,
    make_sandbox,
    run_sql,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="containers run Linux"),
]

# Finds the image among docker's arguments and runs what follows; a mounted file is read where it lies.
FAKE = f"""#!{sys.executable}
import json, os, struct, subprocess, sys
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "calls.jsonl"), "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if "rm" in sys.argv[1:3]:
    sys.exit(0)
arguments = sys.argv[sys.argv.index("run") + 1:]
image = next(k for k, a in enumerate(arguments) if a == "python3") - 1
name = arguments[image]
if name == "absent":
    print("docker: Error response from daemon: No such image: absent:latest", file=sys.stderr)
    sys.exit(125)
if name == "hangs":
    import time
    time.sleep(60)
if name == "killed":
    sys.exit(137)
if name == "noisy":
    print("no report at all")
    sys.exit(0)
body = sys.stdin.buffer.read()
mounts = [a for a in arguments[:image] if a.startswith("type=bind")]
if mounts:
    fields = dict(f.partition("=")[::2] for f in mounts[0].split(","))
    opening = json.loads(body[8:])
    opening["job"]["database"] = fields["source"]
    opening["job"]["readable"] = [fields["source"]]
    body = json.dumps(opening).encode()
    body = struct.pack("=Q", len(body)) + body
environment = {{"PATH": "/usr/bin:/bin", "TMPDIR": os.path.join(here, "work")}}
command = [sys.executable, *arguments[image + 2:]]
sys.exit(subprocess.run(command, input=body, env=environment, cwd="/").returncode)
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    command = tmp_path / "docker"
    command.write_text(FAKE, encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    return tmp_path


def calls(docker: Path) -> list[list[str]]:
    return [json.loads(line) for line in (docker / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE item (name TEXT)")
        connection.executemany("INSERT INTO item VALUES (?)", [("a",), ("b",)])
    return path


SHORT = Limits(cpu_s=2, wall_s=60)


def test_programs_calls_and_files(docker: Path) -> None:
    with DockerSandbox() as box:
        result = box.run(Job("print(input()[::-1], open('x').read())", stdin="abc\n", files={"x": "y"}, limits=SHORT))
        assert (result.status, result.stdout, result.exit_code) == (Status.OK, "cba y\n", 0)
        made = box.run(Job("def f(x): return x * 2", "calls", calls=(Call("f", (3,)), Call("g"))))
        assert made.values[0] == (True, 6) and made.values[1][0] is False
        both = box.map([Job("print(1)"), Job("raise ValueError('no')")])
    assert [r.status for r in both] == [Status.OK, Status.ERROR] and "no" in (both[1].error or "")
    assert not any((docker / "work").glob("guerdon-*/*"))
    with pytest.raises(SandboxError, match="closed"):
        box.run(Job("print(1)"))


def test_it_answers_as_the_local_sandbox_does(docker: Path) -> None:
    jobs = [
        Job("import sys; sys.exit(3)"),
        Job("while True: pass", limits=Limits(cpu_s=1, wall_s=60)),
        Job("import time; time.sleep(30)", limits=Limits(wall_s=0.5)),
        Job("x = []\nwhile True: x.append(' ' * 10**7)", limits=SHORT),
        Job("while True: print('a' * 1000)", limits=SHORT),
        Job("import socket; socket.create_connection(('127.0.0.1', 80))", limits=SHORT),
        Job("def f(:"),
    ]
    with DockerSandbox() as box, LocalSandbox(1) as local:
        for job in jobs:
            there, here = box.run(job), local.run(job)
            assert (there.status, there.error, there.exit_code) == (here.status, here.error, here.exit_code), job.code


def test_the_container_is_shut_in(docker: Path) -> None:
    DockerSandbox("python:3.12-slim", cpus=0.5, runtime="runsc").run(
        Job("print(1)", limits=Limits(memory_mb=256, file_mb=4, processes=3))
    )
    (line,) = calls(docker)
    text = " ".join(line)
    for flag in (
        "run --rm --interactive --pull never",
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--user 65534:65534",
        "--memory 364m --memory-swap 364m",  # 256 of the job, 12 of its folder, 96 of the process around it
        "--pids-limit 35",
        "--cpus 0.5",
        "--tmpfs /work:rw,exec,nosuid,nodev,size=12m,mode=1777",
        "--runtime runsc python:3.12-slim python3 -I -c",
    ):
        assert flag in text, flag
    assert "--mount" not in line and "--volume" not in line


def test_the_job_cannot_reach_the_report(docker: Path) -> None:
    """It has no descriptor of it, and the process around it cannot be opened, read or traced."""
    attack = """
import os
for number in range(3, 64):
    try:
        os.write(number, b"\\0" * 8)
        print("wrote to", number)
    except OSError:
        pass
for path in ("fd/1", "mem", "environ"):
    try:
        open(f"/proc/{os.getppid()}/{path}", "rb+" if path != "environ" else "rb")
        print("opened", path)
    except OSError:
        pass
"""
    result = DockerSandbox().run(Job(attack, limits=SHORT))
    # descriptor 3 is where calls are answered; a program's answers count for nothing
    assert result.ok and result.stdout in ("", "wrote to 3\n"), result


def test_sql_reads_a_mounted_database(docker: Path, database: Path) -> None:
    with DockerSandbox() as box:
        result = box.run(Job("SELECT name FROM item ORDER BY name", "sql", database=str(database), limits=SHORT))
        assert result.values == ((True, (["name"], [("a",), ("b",)])),)
        denied = box.run(Job("DELETE FROM item", "sql", database=str(database), limits=SHORT))
        assert not denied.ok
        with pytest.raises(ConfigError, match="does not exist"):
            box.run(Job("SELECT 1", "sql", database="none.sqlite"))
    assert f"type=bind,source={database},target=/guerdon-database.sqlite,readonly" in calls(docker)[0]


def test_a_daemon_elsewhere_is_sent_the_database(docker: Path, database: Path) -> None:
    box = DockerSandbox(host="ssh://user@machine")
    result = box.run(Job("SELECT count(*) FROM item", "sql", database=str(database), limits=SHORT))
    assert result.values == ((True, (["count(*)"], [(2,)])),)
    line = calls(docker)[0]
    assert line[:3] == ["--host", "ssh://user@machine", "run"] and "--mount" not in line


def test_failures_of_docker_are_not_the_jobs(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SandboxError, match="No such image: absent"):
        DockerSandbox("absent").run(Job("print(1)"))
    assert DockerSandbox("killed").run(Job("print(1)")).status is Status.MEMORY
    assert DockerSandbox("noisy").run(Job("print(1)")).status is Status.KILLED
    started = time.monotonic()
    late = DockerSandbox("hangs", startup_s=0.5).run(Job("print(1)", limits=Limits(wall_s=0.5)))
    assert late.status is Status.KILLED and "no report" in (late.error or "") and time.monotonic() - started < 10
    line = calls(docker)[-1]
    assert line[:2] == ["rm", "--force"] and line[2].startswith("guerdon-")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="no command 'docker'"):
        DockerSandbox().run(Job("print(1)"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image": "--privileged"}, "image must be a name"),
        ({"host": ""}, "host must be a name"),
        ({"workers": 0}, "workers must be a positive"),
        ({"cpus": -1}, "cpus must be a positive"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DockerSandbox(**settings)


# By name ---------------------------------------------------------------------------------------------------------


def test_sandboxes_by_name(docker: Path) -> None:
    assert isinstance(make_sandbox("local"), LocalSandbox) and make_sandbox() is default_sandbox()
    box = make_sandbox({"name": "docker", "image": "mine", "cpus": 2})
    assert isinstance(box, DockerSandbox) and box.image == "mine"
    assert make_sandbox(box) is box
    with pytest.raises(UnknownName, match="did you mean docker"):
        make_sandbox("dokcer")
    with pytest.raises(ConfigError, match="no setting 'imag'"):
        make_sandbox({"name": "docker", "imag": "x"})
    with pytest.raises(ConfigError, match="run\\(job\\)"):
        make_sandbox(object())


def test_a_reward_names_its_sandbox(docker: Path) -> None:
    from guerdon.training.job import make_reward

    reward = make_reward({"name": "code_tests", "sandbox": "docker"})
    tests = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
    code = "```python\nprint(2 * int(input()))\n```"
    assert reward.text(completion=code, reference=tests).value == 1.0 and len(calls(docker)) == 2
    missing = gd.rewards.CodeTests(sandbox={"name": "docker", "image": "absent"}, on_error="drop")
    score = missing.text(completion=code, reference=tests)
    assert not score.valid and "No such image" in (score.reason or "")  # never a 0 for a sandbox that is not there


def test_the_environment_chooses_for_all(docker: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUERDON_SANDBOX", '{"name": "docker", "image": "mine"}')
    assert run_sql("SELECT count(*) FROM item", database).values[0][1][1] == [(2,)]
    assert "mine" in calls(docker)[0] and default_sandbox() is default_sandbox()
    monkeypatch.setenv("GUERDON_SANDBOX", "{no")
    with pytest.raises(ConfigError, match="GUERDON_SANDBOX must be"):
        default_sandbox()
    monkeypatch.delenv("GUERDON_SANDBOX")
    assert isinstance(default_sandbox(), LocalSandbox)


def test_the_code_inside_needs_no_package() -> None:
    """What is sent into the container imports the standard library alone."""
    code = (
        "import ast, pathlib, sys, guerdon.sandbox.docker as d\n"
        "for name in d._SOURCES:\n"
        "    tree = ast.parse((pathlib.Path(d.__file__).parent / f'{name}.py').read_text())\n"
        "    for node in ast.walk(tree):\n"
        "        names = [a.name for a in node.names] if isinstance(node, ast.Import) else "
        "[node.module] if isinstance(node, ast.ImportFrom) else []\n"
        "        for n in names:\n"
        "            top = n.partition('.')[0]\n"
        "            assert top in sys.stdlib_module_names or top in d._SOURCES, n\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
