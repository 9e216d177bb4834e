"""MRT in the trainer: groups of one prefix, progress of the very sample, nothing trained before the cut; STaR examples."""

from __future__ import annotations

import copy
import functools
import math
import random

import pytest
import torch

from guerdon.environments.continued import Continued, Cut, turn_cuts
from guerdon.environments.meta_bandit import MetaBandit, RightCode, bandit_script, bandit_tasks, bandit_words
from guerdon.errors import ConfigError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.rollout import Sampling, TransformersEngine
from guerdon.search import AnswerSampler, Estimate, MetaProver
from guerdon.training import OnlineConfig, OptimiserConfig, SftConfig, SftTrainer
from guerdon.training.mrt import EpisodeProgress, MrtTrainer, star_examples
from guerdon.types import Group, Score, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)
WORDS = bandit_words()
TOKENIZER = train_bpe(["\n"], vocab_size=258 + len(WORDS), atoms=(), words=WORDS)


def cuts(trajectory: Trajectory) -> list[Cut]:
    before = trajectory.task.meta.get("cut", Cut())
    asked = sum(turn.speaker == "policy" for turn in before.turns)
    return turn_cuts(trajectory, trajectory.info["queries"] - asked)


@functools.cache
def taught():
    """A policy that has seen scripts of random queries, so that its traces have several episodes."""
    policy = tiny_policy(TOKENIZER, hidden=16, layers=1, heads=2, max_context=128)
    rng = random.Random(0)
    data = [bandit_script(policy, t, rng.choices(range(2), k=3)) for t in bandit_tasks(16, bits=2, flip=0.0, seed=9)]
    SftTrainer(policy, data, SftConfig(steps=30, batch_size=16, optimiser=OptimiserConfig(lr=2e-2))).fit()
    return policy


def asking_policy():
    return copy.deepcopy(taught())


class Recorder(MetaProver):
    """Keeps what was asked, and says 0.25 for short prefixes and 0.75 for longer ones."""

    def __init__(self):
        self.pairs, self.resets = [], 0

    def reset(self):
        self.resets += 1

    def values(self, pairs, **options):
        self.pairs += pairs
        return torch.tensor([0.25 if len(cut.ids) < 4 else 0.75 for _, cut in pairs], dtype=torch.float64)


def trainer(prover=None, *, policy=None, **options):
    policy = policy or asking_policy()
    engine = TransformersEngine(policy, max_slots=32)
    if prover is None:
        sampler = AnswerSampler(engine, Sampling(max_tokens=2))
        prover = MetaProver(sampler, lambda t, a: "".join(a.text.split()) == t.reference, " =", k=4, policy=policy)
    world = Continued(MetaBandit(4), force=" =", force_action=" guess", **options.pop("world", {}))
    settings = OnlineConfig(
        steps=2,
        prompts_per_step=3,
        group_size=4,
        max_tokens=1,
        max_turns=8,
        optimiser={"lr": 1e-3},
        **options.pop("config", {}),
    )
    final = {"final_sampling": Sampling(max_tokens=2)}
    return MrtTrainer(
        policy, engine, world, bandit_tasks(6, bits=2, flip=0.0), RightCode(), settings,
        prover=prover, cuts=cuts, rollout_options=final, **options,
    )  # fmt: skip


def test_a_group_goes_on_from_one_prefix_and_half_of_it_answers_at_once():
    run = trainer(Recorder())
    run._in_step = True
    groups = run.sample(run.tasks[:3], seed=5)
    run.close()
    assert [len(g) for g in groups] == [4, 4, 4] and len(run.traces) == 3
    for group, trace in zip(groups, run.traces, strict=True):
        stopped = [t.info["terminated"] for t in group.trajectories]
        assert stopped == [False, False, True, True]
        cut = group.task.meta["cut"]
        whole = [*trace.prompt_ids, *(i for turn in trace.turns for i in turn.token_ids)]
        began = [*trace.prompt_ids, *cut.ids]
        assert whole[: len(began)] == began and not cut.complete
        thinking, answering = group.trajectories[0], group.trajectories[-1]
        assert list(thinking.prompt_ids) == began
        assert list(answering.prompt_ids) == [*began, *run.policy.encode(" =")]
        assert [len(t) for t in answering.turns if t.speaker == "policy"] == [2], "a whole answer of two bits"
        assert answering.stop is StopReason.DONE


