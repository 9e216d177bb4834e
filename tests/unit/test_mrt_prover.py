"""Cuts of a thought, episodes that begin at one, forced answers, and the bandit: by hand and against references."""

from __future__ import annotations

import asyncio
import math
from itertools import product

import pytest
import torch

from guerdon.environments.continued import Continued, Cut, render_continued, text_cuts, turn_cuts
from guerdon.environments.meta_bandit import (
    MetaBandit,
    RightCode,
    bandit_script,
    bandit_tasks,
    bandit_words,
    posterior_success,
)
from guerdon.environments.single import SingleTurn
from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.rollout import Sampling, TransformersEngine, rollout_sync
from guerdon.search import CLOSE_SUFFIX, FORCE_SUFFIX, AnswerSampler, MetaProver
from guerdon.types import StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)
WORDS = bandit_words()
TOKENIZER = train_bpe(["\n"], vocab_size=258 + len(WORDS), atoms=(), words=WORDS)
POLICY = tiny_policy(TOKENIZER, hidden=16, layers=1, heads=2, max_context=256)


def letters(text: str, **info) -> Trajectory:
    """One policy turn with a token for each character."""
    n = len(text)
    turn = Turn("policy", text, tuple(range(n)), tuple(-0.1 * k for k in range(n)), tuple(range(1, n + 1)))
    return Trajectory(Task("t", "q"), (turn,), StopReason.DONE, prompt_ids=(1,), info=info)


THOUGHT = "a\n\nb\n\nc\n\nWait d\n\ne"


def test_cuts_of_a_text_are_token_exact_and_leave_the_answer_out():
    trajectory = letters(THOUGHT + "</think>answer")
    cuts = text_cuts(trajectory)
    assert [c.text for c in cuts] == ["", "a\n\nb\n\nc\n\n", THOUGHT]
    assert [c.complete for c in cuts] == [False, False, True] and [c.open for c in cuts] == [False, True, True]
    for cut in cuts:
        assert cut.ids == tuple(range(len(cut.text)))
    assert cuts[1].turns[0].logprobs == trajectory.turns[0].logprobs[: len(cuts[1].text)]


def test_a_truncated_thought_is_not_complete_and_no_thought_has_one_cut():
    assert [c.complete for c in text_cuts(letters(THOUGHT))] == [False, False, False]
    assert text_cuts(letters("</think>answer")) == [Cut()]
    assert text_cuts(Trajectory(Task("t", "q"), (), StopReason.DONE)) == [Cut()]
    assert len(text_cuts(letters(THOUGHT), max_episodes=1)) == 2
    assert len(text_cuts(letters("a</think>b"), close=None)) == 2
    with pytest.raises(DataError, match="turn_cuts"):
        text_cuts(Trajectory(Task("t", "q"), (Turn("policy", "a"), Turn("environment", "b")), StopReason.DONE))
    with pytest.raises(DataError, match="token_ends"):
        text_cuts(Trajectory(Task("t", "q"), (Turn("policy", "a", (1,), (0.0,)),), StopReason.DONE))


def test_cuts_join_where_a_turn_was_open():
    first = text_cuts(letters("a\n\nb\n\nc\n\nWait"))[1]
    later = text_cuts(letters("Wait d</think>x"))[1]
    joined = first.joined(later)
    assert joined.text == "a\n\nb\n\nc\n\nWait d" and len(joined.turns) == 1 and joined.complete and joined.open
    assert joined.turns[0].token_ends == tuple(range(1, len(joined.text) + 1))
    assert first.joined(Cut()).turns == first.turns and first.joined(Cut()).open


def bandit_turns(*said: str) -> tuple[Turn, ...]:
    out = []
    for k, text in enumerate(said):
        ids = tuple(POLICY.encode(text))
        speaker = "policy" if k % 2 == 0 else "environment"
        meta = {"forces": True} if "=" in text else {}
        out.append(Turn(speaker, text, ids, (0.0,) * len(ids) if speaker == "policy" else None, None, meta))
    return tuple(out)


