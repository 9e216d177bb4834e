"""The in-process engine: what it samples, that the log-probabilities are right, and that rows do not disturb each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from guerdon.errors import ConfigError, EngineError
from guerdon.policies import products, tiny_policy
from guerdon.rollout import Completion, Sampling, TransformersEngine, batch
from guerdon.types import StopReason

TEXTS = ["the quick brown fox <search> Lima: capital of Peru? </search> über 漢字 🙂 question and answer"]


def small_policy(seed: int = 0, max_context: int = 256, **options):
    policy = tiny_policy(
        texts=TEXTS, hidden=32, layers=2, heads=4, max_context=max_context, seed=seed, **{"init_std": 0.02} | options
    )
    with torch.no_grad():  # a fresh model is nearly uniform; make it prefer some tokens
        policy.model.get_output_embeddings().weight.mul_(6)
    return policy


@pytest.fixture(scope="module")
def policy():
    return small_policy()


def full_logprobs(
    policy, ids: Sequence[int], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """Log-probabilities [T, V] of what follows each position, by a plain forward pass and a filter in float64."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([list(ids)])).logits[0].double() / (temperature or 1.0)
    for row in logits:
        order = row.argsort(descending=True)
        keep = list(range(len(order)))
        if top_k:
            keep = keep[:top_k]
        p = torch.softmax(row[order[keep]], -1).tolist()
        kept, mass = 0, 0.0
        while kept < len(keep) and mass < top_p:
            mass += p[kept]
            kept += 1
        row[order[kept if top_p < 1 else len(keep) :]] = -torch.inf
    return logits.log_softmax(-1)


async def talk(
    engine, prompt: Sequence[int], sampling: Sampling, observations: Sequence[Sequence[int]] = (), group=None
):
    stream = engine.start([], prompt, group=group)
    turns = [await stream.generate(sampling)]
    for ids in observations:
        stream.extend(ids, "")
        turns.append(await stream.generate(sampling))
    ids = stream.token_ids
    stream.close()
    return turns, ids


def assert_logprobs(
    policy, prompt: int, ids, turns: list[Completion], observations, sampling: Sampling, tol: float = 1e-4
):
    expected = full_logprobs(policy, ids, sampling.temperature, sampling.top_p, sampling.top_k)
    at = prompt
    for k, turn in enumerate(turns):
        assert list(ids[at : at + len(turn.token_ids)]) == list(turn.token_ids)
        for token, logprob in zip(turn.token_ids, turn.logprobs, strict=True):
            assert logprob == pytest.approx(expected[at - 1, token].item(), abs=tol)
            at += 1
        at += len(observations[k]) if k < len(observations) else 0
    assert at == len(ids)


@pytest.fixture(params=["written out", "packed", "modules", "model"])
def attention(request, monkeypatch) -> str:
    """Each way through the model: its trunk written out, with weights packed, its modules, its own attention."""
    if request.param == "packed":
        monkeypatch.setattr(batch, "_WORTH_PACKING", 0)
        monkeypatch.setattr(batch, "_LONG", 1)
        monkeypatch.setattr(products, "_WORTH_PACKING", 1)
    if request.param == "modules":
        monkeypatch.setattr(batch, "direct_trunk", lambda base, **_: None)
    return "model" if request.param == "model" else "shared"


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5, "temperature": 1.3}, {"temperature": 0.0}]
)
async def test_logprobs_are_those_of_a_plain_forward_pass(policy, attention: str, filters: dict) -> None:
    engine = TransformersEngine(policy, attention=attention)
    sampling = Sampling(max_tokens=12, **filters)
    # Prompts short enough to be copied to their rows, and one that is shared.
    groups = [([3 + g, 40, 41, 42 + g, 7][: 3 + g], [[50, 51, 52][: 1 + g], [60]]) for g in range(3)]
    groups.append((list(range(3, 53)), [[61]]))
    runs = [
        (p, o, talk(engine, p, Sampling(**{**filters, "max_tokens": 12, "seed": 10 * g + m}), o, group=g))
        for g, (p, o) in enumerate(groups)
        for m in range(3)
    ]
    done = await asyncio.gather(*(run for _, _, run in runs))
    for (prompt, observations, _), (turns, ids) in zip(runs, done, strict=True):
        assert_logprobs(policy, len(prompt), ids, turns, observations, sampling)
    await engine.aclose()


async def test_greedy_equals_generate(policy) -> None:
    engine = TransformersEngine(policy)
    prompts = [policy.encode("the quick brown fox"), policy.encode("question"), [5, 6]]
    done = await asyncio.gather(*(talk(engine, p, Sampling(max_tokens=20, temperature=0.0)) for p in prompts))
    for prompt, (turns, _) in zip(prompts, done, strict=True):
        expected = policy.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=20,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        assert list(turns[0].token_ids) == expected
    await engine.aclose()