def test_elsewhere_tasks_are_played_from_their_beginning():
    run = trainer(Recorder())
    groups = run.sample(run.tasks[:2], seed=5, group_size=1)
    run.close()
    assert [len(g) for g in groups] == [1, 1] and "cut" not in groups[0].trajectories[0].task.meta


def test_the_bonus_is_the_progress_of_this_very_trajectory():
    prover = Recorder()
    run = trainer(prover)
    row, detail = run.train_step()
    run.close()
    assert prover.resets == 1 and len(prover.pairs) == 2 * len(detail.trajectories)
    for k, trajectory in enumerate(detail.trajectories):
        (_, before), (_, after) = prover.pairs[2 * k : 2 * k + 2]
        assert before is trajectory.task.meta["cut"]
        if trajectory.info["terminated"]:
            assert after is before, "nothing was added, so nothing was gained"
        else:
            own = [i for turn in trajectory.turns for i in turn.token_ids]
            new = after.ids[len(before.ids) :]
            assert list(new) == own[: len(new)]
            asked = trajectory.info["queries"] - sum(t.speaker == "policy" for t in before.turns)
            assert sum(t.speaker == "policy" for t in after.turns[len(before.turns) :]) == min(1, asked)
        parts = detail.scores[k].parts
        assert detail.scores[k].value == pytest.approx(parts["outcome"] + parts["j_after"] - parts["j_before"])
        assert parts["outcome"] == parts["right"]
    assert "reward/progress" in row


def test_all_new_episodes_can_count():
    prover = Recorder()
    run = trainer(prover, bonus_episodes=None, alpha=0.5)
    _, detail = run.train_step()
    run.close()
    gained = 0
    for k, trajectory in enumerate(detail.trajectories):
        (_, before), (_, after) = prover.pairs[2 * k : 2 * k + 2]
        asked = trajectory.info["queries"] - sum(t.speaker == "policy" for t in before.turns)
        new = sum(t.speaker == "policy" for t in after.turns[len(before.turns) :])
        assert new == (0 if trajectory.info["terminated"] else asked)
        gained = max(gained, new)
        parts = detail.scores[k].parts
        assert detail.scores[k].value == pytest.approx(parts["outcome"] + 0.5 * (parts["j_after"] - parts["j_before"]))
    assert gained > 1


def test_only_tokens_behind_the_cut_are_trained():
    run = trainer(Recorder())
    _, detail = run.train_step()
    run.close()
    experience = detail.experience
    for b, trajectory in enumerate(detail.trajectories):
        prompt, response = experience.items[b]
        assert prompt == trajectory.prompt_ids and len(response) == len(trajectory)
        cut = trajectory.task.meta["cut"]
        assert (
            tuple(prompt[len(prompt) - len(cut.ids) - int(trajectory.info["terminated"]) :][: len(cut.ids)]) == cut.ids
        )
    assert len(set(experience.group.tolist())) == 3


def test_it_trains_and_repeats_itself():
    histories = []
    for _ in range(2):
        run = trainer(credit="termination_relative", world={"episodes": 1})
        before = {k: v.clone() for k, v in run.policy.model.state_dict().items()}
        histories.append(run.fit().history)
        run.close()
    first, second = histories
    assert any("loss" in r for r in first) and all(math.isfinite(r.get("loss", 0.0)) for r in first)

    def plain(rows):
        return [repr({k: v for k, v in r.items() if not k.startswith(("time/", "tokens_per_s/"))}) for r in rows]

    assert plain(first) == plain(second)
    assert any(not torch.equal(before[k], v) for k, v in run.policy.model.state_dict().items())


def test_a_failed_trace_gives_the_empty_prefix():
    run = trainer(Recorder())
    import numpy as np

    failed = Trajectory(run.tasks[0], (), StopReason.ERROR, info={})
    assert run._choose(failed, np.random.default_rng(0)) == Cut()
    run.close()


