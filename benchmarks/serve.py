"""What the server adds to a call: Guerdon beside LiteLLM's proxy and LLMRouter's server, in one run.

    python benchmarks/serve.py --peers /path/to/other-venv/bin/python --out benchmarks/results/serve.json

Every server forwards to the same fake upstream, one fixed member, one worker process, one server at a
time. Rounds are interleaved (direct, Guerdon, LiteLLM, LLMRouter, direct, ...), so that a slow spell of
the machine hits all of them. The load client and the upstream are raw asyncio protocols: they cost a
tenth of the leanest server. Reported per server: requests per second; the same per core (requests per
second of CPU time that the server process itself used, client and upstream excluded); median added to
the direct call; 99th percentile; CPU per request; resident memory before and after many requests.

The peers are installed into a virtual environment of their own, since they pin other versions:
``pip install 'litellm[proxy]'`` and ``pip install --no-deps llmrouter-lib`` (its server needs only
fastapi, uvicorn, httpx and pyyaml, which LiteLLM brings).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPLY = {
    "id": "chatcmpl-upstream",
    "object": "chat.completion",
    "created": 1,
    "model": "fake-model",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris. " * 20},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 120, "completion_tokens": 40, "total_tokens": 160},
}
QUESTION = "Which city is the capital of the country that has the longest border with Spain? " * 5
CLIENTS = (1, 64, 256)
TARGETS = {"rps_per_core_over_litellm": 10.0, "added_p50_ms_1": 1.0, "p99_ms_64": 100.0, "memory_growth_mb": 16.0}


class Upstream(asyncio.Protocol):
    """Answers every request with the same bytes as soon as its body has arrived."""

    HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

    def __init__(self) -> None:
        body = json.dumps(REPLY).encode()
        self.reply = self.HEAD % len(body) + body
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = content_length(self.buffer[:end])
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.transport.write(self.reply)


class Client(asyncio.Protocol):
    """One keep-alive connection that sends the next request when the reply is complete."""

    def __init__(self, request: bytes, load: Load) -> None:
        self.request, self.load = request, load
        self.buffer = bytearray()
        self.need = -1

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if self.load.left <= 0:
            self.transport.close()
            return
        self.load.left -= 1
        self.started = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.need < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end])
            if b"chunked" in head.lower():
                self.need = -2 if not self.buffer.endswith(b"0\r\n\r\n") else len(self.buffer)
                if self.need == -2:
                    self.need = -1
                    return
            else:
                self.need = end + 4 + content_length(head)
        if len(self.buffer) >= self.need:
            self.load.done(self.started, self.buffer.startswith(b"HTTP/1.1 200") and b"Paris." in self.buffer)
            self.buffer.clear()
            self.need = -1
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        self.load.closed()


class Load:
    """A number of requests shared by a number of connections."""

    def __init__(self, requests: int, clients: int) -> None:
        self.left, self.open = requests, clients
        self.latencies: list[float] = []
        self.bad = 0
        self.finished = asyncio.get_running_loop().create_future()

    def done(self, started: float, good: bool) -> None:
        self.latencies.append(time.perf_counter() - started)
        self.bad += not good

    def closed(self) -> None:
        self.open -= 1
        if self.open == 0 and not self.finished.done():
            self.finished.set_result(None)


def content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def request_bytes(port: int, model: str, key: str) -> bytes:
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64, "temperature": 0}
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def drive(port: int, model: str, key: str, clients: int, requests: int) -> dict[str, float]:
    """Send ``requests`` over ``clients`` connections."""
    loop = asyncio.get_running_loop()
    request = request_bytes(port, model, key)
    load = Load(requests, clients)
    started = time.perf_counter()
    await asyncio.gather(
        *(loop.create_connection(lambda: Client(request, load), "127.0.0.1", port) for _ in range(clients))
    )
    await load.finished
    wall = time.perf_counter() - started
    times = sorted(load.latencies)
    return {
        "requests": len(times),
        "bad": load.bad,
        "rps": len(times) / wall,
        "p50_ms": 1e3 * times[len(times) // 2],
        "p99_ms": 1e3 * times[min(len(times) - 1, int(len(times) * 0.99))],
    }


# ---- processes ----


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in children for p in tree(int(child)))]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def process(
    command: list[str], port: int, log: Path, env: dict[str, str] | None = None, patience: float = 180
) -> Iterator[int]:
    """Start a server, wait until it listens, stop it in the end."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, cwd=log.parent
        )
        try:
            until = time.monotonic() + patience
            while True:
                if child.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[2:4]} did not start: {log.read_text()[-800:]}")
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
                    break
                time.sleep(0.1)
            yield child.pid
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def guerdon(folder: Path, upstream: int, port: int) -> tuple[list[str], str, str]:
    from guerdon.serve.keys import create_key

    pool = folder / "pool.yaml"
    pool.write_text(
        "members:\n"
        "  - name: fixed\n    descriptor: a fake model\n    input_price: 0.5\n    output_price: 1.5\n"
        f"    endpoint: {{base_url: 'http://127.0.0.1:{upstream}/v1', model: fake-model}}\n    max_concurrency: 512\n"
    )
    store = folder / "keys.sqlite"
    key = create_key(store, f"bench-{secrets.token_hex(3)}", usd_total=100_000, rpm=10**9, tpm=10**12)
    command = [sys.executable, "-m", "guerdon.cli.main", "serve", "--router", "member:fixed", "--pool", str(pool)]
    return [*command, "--keys", str(store), "--port", str(port)], "fixed", key


