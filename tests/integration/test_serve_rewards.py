"""The reward server, for real: its ASGI application on uvicorn in this process, real sockets, real scoring processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from typer.testing import CliRunner

import guerdon as gd
from guerdon.cli import main
from guerdon.errors import ConfigError, RewardError
from guerdon.serve.keys import create_key, list_keys
from guerdon.serve.rewards_app import RewardsApp, RewardSettings
from guerdon.serve.server import listen, make_server

pytestmark = pytest.mark.integration

GOOD = "<think>x</think><answer>Lima</answer>"
SPEC: list[Any] = [
    {"name": "exact_match", "on_error": "drop"},
    {"name": "tag_format", "tags": ["think", "answer"], "weight": 0.2},
]
STUNTS = """
import os, time
import guerdon as gd

@gd.reward(range=(0, 1), on_error="drop")
def stunt(completion: str) -> float:
    if completion.startswith("sleep"):
        time.sleep(float(completion[5:]))
    if completion == "exit":
        os._exit(7)
    if completion == "raise":
        raise ValueError("lone \\udc80 surrogate")
    print("a reward that prints")
    return float("nan") if completion == "nan" else 1.0

def factory():
    return stunt
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Somebody else's reward, installed as a package with an entry point."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "stunts.py").write_text(STUNTS, encoding="utf-8")
    info = folder / "stunts-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stunts\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[guerdon.reward]\nstunt = stunts:factory\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        yield


class Running:
    """A server in a thread of this process."""

    def __init__(self, spec: Any, keys: Any = None, **settings: Any) -> None:
        self.app = RewardsApp(spec, keys, RewardSettings(**settings))
        ready = threading.Event()
        self.server = make_server(self.app, ready.set)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 60
        while not ready.wait(0.05):
            assert self.thread.is_alive() and time.monotonic() < deadline, "the server did not start"

    def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("keys")
    key = create_key(folder / "keys.sqlite", "team")
    slow = create_key(folder / "keys.sqlite", "slow", rpm=1)
    running = Running(
        SPEC,
        gd.serve.KeyStore(folder / "keys.sqlite"),
        workers=2,
        max_batch=50,
        max_body_bytes=200_000,
        strip=("<|im_end|>",),
    )
    running.key, running.slow, running.store = key, slow, folder / "keys.sqlite"  # type: ignore[attr-defined]
    yield running
    running.stop()


@pytest.fixture(scope="module")
def stunts(plugin: None) -> Iterator[Running]:
    running = Running("stunt", workers=1, timeout_s=3.0, max_in_flight=3)
    yield running
    running.stop()


def ask(url: str, body: Any = None, *, key: str | None = None, method: str | None = None, **more: Any) -> Any:
    """Status, parsed body (or text) and headers."""

    async def go() -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            headers["content-type"] = "application/json"
        headers |= more.pop("headers", {})
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method or ("GET" if data is None else "POST"), url, data=data, headers=headers, **more
            ) as reply,
        ):
            text = await reply.text()
            return reply.status, json.loads(text) if "json" in reply.content_type else text, reply.headers

    return asyncio.run(go())


def score(server: Any, records: list[Any], **more: Any) -> Any:
    return ask(f"{server.url}/v1/score", {"records": records}, **more)


# Our own batches -------------------------------------------------------------------------------------------------


def test_a_batch_has_a_row_for_every_record_and_failures_are_no_zeros(keyed: Any) -> None:
    records = [
        {"id": "a", "prompt": "q", "completion": GOOD, "reference": "Lima"},
        {"completion": "nothing", "golds": ["Lima"]},
        {"completion": GOOD},  # no reference: no honest score
        {"choices": [{"message": {"role": "assistant", "content": GOOD}, "finish_reason": "stop"}], "answer": "Lima"},
        {"x": 1},
    ]
    status, body, headers = score(keyed, records, key=keyed.key)
    assert status == 200 and headers["x-request-id"] == body["request_id"]
    assert [row["id"] for row in body["scores"]] == ["a", 1, 2, 3, 4]
    assert [row["value"] for row in body["scores"]] == [1.2, 0.0, None, 1.2, None]
    assert body["valid"] == 3 and body["failed"] == 2
    assert body["scores"][0]["parts"] == {"ExactMatch": 1.0, "TagFormat": 1.0} and body["scores"][0]["reason"] is None
    assert not body["scores"][2]["valid"] and "NoneType" in body["scores"][2]["reason"]
    assert "no completion" in body["scores"][4]["reason"]
    assert score(keyed, [], key=keyed.key)[1]["scores"] == []