async def test_rows_of_a_batch_say_what_they_say_alone(policy, attention: str) -> None:
    """Ragged prompts, turns and observations, more streams than slots, shared prompts: same tokens under same seeds."""
    cases = []
    for k in range(20):
        prompt = [4 + k % 5 + j for j in range(1 + 11 * (k % 5))]
        observations = [[20 + k + j for j in range((k + 3 * t) % 6)] for t in range(k % 3)]
        cases.append((prompt, observations, Sampling(max_tokens=3 + k, seed=k, top_p=0.9 if k % 2 else 1.0), k % 5))
    crowd = TransformersEngine(policy, max_slots=6, prefill_tokens=48, attention=attention)
    together = await asyncio.gather(*(talk(crowd, p, s, o, group=g) for p, o, s, g in cases))
    alone = TransformersEngine(policy, max_slots=1)
    for (prompt, observations, sampling, _), (turns, ids) in zip(cases, together, strict=True):
        single, single_ids = await talk(alone, prompt, sampling, observations)
        assert [t.token_ids for t in turns] == [t.token_ids for t in single]
        assert ids == single_ids
    assert crowd.stats.largest_batch <= 6
    await crowd.aclose()
    await alone.aclose()


async def test_the_prompt_of_a_group_is_computed_once(policy) -> None:
    engine = TransformersEngine(policy)
    prompt = list(range(3, 43))
    streams = [engine.start([], prompt, group="g") for _ in range(8)]
    await asyncio.gather(*(s.generate(Sampling(max_tokens=2, seed=k)) for k, s in enumerate(streams)))
    assert engine.stats.prefill_tokens == len(prompt) - 1
    assert engine.stats.shared_tokens == 7 * (len(prompt) - 1)
    late = engine.start([], prompt, group="g")
    await late.generate(Sampling(max_tokens=2))
    assert engine.stats.prefill_tokens == len(prompt) - 1
    other = engine.start([], prompt, group="another")
    await other.generate(Sampling(max_tokens=2))
    assert engine.stats.prefill_tokens == 2 * (len(prompt) - 1)
    for stream in (*streams, late, other):
        stream.close()
    await engine.aclose()


async def test_only_what_is_new_is_computed_between_turns(policy) -> None:
    engine = TransformersEngine(policy)
    stream = engine.start([], [3, 4, 5, 6])
    first = await stream.generate(Sampling(max_tokens=5, seed=1))
    assert first.stop is StopReason.LENGTH
    before = engine.stats.prefill_tokens
    stream.extend([7, 8, 9], "")
    await stream.generate(Sampling(max_tokens=5, seed=1))
    # The last sampled token and the observation without its last token, which goes through the decode step.
    assert engine.stats.prefill_tokens - before == 3
    assert stream.length == 4 + 5 + 3 + 5
    await engine.aclose()


async def test_two_turns_with_one_seed_draw_different_numbers(policy) -> None:
    engine = TransformersEngine(policy)
    (one, two), _ = await talk(engine, [3], Sampling(max_tokens=30, seed=5, temperature=3.0), [[3]])
    assert one.token_ids != two.token_ids
    (again, _), _ = await talk(engine, [3], Sampling(max_tokens=30, seed=5, temperature=3.0), [[3]])
    assert again.token_ids == one.token_ids
    await engine.aclose()


async def test_streams_without_a_seed_follow_the_engine_seed(policy) -> None:
    async def three(seed: int):
        engine = TransformersEngine(policy, seed=seed)
        out = await asyncio.gather(*(talk(engine, [3, 4], Sampling(max_tokens=10)) for _ in range(3)))
        await engine.aclose()
        return [turns[0].token_ids for turns, _ in out]

    first, again, other = await three(0), await three(0), await three(1)
    assert first == again != other
    assert len(set(first)) == 3


async def test_frequencies_follow_the_distribution(policy) -> None:
    engine = TransformersEngine(policy, max_slots=400)
    n = 4000
    out = await asyncio.gather(*(talk(engine, [3, 4], Sampling(max_tokens=1, seed=k), group=0) for k in range(n)))
    counts = torch.bincount(torch.tensor([t[0].token_ids[0] for t, _ in out]), minlength=policy.model.config.vocab_size)
    p = full_logprobs(policy, [3, 4])[1].exp()
    likely = p > 5 / n
    chi2 = ((counts - n * p) ** 2 / (n * p))[likely].sum().item()
    dof = int(likely.sum()) - 1
    assert chi2 < dof + 5 * (2 * dof) ** 0.5
    await engine.aclose()