def test_cuts_of_a_dialogue_hold_the_reply_and_know_when_the_answer_was_asked_for():
    turns = bandit_turns(" a", " 1", " b", " 0 =", " 1 0")
    cuts = turn_cuts(Trajectory(Task("t", "q"), turns, StopReason.DONE))
    assert [c.text for c in cuts] == ["", " a 1", " a 1 b 0 ="]
    assert [c.forced for c in cuts] == [False, False, True] and [c.complete for c in cuts] == [False, False, True]
    assert len(turn_cuts(Trajectory(Task("t", "q"), turns, StopReason.DONE), thinking=1)) == 2
    assert turn_cuts(Trajectory(Task("t", "q"), (), StopReason.DONE)) == [Cut()]
    with pytest.raises(DataError, match="4 of thought"):
        turn_cuts(Trajectory(Task("t", "q"), turns, StopReason.DONE), thinking=4)


# The bandit -----------------------------------------------------------------------------------------------------------


def play(task: Task, *said: str, budget: int = 3, wait: bool = False):
    episode = MetaBandit(budget, wait=wait).start(task, seed=0, group=0, member=0)
    return episode, [asyncio.run(episode.step(s)) for s in said]


TASK = Task("c", "code:", "01", {"code": [0, 1], "replies": [[0, 1, 0], [1, 1, 0]], "flip": 0.15})


def test_the_bandit_replies_in_order_and_asks_when_the_budget_is_spent():
    episode, seen = play(TASK, " a", " b", " a", " 0 1")
    assert [o.text for o in seen] == [" 0", " 1", " 1 =", ""]
    assert [o.final for o in seen] == [False, False, True, False] and seen[-1].done
    assert episode.result()[1] == {"queries": 3, "asked": (2, 1), "answer": "01"}


def test_guessing_and_nonsense_end_the_thought_and_waiting_does_not():
    for word in (" guess", "nonsense", " c"):
        episode, seen = play(TASK, " a", word, " 1 1")
        assert seen[1].text == " =" and seen[1].final and episode.result()[1]["queries"] == 1
    episode, seen = play(TASK, " guess", " guess", " b", " 1", wait=True)
    assert [o.text for o in seen] == [" wait", " wait", " 1 =", ""]
    assert play(TASK, " guess", budget=0)[1][0].final
    with pytest.raises(ConfigError):
        MetaBandit(-1)
    with pytest.raises(DataError, match="code"):
        MetaBandit(1).start(Task("x", "y"), seed=0, group=0, member=0)


def test_the_reward_pays_right_codes_less_the_price_of_queries():
    def done(**info):
        return Trajectory(TASK, (), StopReason.DONE, info=info)

    assert RightCode()([done(queries=3, answer="01")])[0].value == 1.0
    score = RightCode(0.125)([done(queries=4, answer="11")])[0]
    assert score.value == -0.5 and score.parts == {"right": 0.0, "queries": 4.0}
    with pytest.raises(RewardError, match="MetaBandit"):
        RightCode()([done()])


def test_tasks_repeat_themselves_and_noise_has_its_rate():
    assert bandit_tasks(3, seed=1) == bandit_tasks(3, seed=1) != bandit_tasks(3, seed=2)
    tasks = bandit_tasks(200, flip=0.2, seed=3)
    wrong = [r != b for t in tasks for b, row in zip(t.meta["code"], t.meta["replies"], strict=True) for r in row]
    assert sum(wrong) / len(wrong) == pytest.approx(0.2, abs=0.01)
    assert all(t.reference == "".join(map(str, t.meta["code"])) for t in tasks)
    for options in ({"bits": 0}, {"bits": 9}, {"flip": 0.5}, {"flip": -0.1}):
        with pytest.raises(ConfigError):
            bandit_tasks(1, **options)


def test_posterior_success_against_bayes_by_enumeration():
    flip = 0.15
    for replies in ([[1, 1, 0], []], [[0], [1, 0]], [[1, 1], [0, 0, 0]]):
        weight = {}
        for code in product((0, 1), repeat=2):
            weight[code] = math.prod(
                1 - flip if r == b else flip for b, row in zip(code, replies, strict=True) for r in row
            )
        best = max(weight.values()) / sum(weight.values())
        assert posterior_success(replies, flip) == pytest.approx(best)
    assert posterior_success([[1], [0]], 0.0) == 1.0 and posterior_success([[], []], 0.0) == 0.25