def test_it_says_the_same_as_guerdon_score(keyed: Any) -> None:
    from guerdon.evaluation import score_records

    records = [{"completion": GOOD, "answer": a} for a in ("Lima", "Rome", None)]
    assert score(keyed, records, key=keyed.key)[1]["scores"] == list(score_records(records, SPEC))


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"{", 400, "invalid_json", "not valid JSON"),
        (b'{"records": [{"completion": "\\ud800"}]}', 400, "invalid_json", "UTF-8"),
        (b"[" * 100_000, 400, "invalid_json", "JSON"),
        ([], 400, "invalid_body", "JSON object"),
        ({}, 400, "missing_required_parameter", "records is missing"),
        ({"records": {}}, 400, "invalid_value", "records must be a list"),
        ({"records": [1]}, 400, "invalid_value", "records[0] must be an object"),
        ({"recrods": []}, 400, "invalid_value", "did you mean records"),
        ({"records": [{}] * 51}, 413, "batch_too_large", "at most 50"),
        (b'{"records": [' + b" " * 200_000 + b"]}", 413, "body_too_large", "at most 200000 bytes"),
    ],
)
def test_a_bad_request_is_one_clear_error(keyed: Any, body: Any, status: int, code: str, says: str) -> None:
    got, reply, _ = ask(f"{keyed.url}/v1/score", body, key=keyed.key)
    assert got == status and set(reply) == {"error"} and reply["error"]["code"] == code
    assert says in reply["error"]["message"] and "\n" not in reply["error"]["message"]


def test_paths_methods_and_types(keyed: Any) -> None:
    assert ask(f"{keyed.url}/v1/scores", {}, key=keyed.key)[:2][0] == 404
    status, _, headers = ask(f"{keyed.url}/v1/score", key=keyed.key)
    assert status == 405 and headers["allow"] == "POST"
    wrong = ask(f"{keyed.url}/v1/score", b"x", key=keyed.key, headers={"content-type": "text/csv"})
    assert wrong[0] == 415


# Keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_needed_and_their_rate_holds(keyed: Any) -> None:
    for key in (None, "gd-wrong"):
        status, body, headers = score(keyed, [{"completion": "x"}], key=key)
        assert status == 401 and body["error"]["type"] == "authentication_error"
        assert headers["www-authenticate"] == "Bearer"
    assert ask(f"{keyed.url}/metrics")[0] == 401 and ask(f"{keyed.url}/healthz")[:2] == (200, {"status": "ok"})
    assert score(keyed, [], key=keyed.slow)[0] == 200
    status, body, headers = score(keyed, [], key=keyed.slow)
    assert status == 429 and "1 requests a minute" in body["error"]["message"] and int(headers["retry-after"]) > 0
    spent = {k.name: k for k in list_keys(keyed.store)}
    assert spent["slow"].calls == 1 and spent["slow"].spent_total == 0


def test_without_keys_only_loopback(tmp_path: Path) -> None:
    from guerdon.serve.server import require_keys

    with pytest.raises(ConfigError, match="everybody could run the rewards"):
        require_keys("0.0.0.0", None, "everybody could run the rewards")
    require_keys("127.0.0.1", None)


# OpenRLHF --------------------------------------------------------------------------------------------------------


def openrlhf_client(url: str, queries: list[str], prompts: list[str], labels: list[Any]) -> Any:
    """The request that OpenRLHF 0.11.0 makes (SingleTurnAgentExecutor): JSON by aiohttp, no headers of its own."""

    async def go() -> Any:
        payload = {"query": queries, "prompts": prompts, "labels": labels}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session,
            session.post(url, json=payload) as response,
        ):
            if response.status != 200:
                return response.status, await response.json()
            return 200, await response.json()

    return asyncio.run(go())


def test_openrlhf_asks_with_a_key_in_its_url(keyed: Any) -> None:
    url = f"http://key:{keyed.key}@127.0.0.1:{keyed.port}/get_reward"
    status, body = openrlhf_client(url, [f"Q?{GOOD}<|im_end|>\n", "Q?no"], ["Q?", "Q?"], ["Lima", "Lima"])
    assert status == 200
    assert body == {
        "rewards": [1.2, 0.0],
        "scores": [1.2, 0.0],
        "extra_logs": {"ExactMatch": [1.0, 0.0], "TagFormat": [1.0, 0.0]},
    }
    # sharded over several servers, some are asked for nothing
    assert openrlhf_client(url, [], [], []) == (200, {"rewards": [], "scores": [], "extra_logs": {}})