def litellm(folder: Path, upstream: int, port: int, python: str) -> tuple[list[str], str, str]:
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: fixed\n    litellm_params:\n      model: openai/fake-model\n"
        f"      api_base: http://127.0.0.1:{upstream}/v1\n      api_key: none\n"
        "      input_cost_per_token: 0.0000005\n      output_cost_per_token: 0.0000015\n"
        "litellm_settings:\n  telemetry: false\n  request_timeout: 60\ngeneral_settings:\n  master_key: sk-bench\n"
    )
    script = str(Path(python).with_name("litellm"))
    return (
        [script, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"],
        "fixed",
        "sk-bench",
    )


def llmrouter(folder: Path, upstream: int, port: int, python: str) -> tuple[list[str], str, str]:
    config = folder / "llmrouter.yaml"
    config.write_text(
        "serve:\n  show_model_prefix: false\nrouter:\n  strategy: random\nllms:\n  fixed:\n    provider: openai\n"
        f"    model: fake-model\n    base_url: http://127.0.0.1:{upstream}/v1\n    api_key: none\n"
    )
    command = [python, "-m", "openclaw_router", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    return command, "fixed", "none"


def measure(name: str, port: int, pid: int | None, model: str, key: str, counts: dict[int, int]) -> dict[str, Any]:
    """All client numbers against one running server, after a warm-up."""
    run_load(port, model, key, 8, 50)
    out: dict[str, Any] = {}
    for clients, requests in counts.items():
        pids = tree(pid) if pid else []
        before = sum(map(cpu_seconds, pids))
        row = run_load(port, model, key, clients, requests)
        if pids:
            cpu = sum(map(cpu_seconds, pids)) - before
            row["cpu_ms_per_request"] = 1e3 * cpu / row["requests"]
            row["rps_per_core"] = row["requests"] / max(cpu, 1e-9)
        out[str(clients)] = row
        extra = f", {row['rps_per_core']:7.0f} req/s a core" if pids else ""
        progress(f"{name:9s} {clients:4d} clients: {row['rps']:7.0f} req/s{extra}, p50 {row['p50_ms']:.2f} ms, "
                 f"p99 {row['p99_ms']:.1f} ms, {row['bad']:.0f} bad")  # fmt: skip
    return out


def run_load(port: int, model: str, key: str, clients: int, requests: int) -> dict[str, Any]:
    """Drive the load from a process of its own."""
    command = [sys.executable, __file__, "--drive", json.dumps([port, model, key, clients, requests])]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="python of the virtual environment that holds litellm and llmrouter-lib")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of requests")
    parser.add_argument("--memory-requests", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        import uvloop

        print(json.dumps(uvloop.run(drive(*json.loads(args.drive)))))
        return
    if args.upstream:
        import uvloop

        uvloop.run(serve_upstream(args.upstream))
        return
    result = benchmark(args)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)
    raise SystemExit(0 if all(result["targets_met"].values()) else 1)


async def serve_upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upstream = free_port()
        me = [sys.executable, str(Path(__file__).resolve())]
        with process([*me, "--upstream", str(upstream)], upstream, folder / "upstream.log"):
            quick = {c: max(50, int(n * args.scale)) for c, n in {1: 2000, 64: 12_000, 256: 12_000}.items()}
            slow = {c: max(30, int(n * args.scale)) for c, n in {1: 200, 64: 1200, 256: 1200}.items()}
            servers: dict[str, Any] = {"guerdon": lambda port: guerdon(folder, upstream, port)}
            if args.peers:
                servers["litellm"] = lambda port: litellm(folder, upstream, port, args.peers)
                servers["llmrouter"] = lambda port: llmrouter(folder, upstream, port, args.peers)
            for _ in range(args.rounds):
                runs.setdefault("direct", []).append(measure("direct", upstream, None, "fixed", "none", quick))
                for which, build in servers.items():
                    if which in failures:
                        continue
                    port = free_port()
                    command, model, key = build(port)
                    try:
                        with process(command, port, folder / f"{which}.log", env={"PYTHONUNBUFFERED": "1"}) as pid:
                            counts = quick if which == "guerdon" else slow
                            runs.setdefault(which, []).append(measure(which, port, pid, model, key, counts))
                    except RuntimeError as error:
                        failures[which] = str(error).replace(str(folder), "")
                        progress(failures[which])
            memory = memory_run(folder, upstream, args.memory_requests)
    summary = summarise(runs)
    return {
        "what": "one fixed member behind each server, same fake upstream, one worker, loopback",
        "environment": {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "versions": versions(args.peers),
        },
        "rounds": args.rounds,
        "guerdon_has": "a key with money cap and rate limits, booked in SQLite before and after every request",
        "litellm_has": "a master key, no database, no budgets",
        "llmrouter_has": "no key; its 'random' strategy over one model",
        "servers": summary,
        "memory": memory,
        "failures": failures,
        "targets": TARGETS,
        **judge(summary, memory),
        "raw": runs,
    }


def memory_run(folder: Path, upstream: int, requests: int) -> dict[str, float]:
    """Resident memory of Guerdon's server after a warm-up, and after many more requests."""
    port = free_port()
    command, model, key = guerdon(folder, upstream, port)
    with process(command, port, folder / "memory.log") as pid:
        run_load(port, model, key, 64, max(1000, requests // 20))
        before = rss_mb(pid)
        halfway = 0.0
        for part in range(2):
            run_load(port, model, key, 64, requests // 2)
            halfway = rss_mb(pid) if part == 0 else halfway
        after = rss_mb(pid)
    progress(f"memory: {before:.1f} MB before, {halfway:.1f} MB halfway, {after:.1f} MB after {requests} requests")
    return {"requests": requests, "before_mb": before, "halfway_mb": halfway, "after_mb": after}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Best and median of the rounds: the best is what the code can do, the median what the machine gave."""
    out: dict[str, Any] = {}
    for name, rounds in runs.items():
        out[name] = {}
        for clients in map(str, CLIENTS):
            rows = [r[clients] for r in rounds]
            row: dict[str, Any] = {"bad": sum(r["bad"] for r in rows)}
            for metric in ("rps", "rps_per_core", "p50_ms", "p99_ms", "cpu_ms_per_request"):
                values = [r[metric] for r in rows if metric in r]
                if values:
                    best = max if metric.startswith("rps") else min
                    row[metric] = {"best": best(values), "median": statistics.median(values)}
            if name != "direct":
                added = [
                    r[clients]["p50_ms"] - d[clients]["p50_ms"] for r, d in zip(rounds, runs["direct"], strict=False)
                ]
                row["added_p50_ms"] = {"best": min(added), "median": statistics.median(added)}
            out[name][clients] = row
    return out


def judge(summary: dict[str, Any], memory: dict[str, float]) -> dict[str, Any]:
    """Each target against the median of the rounds."""
    ours = summary["guerdon"]
    reached = {
        "added_p50_ms_1": ours["1"]["added_p50_ms"]["median"],
        "p99_ms_64": ours["64"]["p99_ms"]["median"],
        "memory_growth_mb": memory["after_mb"] - memory["before_mb"],
    }
    met = {name: value <= TARGETS[name] for name, value in reached.items()}
    met["no_bad_reply"] = all(row["bad"] == 0 for row in ours.values())
    if "litellm" in summary:
        ratio = ours["64"]["rps_per_core"]["median"] / summary["litellm"]["64"]["rps_per_core"]["median"]
        reached["rps_per_core_over_litellm"] = ratio
        met["rps_per_core_over_litellm"] = ratio >= TARGETS["rps_per_core_over_litellm"]
    return {"reached": reached, "targets_met": met}


def versions(peers: str | None) -> dict[str, str]:
    out = {name: version(name) for name in ("guerdon", "uvicorn", "uvloop", "httptools", "aiohttp", "orjson")}
    if peers:
        code = "from importlib.metadata import version as v; print(v('litellm'), v('llmrouter-lib'))"
        found = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=False).stdout.split()
        out.update(zip(("litellm", "llmrouter-lib"), found, strict=False))
    return out


if __name__ == "__main__":
    main()