def test_a_script_is_what_the_environment_would_have_said():
    prompt, response, mask = bandit_script(POLICY, TASK, [0, 1, 0])
    assert prompt == POLICY.render(TASK.prompt)
    # Bit a was answered 0 and then 1, which is even: the code's own 0; bit b was answered 1.
    assert POLICY.decode(response) == " a 0 b 1 a 1 guess = 0 1"
    assert mask == [1, 0, 1, 0, 1, 0, 1, 0, 1, 1]
    assert POLICY.decode(bandit_script(POLICY, TASK, [1], guess=False)[1]) == " b 1 = 0 1"
    assert POLICY.decode(bandit_script(POLICY, TASK, [], guess=False)[1]) == " guess = 0 1"


# Episodes that begin at a cut -----------------------------------------------------------------------------------------

CUT = Cut(bandit_turns(" a", " 0"))


def continued(terminate: bool, cut: Cut = CUT, *, budget: int = 4, **options):
    world = Continued(MetaBandit(budget), force=" =", force_action=" guess", **options)
    task = Task(TASK.id, TASK.prompt, TASK.reference, {**TASK.meta, "cut": cut, "terminate": terminate})
    return world.start(task, seed=0, group=0, member=0)


def test_the_prompt_holds_the_recorded_tokens_and_the_suffix_where_an_answer_is_forced():
    render = render_continued(POLICY)
    base = POLICY.render(TASK.prompt)
    assert render(continued(False).prompt) == [*base, *CUT.ids]
    assert render(continued(True).prompt) == [*base, *CUT.ids, *POLICY.encode(" =")]
    assert render(TASK.prompt) == base
    forced = Cut(bandit_turns(" a", " 0 ="), complete=True, forced=True)
    assert render(continued(True, forced).prompt) == [*base, *forced.ids], "asked once, not twice"
    assert continued(True).prompt[-1]["content"] == " a 0 ="
    odd = Cut((Turn("policy", " a", (3,), (0.0,)), Turn("environment", " 0", (9,))))
    assert render(continued(False, odd).prompt) == [*base, 3, 9], "recorded ids, not the text tokenised anew"


def test_thinking_on_continues_the_same_episode():
    episode = continued(False)
    assert asyncio.run(episode.step(" a")).text == " 1", "the second reply about a, for the first was in the prefix"
    info = episode.result()[1]
    assert info["queries"] == 2 and info["continued"] == 2 and info["terminated"] is False


def test_answering_at_once_is_graded_as_an_answer():
    episode = continued(True)
    assert asyncio.run(episode.step(" 0 1")).done
    assert episode.result()[1]["answer"] == "01" and episode.result()[1]["terminated"] is True


def test_after_so_many_new_episodes_the_answer_is_asked_for():
    episode = continued(False, episodes=1)
    seen = asyncio.run(episode.step(" b"))
    assert seen.text == " 1 =" and seen.final and seen.meta["forces"]
    assert asyncio.run(episode.step(" 0 1")).done and episode.result()[1]["queries"] == 2
    guessed = continued(False, episodes=1)
    assert asyncio.run(guessed.step(" guess")).text == " ="
    for bad in ({"episodes": 0}, {"episodes": 1, "force_action": None}):
        with pytest.raises(ConfigError, match="episodes"):
            Continued(MetaBandit(1), **{"force": " =", "force_action": " guess", **bad})


def test_an_environment_that_does_not_repeat_itself_is_caught():
    episode = continued(False, Cut(bandit_turns(" a", " 1")))
    with pytest.raises(DataError, match="repeats itself"):
        asyncio.run(episode.step(" b"))


def test_a_task_without_a_cut_is_played_as_ever():
    episode = Continued(MetaBandit(2), force=" =", force_action=" guess").start(TASK, seed=0, group=0, member=0)
    assert episode.prompt == TASK.prompt and asyncio.run(episode.step(" a")).text == " 0"