@pytest.mark.parametrize(
    ("query", "prompts", "labels", "status", "says"),
    [
        ([f"Q?{GOOD}"], ["Q?"], [None], 422, "query 0: "),
        (["other"], ["Q?"], ["x"], 400, "must begin with its prompt"),
        (["Q?x"], [], [], 400, "prompts has 0 entries for 1 queries"),
        (["Q?x"], ["Q?"], [], 400, "labels has 0 entries for 1 queries"),
        ([1], ["Q?"], ["x"], 400, "query[0] must be a string"),
        (None, ["Q?"], ["x"], 400, "query is missing"),
    ],
)
def test_openrlhf_never_gets_a_zero_for_a_failure(
    keyed: Any, query: Any, prompts: Any, labels: Any, status: int, says: str
) -> None:
    url = f"http://key:{keyed.key}@127.0.0.1:{keyed.port}/get_reward"
    got, body = openrlhf_client(url, query, prompts, labels)
    assert got == status and says in body["error"]["message"] and "rewards" not in body


# verl ------------------------------------------------------------------------------------------------------------


def test_verl_asks_by_a_coroutine(keyed: Any) -> None:
    compute_score = gd.integrations.verl_remote(keyed.url, key=keyed.key)

    async def many() -> list[Any]:
        # verl's reward loop: keyword arguments, many at once
        calls = [
            compute_score(data_source="d", solution_str=s, ground_truth="Lima", extra_info={"index": 1})
            for s in (GOOD, "no")
        ]
        return list(await asyncio.gather(*calls))

    assert asyncio.run(many()) == [{"score": 1.2}, {"score": 0.0}]
    with_parts = gd.integrations.verl_remote(keyed.url, key=keyed.key, parts=("TagFormat", "absent"))
    found = asyncio.run(with_parts("d", GOOD, "Lima"))
    assert found["TagFormat"] == 1.0 and found["absent"] != found["absent"]
    with pytest.raises(RewardError, match="NoneType"):
        asyncio.run(compute_score("d", GOOD, None))
    with pytest.raises(RewardError, match=r"401.*unknown"):
        asyncio.run(gd.integrations.verl_remote(keyed.url, key="gd-no")("d", GOOD, "Lima"))
    with pytest.raises(RewardError, match="cannot be reached"):
        asyncio.run(gd.integrations.verl_remote("http://127.0.0.1:9", retries=0)("d", GOOD, "Lima"))


# Rewards that misbehave ------------------------------------------------------------------------------------------


def test_failures_inside_a_reward_are_rows_with_reasons(stunts: Running) -> None:
    status, body, _ = score(stunts, [{"completion": c} for c in ("raise", "nan", "fine")])
    assert status == 200 and [r["value"] for r in body["scores"]] == [None, None, 1.0]
    assert "ValueError" in body["scores"][0]["reason"]


def test_a_reward_that_hangs_is_ended_and_the_next_one_works(stunts: Running) -> None:
    started = time.monotonic()
    status, body, _ = score(stunts, [{"completion": "sleep600"}])
    assert status == 504 and "longer than the time limit" in body["error"]["message"]
    assert time.monotonic() - started < 30
    assert wait_for(stunts, "fine") == 1.0
    assert "guerdon_reward_restarts_total 1" in ask(f"{stunts.url}/metrics")[1]


def test_a_reward_that_ends_its_process_is_an_error(stunts: Running) -> None:
    status, body, _ = score(stunts, [{"completion": "exit"}])
    assert status == 500 and body["error"]["code"] == "scorer_died" and "exit code 7" in body["error"]["message"]
    assert wait_for(stunts, "fine") == 1.0


def wait_for(server: Any, completion: str) -> Any:
    """The value, once the process was replaced."""
    for _ in range(60):
        status, body, _ = score(server, [{"completion": completion}])
        if status == 200:
            return body["scores"][0]["value"]
        assert status == 504
    raise AssertionError("no new scorer came")


def test_too_many_at_once_are_refused_at_once(stunts: Running) -> None:
    async def go() -> list[int]:
        async with aiohttp.ClientSession() as session:

            async def one() -> int:
                body = {"records": [{"completion": "sleep0.8"}]}
                async with session.post(f"{stunts.url}/v1/score", json=body) as reply:
                    return reply.status

            return list(await asyncio.gather(*(one() for _ in range(6))))

    got = asyncio.run(go())
    assert got.count(503) == 3 and 200 in got
    assert ask(f"{stunts.url}/healthz")[0] == 200


