"""What a pool keeps on disk: the ledger, the reply cache and the YAML file that describes it."""

import asyncio
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest

from guerdon.errors import ConfigError, DataError, PoolError
from guerdon.routing import lines
from guerdon.routing.backends import CallableBackend
from guerdon.routing.cache import ReplyCache
from guerdon.routing.ledger import Ledger, read_ledger
from guerdon.routing.lines import LineWriter, read_lines
from guerdon.routing.member import Charge, Member, Outcome, RawReply, Reply
from guerdon.routing.pool import Pool

PAID = Reply("a", "b", "m", "x", 10, 5, False, 0.00002, 1.0, 2.0, "2026-01-15", 0.5, 1, False, Outcome.OK)


# ---- lines ----


def test_a_torn_line_never_hides_the_next(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    writer = LineWriter(path)
    writer.write(b'{"a": 1}\n')
    writer.close()
    with path.open("ab") as file:
        file.write(b'{"a": 2, "b": "to')
    for value in (3, 4):
        again = LineWriter(path)
        again.write(b'{"a": %d}\n' % value)
        again.close()
        again.close()
    assert [row for _, row in read_lines(path)] == [{"a": 1}, None, {"a": 3}, {"a": 4}]
    with pytest.raises(OSError, match="closed"):
        again.write(b"{}\n")
    (tmp_path / "list").write_text("{}\n[]\n")
    with pytest.raises(DataError, match="line 2"):
        list(read_lines(tmp_path / "list"))
    with pytest.raises(DataError, match="absent"):
        list(read_lines(tmp_path / "absent"))


# ---- ledger ----


def test_the_file_holds_what_the_book_holds(tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.book(PAID, "t")
    mixed = Reply(
        "a", "b", None, None, 15, 5, True, 3e-5, 1.0, 2.0, None, 1.0, 2, False, Outcome.TIMEOUT, "why",
        charges=(Charge("a", None, 5, 0, 10_000), Charge("b", "m", 10, 5, 20_000)),
    )  # fmt: skip
    ledger.book(mixed)
    ledger.close()
    assert read_ledger(tmp_path / "l.jsonl") == list(ledger.entries)
    again = Ledger(tmp_path / "l.jsonl")
    again.book(PAID)
    again.close()
    assert len(read_ledger(tmp_path / "l.jsonl")) == 3
    (tmp_path / "l.jsonl").write_text('{"time": 1}\n')
    with pytest.raises(DataError, match="line 1: not a ledger entry"):
        read_ledger(tmp_path / "l.jsonl")


def test_sums_are_of_all_entries_however_few_are_kept():
    ledger = Ledger(keep=3, by_trajectory=False)
    for _ in range(10):
        ledger.book(PAID)
    assert len(ledger.entries) == 3 and len(ledger) == 10 and ledger.total_nano_usd == 200_000
    with pytest.raises(PoolError, match="by_trajectory"):
        ledger.of_trajectory("t")


async def test_a_full_disk_loses_no_row_and_stops_the_paying(tmp_path, monkeypatch):
    full = False
    real = os.write

    def write(fd, data):
        if full:
            real(fd, bytes(data)[:7])  # torn
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(lines.os, "write", write)
    asked = []
    path = tmp_path / "l.jsonl"
    pool = Pool(
        [(Member("a", input_price=1.0, output_price=2.0), lambda q: asked.append(q) or "fine")], ledger=Ledger(path)
    )
    await pool.call("a", "1")
    full = True
    reply = await pool.call("a", "2")
    assert reply.ok  # it was paid, and it is here
    with pytest.raises(PoolError, match=r"l\.jsonl cannot be written \(No space left on device\); 1 rows wait"):
        await pool.call("a", "3")
    assert asked == ["1", "2"] and len(pool.ledger) == 2
    full = False
    await pool.call("a", "4")
    await pool.aclose()
    assert [e.nano_usd for e in read_ledger(path)] == [e.nano_usd for e in pool.ledger]
    assert len(read_ledger(path)) == 3


@pytest.mark.integration
def test_a_killed_process_leaves_whole_rows(tmp_path):
    path = tmp_path / "l.jsonl"
    code = f"""
        import asyncio, sys
        from guerdon.routing.ledger import Ledger
        from guerdon.routing.member import Member
        from guerdon.routing.pool import Pool
        member = Member("a", input_price=1.0, output_price=2.0)
        pool = Pool([(member, lambda q: "x" * 50)], ledger=Ledger({str(path)!r}))
        async def main():
            for k in range(10**9):
                await pool.call("a", "q", trajectory_id=str(k))
                print(k, flush=True)
        asyncio.run(main())
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        last = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    tail = child.communicate()[0].split("\n")
    last = max([last, *(int(k) for k in tail[:-1] if k)])  # all calls that had come back
    rows = read_ledger(path)
    assert [int(r.trajectory_id) for r in rows[: last + 1]] == list(range(last + 1))
    assert sum(r.nano_usd for r in rows[: last + 1]) == (last + 1) * rows[0].nano_usd


def test_a_ledger_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PoolError, match=r"ledger .* cannot be written"):
        Ledger(tmp_path / "file" / "l.jsonl")


# ---- cache ----


async def test_the_cache_remembers_whole_replies(tmp_path):
    cache = ReplyCache(tmp_path / "deep" / "c.sqlite")
    key = cache.key("id", [{"role": "user", "content": "é\ud800"}], {"seed": None})
    assert await cache.get(key) is None
    await cache.put(key, RawReply("é\ud800", 1, 2, "m", "stop"))
    await cache.put(key, RawReply("later"))
    cache.close()
    cache.close()
    again = ReplyCache(tmp_path / "deep" / "c.sqlite")
    assert await again.get(key) == RawReply("é\ud800", 1, 2, "m", "stop")
    assert (again.hits, again.misses) == (1, 0)
    again.close()


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path):
    junk = tmp_path / "junk"
    junk.write_text("This is not a database. " * 100)
    with pytest.raises(PoolError, match=r"junk cannot be used .*; remove the file"):
        ReplyCache(junk)
    assert junk.read_text().startswith("This is not")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(PoolError, match="another program's database"):
        ReplyCache(other)
    newer = tmp_path / "newer.sqlite"
    ReplyCache(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(PoolError, match="format 7"):
        ReplyCache(newer)


async def test_a_cache_damaged_later_is_one_clear_error(tmp_path):
    path = tmp_path / "c.sqlite"
    cache = ReplyCache(path)
    await cache.put("k", RawReply("x" * 5000))
    cache.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(PoolError, match="remove the file"):
        broken = ReplyCache(path)
        try:
            await broken.get("k")
        finally:
            broken.close()


@pytest.mark.integration
def test_several_processes_share_a_cache(tmp_path):
    code = f"""
        import asyncio, sys
        from guerdon.routing.cache import ReplyCache
        from guerdon.routing.member import RawReply
        async def main(me):
            cache = ReplyCache({str(tmp_path / "c.sqlite")!r})
            for k in range(60):
                await cache.put(str(k), RawReply(f"reply {{k}}"))
                assert (await cache.get(str(k))).text == f"reply {{k}}"
            cache.close()
        asyncio.run(main(sys.argv[1]))
    """
    children = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(k)], stderr=subprocess.PIPE)
        for k in range(5)
    ]
    for child in children:
        assert child.communicate(timeout=60)[1] == b"" and child.returncode == 0
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        assert db.execute("SELECT count(*) FROM replies").fetchone() == (60,)


async def test_the_event_loop_does_not_wait_for_the_cache(tmp_path):
    cache = ReplyCache(tmp_path / "c.sqlite", timeout_s=0.5)
    holder = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    put = asyncio.create_task(cache.put("k", RawReply("x")))
    ticks, longest, before = 0, 0.0, time.monotonic()
    while not put.done() and ticks < 20:
        await asyncio.sleep(0.005)
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
        ticks += 1
    holder.execute("COMMIT")
    holder.close()
    await put
    assert ticks == 20 and longest < 0.4 and (await cache.get("k")).text == "x"
    cache.close()


# ---- YAML ----

WHOLE = """
cache: c.sqlite
ledger: out/l.jsonl
retry: {attempts: 2, base_s: 0}
breaker: false
members:
  - name: big
    descriptor: knows much
    input_price: 3
    output_price: 15.0
    price_date: 2026-01-15
    example_scores: {gsm8k: 0.9}
    size_b: 70
    aliases: [large]
    fallback: echo
    served_prices: {bigger: [5, 25]}
    endpoint:
      base_url: http://127.0.0.1:9/v1
      model: big-1
      api_key_env: BIG_KEY
      headers: {x-team: "${TEAM}"}
      extra_body: {temperature: null}
  - {name: echo, input_price: 0, output_price: 0, callable: "builtins:str"}
  - {name: old, input_price: 1, output_price: 1, recorded: {path: r.csv, query: prompt, reply: old_response}}
"""


async def test_a_whole_pool_is_read(tmp_path):
    (tmp_path / "pool.yaml").write_text(WHOLE)
    (tmp_path / "r.csv").write_text("prompt,old_response\nq,recorded\n")
    pool = Pool.from_yaml(tmp_path / "pool.yaml")
    big = pool["big"]
    assert (big.input_price, big.output_price, big.price_date, big.size_b) == (3.0, 15.0, "2026-01-15", 70.0)
    assert big.served_prices == {"bigger": (5.0, 25.0)} and big.fallback == "echo" and pool.resolve("LARGE") == "big"
    assert (await pool.call("echo", "hi")).text == "hi" and (await pool.call("old", " q ")).text == "recorded"
    await pool.aclose()
    assert len(read_ledger(tmp_path / "out" / "l.jsonl")) == 2 and (tmp_path / "c.sqlite").exists()


def read(tmp_path, text):
    path = tmp_path / "pool.yaml"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(ConfigError) as caught:
        Pool.from_yaml(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FREE = "input_price: 0\n    output_price: 0"
ECHO = 'input_price: 0, output_price: 0, callable: "builtins:str"'


def test_two_mistakes_are_both_reported_with_their_lines(tmp_path):
    said = read(
        tmp_path,
        """\
        members:
          - name: a
            input_prise: 1
            output_price: -2
            callable: "builtins:str"
          - {name: "b:c", input_price: 0, output_price: 0, callable: "builtins:str"}
        retry: {attempts: 0}
        """,
    )
    for words in (
        "line 3: members[0].input_prise (a): unknown setting; did you mean input_price",
        "line 2: members[0].input_price (a): is required",
        "line 2: members[0]: member 'a' has output_price=-2",
        "line 6: members[1]: member name 'b:c' must not hold ':'",
        "line 7: retry.attempts",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["members"]),
        ("members: []", ["at least one member"]),
        ("- a", ["a mapping of settings is expected"]),
        ("members: [", ["not valid YAML at line 1"]),
        ("members:\n  - {name: a, name: b}", ["line 2", "'name' is given twice"]),
        (f"members:\n  - {{name: a, {ECHO}}}\n  - {{name: a, {ECHO}}}", ["'a' is given twice"]),
        (f"members:\n  - {{name: a, fallback: b, {ECHO}}}", ["unknown member 'b'"]),
        (f"members:\n  - {{name: 7, {ECHO}}}", ["line 2", "members[0].name", "string"]),
        ("members:\n  - {name: a, input_price: 0, output_price: 0}", ["line 2", "exactly one of endpoint", "none"]),
        (
            f"members:\n  - name: a\n    {FREE}\n    endpoint: {{base_url: 'localhost:8', model: m}}",
            ["line 5", "'localhost:8' is not an http(s) address"],
        ),
        (
            f"members:\n  - name: a\n    {FREE}\n    endpoint: {{base_url: 'http://x/v1', model: m, api_key: k}}",
            ["unknown setting; did you mean api_key_env"],
        ),
        (
            "members:\n  - {name: a, input_price: 0, output_price: 0, callable: 'no.such:thing'}",
            ["'a'", "module:function"],
        ),
        (
            "members:\n  - {name: a, input_price: 0, output_price: 0, recorded: {path: absent.csv}}",
            ["'a'", "absent.csv"],
        ),
    ],
)
def test_a_file_that_cannot_be_a_pool_says_where_and_why(tmp_path, text, says):
    said = read(tmp_path, text)
    assert "pool.yaml" in said or "'a'" in said
    for words in says:
        assert words in said


def test_a_key_written_into_the_file_is_not_repeated_in_the_error(tmp_path):
    said = read(
        tmp_path,
        """\
        members:
          - name: a
            input_price: 0
            output_price: 0
            endpoint: {base_url: "http://x/v1", model: m, api_key_env: sk-planted-key-123}
        """,
    )
    assert "api_key_env must be the name of an environment variable" in said and "planted" not in said
    said = read(
        tmp_path,
        f"members:\n  - name: a\n    {FREE}\n    endpoint: {{base_url: 'http://u:planted@x/v1', model: m}}",
    )
    assert "api_key_env" in said and "planted" not in said


def test_options_go_over_the_file(tmp_path):
    (tmp_path / "pool.yaml").write_text(f"members:\n  - {{name: a, {ECHO}}}\n")
    ledger = Ledger()
    pool = Pool.from_yaml(tmp_path / "pool.yaml", ledger=ledger, resolver=lambda text: "a")
    assert pool.ledger is ledger and pool.resolve("anything") == "a"
    assert isinstance(pool.backend("a"), CallableBackend) and json.dumps(pool.fingerprint())