def test_an_open_turn_goes_on_as_one_action():
    class Echo(SingleTurn):
        def start(self, task, *, seed, group, member):
            inner = super().start(task, seed=seed, group=group, member=member)
            self.heard = []
            step = inner.step

            async def hear(action):
                self.heard.append(action)
                return await step(action)

            inner.step = hear
            return inner

    cut = text_cuts(letters("a\n\nb\n\nc\n\nWait"))[1]
    for terminate, want in ((False, "a\n\nb\n\nc\n\nmore"), (True, "a\n\nb\n\nc\n\n[now]more")):
        echo = Echo()
        task = Task("t", "q", None, {"cut": cut, "terminate": terminate})
        episode = Continued(echo, force="[now]").start(task, seed=0, group=0, member=0)
        assert asyncio.run(episode.step("more")).done and echo.heard == [want]


# Forced answers -------------------------------------------------------------------------------------------------------


class Scripted:
    """Answers "right" for the given share of the samples, and remembers what it was asked."""

    def __init__(self, right: int):
        self.right, self.asked = right, []

    def __call__(self, context, n):
        self.asked.append((context, n))
        return ["right"] * self.right + ["wrong answer"] * (n - self.right)


def test_the_value_is_the_share_of_right_forced_answers():
    sampler = Scripted(3)
    prover = MetaProver(sampler, lambda answer: answer == "right", "[stop]", k=4)
    assert prover.value("Q: ", "some thought") == 0.75
    assert sampler.asked == [("Q: some thought[stop]", 4)]
    assert prover.value("Q: ", "some thought") == 0.75 and len(sampler.asked) == 1, "cached"
    prover.value("Q: ", "")
    assert sampler.asked[-1] == ("Q: [stop]", 4), "before any text: an empty thought"
    assert prover.rollouts == 8
    prover.reset()
    prover.value("Q: ", "")
    assert len(sampler.asked) == 3 and prover.rollouts == 4


def test_a_complete_thought_is_only_closed():
    sampler = Scripted(0)
    prover = MetaProver(sampler, lambda answer: False, close_suffix="[close]", empty="<think>")
    prover.value("Q", "all of it", complete=True)
    prover.value("Q", "")
    assert [c for c, _ in sampler.asked] == ["Qall of it[close]", "Q<think>" + FORCE_SUFFIX]
    assert "</think>" in FORCE_SUFFIX and "</think>" in CLOSE_SUFFIX and sampler.asked[0][1] == 8


def test_an_answer_that_cannot_be_parsed_is_wrong_and_a_verifier_may_read_the_prompt():
    prover = MetaProver(
        lambda c, n: ["a", "b"][:n], lambda prompt, answer: None if answer == "a" else prompt == "Q", k=2
    )
    assert prover.value("Q") == 0.5 and prover.value("R") == 0.0


def test_a_sampler_may_give_one_answer_at_a_time_or_have_a_default_number():
    answers = iter(["right", "no", "no", "no"])
    assert MetaProver(lambda context: next(answers), lambda a: a == "right", k=4).value("Q") == 0.25

    def with_default(context, n=1):
        return ["right"] * n

    assert MetaProver(with_default, lambda a: a == "right", k=3).value("Q") == 1.0


def test_progress_of_a_trace_telescopes():
    shares = {"": 1, "x": 3, "xy": 2}

    def sampler(context, n):
        right = shares[context.removeprefix("Q").removesuffix("!")]
        return ["1"] * right + ["0"] * (n - right)

    prover = MetaProver(sampler, lambda a: a == "1", "!", k=4, close_suffix="!")
    made = prover.progress("Q", ["", "x", "xy"], complete=True)
    assert made.tolist() == [0.5, -0.25]
    assert prover.answer_tokens("Q", "x") == 1.0
    assert prover.values([("Q", "x"), ("Q", "")]).tolist() == [0.75, 0.25]


def test_a_failing_verifier_and_a_spent_budget():
    def broken(answer):
        raise RuntimeError("no")

    with pytest.raises(DataError, match="RuntimeError"):
        MetaProver(Scripted(1), broken, k=2).value("Q")
    assert MetaProver(Scripted(1), broken, k=2, on_error="wrong").value("Q") == 0.0
    spent = MetaProver(Scripted(4), lambda a: True, k=4, budget=4)
    assert spent.value("Q", "a") == 1.0 and math.isnan(spent.value("Q", "b"))
    with pytest.raises(DataError, match="budget"):
        spent.answer_tokens("Q", "b")