def test_a_client_that_leaves_costs_no_process(stunts: Running) -> None:
    async def leave() -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(asyncio.TimeoutError):
                await session.post(
                    f"{stunts.url}/v1/score",
                    json={"records": [{"completion": "sleep0.4"}]},
                    timeout=aiohttp.ClientTimeout(total=0.1),
                )

    def restarts() -> str:
        text = ask(f"{stunts.url}/metrics")[1]
        return next(line for line in text.splitlines() if line.startswith("guerdon_reward_restarts_total"))

    before = restarts()
    asyncio.run(leave())
    assert wait_for(stunts, "fine") == 1.0 and restarts() == before
    assert "guerdon_reward_disconnects_total 1" in ask(f"{stunts.url}/metrics")[1]


def test_metrics_are_prometheus(stunts: Running, keyed: Any) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    score(keyed, [{"completion": GOOD, "reference": "Lima"}, {"completion": GOOD}], key=keyed.key)
    text = ask(f"{keyed.url}/metrics", key=keyed.key)[1]
    found = {f.name: f for f in parser.text_string_to_metric_families(text)}
    outcomes = {s.labels["outcome"]: s.value for s in found["guerdon_rewards"].samples}
    assert outcomes["valid"] >= 1 and outcomes["failed"] >= 1
    assert {s.value for s in found["guerdon_reward_scorers"].samples} == {2.0}
    assert found["guerdon_reward_request_seconds"].type == "histogram"


def test_a_draining_server_finishes_what_runs_and_takes_nothing_new(plugin: None) -> None:
    server = Running("stunt", timeout_s=10.0)
    done: list[Any] = []
    asking = threading.Thread(target=lambda: done.append(score(server, [{"completion": "sleep0.8"}])))
    asking.start()
    while server.app.in_flight == 0:
        time.sleep(0.01)
    server.server.handle_exit(signal.SIGTERM, None)
    assert score(server, [{"completion": "fine"}])[0] == 503
    assert ask(f"{server.url}/healthz")[:2] == (503, {"status": "draining"})
    asking.join(10)
    server.thread.join(10)
    assert done[0][0] == 200 and done[0][1]["scores"][0]["value"] == 1.0 and not server.thread.is_alive()
    assert server.app.scorers.alive == 0


def test_a_reward_that_cannot_be_made_stops_the_start() -> None:
    async def start() -> Any:
        app = RewardsApp("exact_macth", settings=RewardSettings(workers=2))
        with pytest.raises(ConfigError, match="did you mean exact_match"):
            await app.startup()
        return app.scorers.alive

    assert asyncio.run(start()) == 0


# The command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_and_stops_on_a_signal(tmp_path: Path) -> None:
    (tmp_path / "rewards.yaml").write_text(json.dumps({"reward": SPEC}), encoding="utf-8")
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "guerdon.cli.main", "serve-rewards"),
            *(str(tmp_path / "rewards.yaml"), "--port", "0", "--access-log"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None and child.stderr is not None
        server = type("Url", (), {"url": json.loads(child.stdout.readline())["url"]})
        assert score(server, [{"completion": GOOD, "reference": "Lima"}])[1]["scores"][0]["value"] == 1.2
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
        assert '"route": "score", "status": 200, "records": 1' in child.stderr.read()
    finally:
        child.kill()


@pytest.mark.parametrize(
    ("yaml", "options", "says"),
    [
        ("reward: exact_macth", (), "did you mean exact_match"),
        ("rewards: exact_match", (), "one key 'reward'"),
        ("reward: exact_match", ("--host", "0.0.0.0"), "--keys FILE"),
        ("reward: exact_match", ("--keys", "none.sqlite"), "does not exist"),
        ("reward: exact_match", ("--timeout", "0"), "timeout_s"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, yaml: str, options: tuple[str, ...], says: str) -> None:
    (tmp_path / "r.yaml").write_text(yaml, encoding="utf-8")
    done = CliRunner().invoke(main.app, ["serve-rewards", str(tmp_path / "r.yaml"), *options])
    assert done.exit_code == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("reward: exact_match", encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(main.app, ["serve-rewards", str(tmp_path / "r.yaml"), "--port", port])
    assert done.exit_code == 2 and "choose another --port" in done.stderr