def test_wrong_settings_are_named():
    for options, said in (
        ({"bonus_episodes": 0}, "bonus_episodes"),
        ({"terminate": 1.0}, "terminate"),
    ):
        with pytest.raises(ConfigError, match=said):
            trainer(Recorder(), **options)
    policy = asking_policy()
    with pytest.raises(ConfigError, match="Continued"):
        MrtTrainer(
            policy, TransformersEngine(policy), MetaBandit(2), bandit_tasks(3), RightCode(),
            OnlineConfig(prompts_per_step=2), prover=Recorder(), cuts=cuts,
        )  # fmt: skip


# The supervised form --------------------------------------------------------------------------------------------------


class Answer:
    def __init__(self, text: str):
        self.text, self.token_ids = text, (100, 101) if text == "right" else (7,)


class Known:
    """J by the number of turns before the cut, and one right answer among two."""

    def __init__(self, j):
        self.j = j

    def verify(self, task, answer):
        return answer.text == "right"

    def estimate(self, pairs):
        return [
            Estimate(self.j[t.id][len(c.turns) // 2] * 4, 4, samples=(Answer("wrong"), Answer("right")))
            for t, c in pairs
        ]


def traces(name: str, n: int = 1) -> Group:
    turns = tuple(
        Turn("policy", f"p{k}", (10 + k,), (0.0,)) if k % 2 == 0 else Turn("environment", "e", (50,)) for k in range(5)
    )
    task = Task(name, "q")
    return Group(task, tuple(Trajectory(task, turns, StopReason.DONE, prompt_ids=(1, 2)) for _ in range(n)))


def closing(cut):
    return (90, 91), (1, 0)


def test_the_best_right_trace_is_cut_where_progress_ends_and_answered():
    (example,) = star_examples([traces("t")], [Score(1.0)], Known({"t": [0.25, 1.0, 0.5]}), turn_cuts, closing=closing)
    assert example.prompt_ids == (1, 2)
    assert example.response_ids == (10, 50, 90, 91, 100, 101)
    assert example.mask == (1, 0, 1, 0, 1, 1)


def test_problems_without_a_right_trace_or_enough_progress_are_left_out():
    prover = Known({"a": [0.25, 0.5, 0.75], "b": [0.5, 0.5, 0.5]})
    groups = [traces("a", 2), traces("b")]
    scores = [Score(0.0), Score.invalid("no"), Score(1.0)]
    assert [e.response_ids[:1] for e in star_examples(groups, scores, prover, turn_cuts, closing=closing)] == [(90,)]
    assert star_examples(groups, scores, prover, turn_cuts, closing=closing, least=0.1) == []
    assert star_examples([], [], prover, turn_cuts, closing=closing) == []


# Every episode of whole traces -----------------------------------------------------------------------------------------


def test_every_episode_is_paid_its_own_progress_on_its_own_tokens():
    class ByTurns(Recorder):
        def values(self, pairs, **options):
            return torch.tensor([[0.25, 1.0, 0.5][len(c.turns) // 2] for _, c in pairs], dtype=torch.float64)

    prover = ByTurns()
    group = traces("t", 2)
    reward = EpisodeProgress(
        lambda ts: [Score(1.0, parts={"a": 1.0}), Score.invalid("no")], prover, turn_cuts, on_error="drop"
    )
    good, bad = reward(group.trajectories)
    assert good.value == 1.0 and good.steps == (0.75, -0.5), "own differences, not the telescoped sum"
    assert [(s.start, s.stop) for s in good.step_spans] == [(0, 1), (2, 3)]
    assert good.parts == {"a": 1.0, "j_first": 0.25, "j_last": 0.5} and prover.resets == 1
    assert not bad.valid and reward.gives == {"outcome", "steps"}


def test_an_unknown_value_makes_the_score_invalid():
    class Unknown(Recorder):
        def values(self, pairs, **options):
            return torch.full((len(pairs),), math.nan, dtype=torch.float64)

    reward = EpisodeProgress(lambda ts: [Score(1.0)] * len(ts), Unknown(), turn_cuts, on_error="drop")
    score = reward(traces("t").trajectories)[0]
    assert not score.valid and "no known value" in score.reason