def test_the_prover_refuses():
    with pytest.raises(ConfigError, match="k must"):
        MetaProver(Scripted(1), bool, k=0)
    with pytest.raises(ConfigError, match="force_suffix"):
        MetaProver(Scripted(1), bool, "")
    with pytest.raises(ConfigError, match="policy="):
        MetaProver(Scripted(1), bool).value(TASK, CUT)
    with pytest.raises(DataError, match="flags"):
        MetaProver(Scripted(1), bool).values([("Q", "a")], complete=[True, False])


def test_tasks_and_cuts_become_token_ids():
    sampler = Scripted(1)
    prover = MetaProver(sampler, lambda a: a == "right", " =", k=2, policy=POLICY, close_suffix=" = =")
    base, equals = POLICY.render(TASK.prompt), POLICY.encode(" =")
    forced = Cut(bandit_turns(" a", " 0 ="), complete=True, forced=True)
    closed = Cut(bandit_turns(" a", " 0"), complete=True)
    assert prover.values([(TASK, Cut()), (TASK, CUT), (TASK, forced), (TASK, closed)]).tolist() == [0.5] * 3 + [0.5]
    asked = [list(c) for c, _ in sampler.asked]
    # The forced cut asks for the same answer as the open one with the suffix: one context, sampled once.
    assert asked == [[*base, *equals], [*base, *CUT.ids, *equals], [*base, *CUT.ids, *equals, *equals]]


def test_forced_answers_on_an_engine_agree_with_exact_probabilities():
    engine = TransformersEngine(POLICY, max_slots=32)
    sampler = AnswerSampler(engine, Sampling(max_tokens=1))
    one = POLICY.encode(" 1")[0]
    with torch.no_grad():
        bias = POLICY.model.get_input_embeddings().weight
        saved = bias.clone()
        context = torch.tensor([[*POLICY.render(TASK.prompt), *CUT.ids, *POLICY.encode(" =")]])
        state = POLICY.model.model(input_ids=context).last_hidden_state[0, -1]
        bias[one] += 4.0 * state / state.norm() ** 2
        try:
            exact = float(torch.softmax(POLICY.model(input_ids=context).logits[0, -1], -1)[one])
            prover = MetaProver(sampler, lambda answer: answer.text == " 1", " =", k=400, policy=POLICY)
            value = prover.value(TASK, CUT)
            assert value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 400) + 1e-9)
            assert 0.02 < exact < 0.98 and sampler.tokens == 400
            assert prover.answer_tokens(TASK, CUT) == 1.0
            again = MetaProver(AnswerSampler(engine, Sampling(max_tokens=1)), prover.verify, " =", k=400, policy=POLICY)
            assert again.value(TASK, CUT) == value, "the same seed draws the same answers"
        finally:
            bias.copy_(saved)


def test_common_random_numbers_give_every_prefix_the_same_streams():
    seen = []

    def sampler(contexts, counts, seeds):
        seen.append(list(seeds))
        return [["x"] * c for c in counts]

    for common in (False, True):
        MetaProver(sampler, lambda a: True, k=2, common_random_numbers=common).values([("Q", "a"), ("Q", "b")])
    assert len(set(seen[0])) == 2 and len(set(seen[1])) == 1


def test_the_bandit_plays_on_the_engine_from_a_cut():
    engine = TransformersEngine(POLICY, max_slots=8)
    world = Continued(MetaBandit(3), force=" =", force_action=" guess", episodes=1)
    task = Task(TASK.id, TASK.prompt, TASK.reference, {**TASK.meta, "cut": CUT, "terminate": False})
    group = rollout_sync(
        engine, world, [task], max_turns=6, group_size=3, sampling=Sampling(max_tokens=1),
        final_sampling=Sampling(max_tokens=2), render=render_continued(POLICY), on_error="raise",
    )[0]  # fmt: skip
    for trajectory in group.trajectories:
        assert trajectory.prompt_ids == (*POLICY.render(TASK.prompt), *CUT.ids)
        assert trajectory.stop is StopReason.DONE and len(trajectory.turns[-1].token_ids) == 2
        assert trajectory.info["terminated"] is False and trajectory.info["continued"] == len(CUT.ids)