async def test_stop_string_across_tokens_ends_the_turn_at_the_completing_token(policy) -> None:
    """A model that is made to spell a text: the stop string is found although tokens cut through it and through bytes."""
    text = "über 漢字 </answer> and more"
    for stop, kept in (("字 </", "über 漢字 </"), ("漢", "über 漢"), ("r 漢字", "über 漢字"), ("absent", None)):
        spelled = spelling_policy(text)
        engine = TransformersEngine(spelled)
        stream = engine.start([], [spelled.start])
        turn = await stream.generate(Sampling(max_tokens=len(spelled.ids), temperature=0.0, stop=(stop, "nowhere")))
        assert turn.text.startswith(kept or text)
        if kept is None:
            assert turn.stop is StopReason.LENGTH and turn.text == text
        else:
            assert turn.stop is StopReason.STOP_STRING
            without_last = spelled.decode(turn.token_ids[:-1])
            assert stop not in without_last and stop in turn.text
        assert turn.token_ids == tuple(spelled.ids[: len(turn.token_ids)])
        assert turn.token_ends[-1] == len(turn.text)
        await engine.aclose()


def spelling_policy(text: str):
    """A policy whose greedy continuation of one token is ``text``, one byte per token."""
    policy = (
        tiny_policy(texts=["x"], hidden=32, layers=1, heads=2, max_context=256, tie_embeddings=False)
        if False
        else tiny_policy(texts=["x"], hidden=32, layers=1, heads=2, max_context=256)
    )
    table = {b: policy.tokenizer.convert_tokens_to_ids(c) for b, c in byte_table().items()}
    policy.ids = [table[b] for b in text.encode()]
    policy.start = policy.tokenizer.eos_token_id + 5
    model, count = policy.model, policy.model.config.vocab_size
    script = policy.ids

    class Spell(torch.nn.Module):
        def forward(self, hidden):
            position = Spell.positions
            logits = torch.zeros(*hidden.shape[:2], count)
            for b in range(hidden.shape[0]):
                at = int(position[b, -1])
                if 0 <= at < len(script):
                    logits[b, -1, script[at]] = 50.0
            return logits

    inner = model.model.forward

    def watch(*args, **kwargs):
        Spell.positions = kwargs["position_ids"]
        return inner(*args, **kwargs)

    model.model.forward = watch
    head = model.lm_head
    model.lm_head = Spell()
    model.get_output_embeddings = lambda: head
    return policy


def byte_table() -> dict[int, str]:
    """GPT-2's stand-in characters, from the tokenizers package itself."""
    from tokenizers import pre_tokenizers

    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out = {}
    for b in range(128):
        out[b] = step.pre_tokenize_str(chr(b))[0][0]
    for code in range(128, 0x800):
        raw = chr(code).encode()
        for byte, character in zip(raw, step.pre_tokenize_str(chr(code))[0][0], strict=True):
            out[byte] = character
    for start in (0x800, 0xFFFF, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000):
        for code in range(start, start + 1):
            raw = chr(code).encode()
            for byte, character in zip(raw, step.pre_tokenize_str(chr(code))[0][0], strict=True):
                out[byte] = character
    for code in range(0x800, 0x10000, 64):
        if 0xD800 <= code < 0xE000:
            continue
        for byte, character in zip(chr(code).encode(), step.pre_tokenize_str(chr(code))[0][0], strict=True):
            out[byte] = character
    return out


async def test_eos_ends_the_turn_and_is_not_part_of_its_text() -> None:
    policy = spelling_policy("done")
    policy.ids.append(policy.tokenizer.eos_token_id)
    engine = TransformersEngine(policy)
    turn = await engine.start([], [policy.start]).generate(Sampling(max_tokens=50, temperature=0.0))
    assert turn.stop is StopReason.EOS
    assert turn.text == "done"
    assert turn.token_ids[-1] == policy.tokenizer.eos_token_id
    assert turn.token_ends == (1, 2, 3, 4, 4)
    await engine.aclose()


async def test_the_context_limit_cuts_a_completion() -> None:
    policy = small_policy(max_context=32)
    engine = TransformersEngine(policy)
    stream = engine.start([], list(range(3, 23)))
    turn = await stream.generate(Sampling(max_tokens=64, seed=0, temperature=2.0))
    assert turn.stop in (StopReason.CONTEXT, StopReason.EOS)
    if turn.stop is StopReason.CONTEXT:
        assert len(turn.token_ids) == 12 and stream.length == 32
        empty = await stream.generate(Sampling(max_tokens=1))
        assert (empty.token_ids, empty.stop) == ((), StopReason.CONTEXT)
    with pytest.raises(EngineError, match="32 tokens and max_context is 32"):
        engine.start([], list(range(32)))
    with pytest.raises(EngineError, match="prompt_ids is empty"):
        engine.start([], [])
    await engine.aclose()


