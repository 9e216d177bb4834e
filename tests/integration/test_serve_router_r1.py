"""A real Router-R1 behind the server: real rollout loop, environment and pool; only the policy's words are scripted."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from guerdon.rollout.protocol import Completion
from guerdon.routing.backends import CallableBackend
from guerdon.routing.member import Member
from guerdon.routing.pool import Pool
from guerdon.routing.router_r1 import RouterR1
from guerdon.serve.app import create_app
from guerdon.serve.keys import KeyStore, create_key, list_keys
from guerdon.serve.routes import MultiRound
from guerdon.serve.settings import Settings
from guerdon.serve.tally import TallyLedger
from guerdon.types import StopReason, Usage

pytestmark = pytest.mark.integration

HOPS = (
    "<think>I need the country first.</think><search>geo:Which country is Lyon in?</search>",
    "<think>Now its currency.</think><search>bank:Which currency has France?</search>",
    "<think>Done.</think><answer>the euro</answer>",
)


class Script:
    """An engine whose policy says the next line of the script, whatever it is shown."""

    tokenizer, max_context, trainable = None, 4096, False

    def __init__(self, lines):
        self.lines = lines

    def start(self, messages, prompt_ids, *, group=None):
        lines = iter(self.lines)

        async def generate(sampling):
            return Completion(next(lines), (), None, StopReason.STOP_STRING, Usage(0, 10, 5))

        return SimpleNamespace(length=0, generate=generate, extend=lambda ids, text: None, close=lambda: None)

    async def aclose(self):
        pass


def make(lines, *, slow: float = 0.0):
    async def bank(question):
        await asyncio.sleep(slow)
        return "the euro", 4

    members = [
        (Member("geo", "places", 1.0, 2.0), CallableBackend(lambda question: ("France", 2))),
        (Member("bank", "money", 1.0, 2.0), CallableBackend(bank)),
    ]
    pool = Pool(members, ledger=TallyLedger(keep=100, by_trajectory=False))
    router = RouterR1(SimpleNamespace(control_tokens=()), pool, engine=Script(lines))
    return pool, MultiRound(pool, router, "r1", max_cost_usd=0.05)


async def ask(app, body, headers=(), hang_up=None):
    sent = []
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if incoming:
            return incoming.pop()
        await (hang_up or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": list(headers)}
    await app(scope, receive, send)
    return sent[0]["status"] if sent else 0, b"".join(m.get("body", b"") for m in sent)


BODY = {"model": "r1", "messages": [{"role": "user", "content": "Which currency is used in Lyon"}]}


async def test_the_answer_carries_the_route_and_its_money():
    pool, served = make(HOPS)
    status, body = await ask(create_app(served, pool), BODY)
    reply = json.loads(body)
    assert status == 200 and reply["choices"][0]["message"]["content"] == "the euro"
    route = reply["guerdon"]
    assert [(s["member"], s["reply"]) for s in route["trace"]] == [("geo", "France"), ("bank", "the euro")]
    assert route["calls"] == 2 and "geo, bank" in route["reason"]
    assert route["usd"] == pytest.approx(pool.ledger.total.usd) == pytest.approx(sum(s["usd"] for s in route["trace"]))
    total = pool.ledger.total
    assert reply["usage"]["completion_tokens"] == total.output_tokens + 3 * 5


async def test_streamed_thoughts_and_replies_stay_inside():
    pool, served = make(HOPS)
    _, body = await ask(create_app(served, pool), {**BODY, "stream": True})
    events = [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    shown = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
    assert shown == "the euro" and body.endswith(b"data: [DONE]\n\n")


async def test_caps_force_the_answer():
    pool, served = make((HOPS[0], "<think>Out of calls.</think><answer>unknown</answer>"))
    status, body = await ask(create_app(served, pool), {**BODY, "max_calls": 1})
    assert status == 200 and json.loads(body)["guerdon"]["calls"] == 1
    pool, served = make((HOPS[0], "<think>No money.</think><answer>unknown</answer>"))
    status, body = await ask(create_app(served, pool), {**BODY, "max_cost_usd": 1e-9})
    assert status == 200 and json.loads(body)["guerdon"]["usd"] == 0 and pool.ledger.total.usd == 0


async def test_no_answer_and_a_blank_question_are_errors():
    pool, served = make(["<think>hm</think>"] * 5)
    status, body = await ask(create_app(served, pool), BODY)
    assert status == 502 and json.loads(body)["error"]["code"] == "no_answer"
    status, body = await ask(create_app(served, pool), {**BODY, "messages": [{"role": "user", "content": "  "}]})
    assert status == 400 and json.loads(body)["error"]["code"] == "invalid_question"


async def test_hanging_up_books_what_the_ledger_says(tmp_path):
    key = create_key(tmp_path / "k", "team", usd_total=1.0)
    pool, served = make(HOPS, slow=30.0)
    gone = asyncio.Event()
    async with KeyStore(tmp_path / "k") as store:
        app = create_app(served, pool, store, Settings())
        task = asyncio.create_task(ask(app, BODY, [(b"authorization", f"Bearer {key}".encode())], gone))
        await asyncio.sleep(0.3)  # the second member is thinking
        assert len(pool.ledger) == 1
        gone.set()
        await asyncio.wait_for(task, 5)
        await store.flush()
        assert len(pool.ledger) == 2
        assert (
            list_keys(tmp_path / "k")[0].spent_total == pytest.approx(pool.ledger.total.usd)
            and pool.ledger.total.usd > 0
        )