async def test_cancelling_frees_the_slot(policy) -> None:
    engine = TransformersEngine(policy, max_slots=1)
    stream = engine.start([], [3, 4])
    task = asyncio.ensure_future(stream.generate(Sampling(max_tokens=200, temperature=5.0)))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(EngineError, match="closed"):
        await stream.generate(Sampling(max_tokens=1))
    turn = await asyncio.wait_for(engine.start([], [3, 4]).generate(Sampling(max_tokens=3)), 10)
    assert 1 <= len(turn.token_ids) <= 3
    await engine.aclose()


@pytest.mark.parametrize("where", ["_admit", "_begin_with_prefixes", "_prefill_pass", "_activate", "_decode"])
async def test_no_waiter_is_lost_wherever_a_step_fails(policy, where: str) -> None:
    engine = TransformersEngine(policy, max_slots=4)
    step, calls = getattr(engine._batch, where), 0

    def broken(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("no room")
        return step(*args, **kwargs)

    setattr(engine._batch, where, broken)
    streams = [engine.start([], [3, 4, 5, 6], group=i % 2) for i in range(6)]
    waiting = asyncio.gather(*(s.generate(Sampling(max_tokens=3, seed=1)) for s in streams), return_exceptions=True)
    results = await asyncio.wait_for(waiting, 20)
    assert any(isinstance(r, EngineError) and "no room" in str(r) for r in results)
    assert all(isinstance(r, EngineError) or r.token_ids for r in results)
    assert engine._in_flight == 0 and not engine._batch._jobs
    await engine.aclose()


async def test_the_model_is_left_alone_once_sampling_is_over(policy) -> None:
    engine = TransformersEngine(policy)
    streams = [engine.start([], [3, 4, 5], group=0) for _ in range(3)]
    await asyncio.gather(*(s.generate(Sampling(max_tokens=2, seed=1)) for s in streams))
    borrowed, running = 0, engine._batch.running

    def count():
        nonlocal borrowed
        borrowed += 1
        return running()

    engine._batch.running = count
    for stream in streams:
        stream.close()
    engine.reset()  # returns once the worker has been through what came before
    assert borrowed == 0
    await engine.aclose()


async def test_a_failing_model_reaches_every_waiter_and_the_engine_goes_on(policy) -> None:
    engine = TransformersEngine(policy)
    forward, armed = policy.model.model.forward, threading.Event()

    def broken(*args, **kwargs):
        if armed.is_set():
            raise RuntimeError("out of memory, say")
        return forward(*args, **kwargs)

    policy.model.model.forward = broken
    try:
        streams = [engine.start([], [3, 4, 5 + k], group=k) for k in range(4)]
        first = await asyncio.gather(*(s.generate(Sampling(max_tokens=3, seed=1)) for s in streams))
        armed.set()
        results = await asyncio.gather(
            *(s.generate(Sampling(max_tokens=3, seed=1)) for s in streams), return_exceptions=True
        )
        assert all(isinstance(r, EngineError) and "out of memory, say" in str(r) for r in results)
        assert all(isinstance(r.__cause__, RuntimeError) for r in results)
        armed.clear()
        again = await asyncio.gather(*(s.generate(Sampling(max_tokens=3, seed=1)) for s in streams))
        assert all(len(c.token_ids) >= 1 for c in again)
    finally:
        policy.model.model.forward = forward
    for stream, one, two in zip(streams, first, again, strict=True):
        ids = stream.token_ids
        assert_logprobs(policy, 3, ids, [one, two], [[]], Sampling())
    await engine.aclose()


async def test_logits_that_are_not_finite_fail_their_row_alone(policy) -> None:
    engine = TransformersEngine(policy)
    head = policy.model.lm_head.forward

    def poisoned(hidden):
        logits = head(hidden).clone()
        logits[0] = torch.nan
        return logits

    policy.model.lm_head.forward = poisoned
    try:
        streams = [engine.start([], [3, 4, 5 + k]) for k in range(3)]
        results = await asyncio.gather(*(s.generate(Sampling(max_tokens=1)) for s in streams), return_exceptions=True)
    finally:
        policy.model.lm_head.forward = head
    assert isinstance(results[0], EngineError) and "not finite" in str(results[0])
    assert all(isinstance(r, Completion) for r in results[1:])
    await engine.aclose()


async def test_weights_may_change_between_completions(policy, attention: str) -> None:
    changing = small_policy(seed=3)
    engine = TransformersEngine(changing, attention=attention)
    prompt = [3, 4, 5, 6]
    stream = engine.start([], prompt, group=0)
    await stream.generate(Sampling(max_tokens=4, seed=0))
    with torch.no_grad():
        for p in changing.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    turns, ids = await talk(engine, prompt, Sampling(max_tokens=6, seed=0), group=0)
    assert_logprobs(changing, 4, ids, turns, [], Sampling())
    engine.reset()
    assert engine.cache_bytes == 0
    turn = await stream.generate(Sampling(max_tokens=4, seed=0))
    expected = full_logprobs(changing, stream.token_ids)
    at = stream.length - len(turn.token_ids)
    assert turn.logprobs[0] == pytest.approx(expected[at - 1, turn.token_ids[0]].item(), abs=1e-4)
    await engine.aclose()


@pytest.mark.skipif(products._onednn() is None, reason="this processor has no faster products for packed weights")
@pytest.mark.parametrize("attention", ["packed"], indirect=True)
async def test_packed_weights_are_let_go_when_no_stream_is_open(attention: str) -> None:
    engine = TransformersEngine(small_policy())
    streams = [engine.start([], [3, 4, 5], group=0) for _ in range(2)]
    await asyncio.gather(*(s.generate(Sampling(max_tokens=2, seed=1)) for s in streams))
    held = engine._batch._direct._packed
    assert isinstance(held[0].gate, products.PackedWeight) and engine._batch._packed_head is not None
    streams[0].close()
    await streams[1].generate(Sampling(max_tokens=2, seed=1))
    assert engine._batch._direct._packed is held
    streams[1].close()
    while engine._batch._direct._packed is not None:  # noqa: ASYNC110  there is no event to wait for
        await asyncio.sleep(0.01)
    assert engine._batch._packed_head is None
    await engine.aclose()


async def test_training_mode_and_attention_are_as_before(policy) -> None:
    engine = TransformersEngine(policy)
    policy.model.train()
    policy.model.model.layers[0].eval()
    before = [m.training for m in policy.model.modules()]
    implementation = policy.model.config._attn_implementation
    _turns, ids = await talk(engine, [3, 4, 5], Sampling(max_tokens=4, seed=0))
    assert [m.training for m in policy.model.modules()] == before
    assert policy.model.config._attn_implementation == implementation
    loss = policy.model(input_ids=torch.tensor([list(ids)])).logits.sum()
    loss.backward()  # nothing that the engine touched is unfit for autograd
    policy.model.zero_grad()
    policy.model.eval()
    await engine.aclose()


async def test_a_closed_engine_says_so_and_closing_twice_is_fine(policy) -> None:
    engine = TransformersEngine(policy)
    stream = engine.start([], [3, 4])
    waiting = asyncio.ensure_future(stream.generate(Sampling(max_tokens=200, temperature=5.0)))
    await asyncio.sleep(0.02)
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await waiting
    with pytest.raises(EngineError, match="closed"):
        engine.start([], [3])
    stream.close()


def test_settings_out_of_range_are_refused(policy) -> None:
    with pytest.raises(ConfigError, match="max_slots must be at least 1, got 0"):
        TransformersEngine(policy, max_slots=0)
    with pytest.raises(ConfigError, match="attention must be 'shared' or 'model', got 'flash'"):
        TransformersEngine(policy, attention="flash")  # type: ignore[arg-type]


async def test_lockstep_starts_a_round_only_when_all_streams_want_to_sample(policy) -> None:
    engine = TransformersEngine(policy, lockstep=True)
    streams = [engine.start([], [3, 4, k]) for k in (5, 6, 7)]
    tasks = [asyncio.ensure_future(s.generate(Sampling(max_tokens=3, seed=1))) for s in streams[:2]]
    await asyncio.sleep(0.05)
    assert not any(t.done() for t in tasks) and engine.stats.decode_steps == 0
    streams[2].close()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert engine.stats.largest_batch == 2
    await engine.aclose()


def test_one_engine_serves_several_event_loops_in_turn(policy) -> None:
    engine = TransformersEngine(policy)
    seen = [
        asyncio.run(asyncio.wait_for(talk(engine, [3, 4], Sampling(max_tokens=4, seed=1)), 10))[1] for _ in range(3)
    ]
    assert seen[0] == seen[1] == seen[2]
    asyncio.run(engine.aclose())
