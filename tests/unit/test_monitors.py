"""Monitors of a batch, and the sequence KL in two ways."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError
from guerdon.evaluation import MONITORS, SequenceKl, experience_kl, text_monitors
from guerdon.policies import tiny_policy, train_bpe
from guerdon.types import StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)


def said(
    text: str, *, task: str = "t", prompt: str = "say it", ids=(), logprobs=None, stop=StopReason.EOS
) -> Trajectory:
    return Trajectory(Task(task, prompt), (Turn("policy", text, ids, logprobs),), stop, prompt_ids=(1,))


def test_monitors_by_hand():
    row = text_monitors(
        [
            said("a b a b", ids=(1, 2, 3), logprobs=(-1.0, -2.0, -3.0)),
            said("say it", ids=(1,), logprobs=(-2.0,), stop=StopReason.LENGTH),
            said("  "),
            said("a b a b", task="other"),
            said("a b a b"),
        ],
        ngram=2,
    )
    assert set(row) == set(MONITORS)
    assert row["length"] == pytest.approx((3 + 1 + 0 + 4 + 4) / 5)  # words where there are no ids
    assert row["length_max"] == 4
    assert row["repetition"] == pytest.approx(3 * (1 / 3) / 5)
    assert row["copying"] == pytest.approx(1 / 5)
    assert row["truncated"] == row["empty"] == pytest.approx(1 / 5)
    assert row["duplicates"] == pytest.approx(1 / 5)  # the same text for another task is none
    assert row["entropy"] == pytest.approx(2.0)


def test_an_empty_batch_is_nan_and_an_unknown_entropy_too():
    assert all(math.isnan(v) for v in text_monitors([]).values())
    row = text_monitors([said("a")])
    assert math.isnan(row["entropy"]) and row["length"] == 1


def test_environment_text_and_tokens_are_not_the_policys():
    turns = (
        Turn("policy", "a ", (1,), (-1.0,)),
        Turn("environment", "b b b b ", (2, 3, 4)),
        Turn("policy", "c", (5,), (-3.0,)),
    )
    row = text_monitors([Trajectory(Task("t", "b b"), turns, StopReason.DONE)], ngram=1)
    assert row["length"] == 2 and row["repetition"] == 0 and row["copying"] == 0 and row["entropy"] == 2.0


def test_prompts_of_several_messages_and_parts():
    prompt = ({"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "x y"}]})
    trajectory = Trajectory(Task("t", prompt), (Turn("policy", "be brief y x"),), StopReason.EOS)
    assert text_monitors([trajectory], ngram=2)["copying"] == pytest.approx(1 / 3)


# KL --------------------------------------------------------------------------------------------------------------------


def experience(**values):
    base = {
        "sampled": torch.tensor([-1.0, -2.0, float("nan"), -1.0]),
        "old": None,
        "reference": torch.tensor([-2.0, -2.5, float("nan"), -9.0]),
        "action": np.array([True, True, False, True]),
        "trajectory": np.array([0, 0, 0, 1]),
        "kept": np.array([True, True, False]),
    }

    class Fake(SimpleNamespace):
        def __len__(self):
            return 3

    return Fake(**{**base, **values})


def test_experience_kl_sums_policy_tokens_of_kept_trajectories():
    assert experience_kl(experience()) == pytest.approx((1.0 + 0.5 + 8.0) / 2)
    assert experience_kl(experience(old=torch.tensor([-2.0, -2.5, 0.0, -9.0]))) == 0.0
    assert math.isnan(experience_kl(experience(reference=None)))
    assert math.isnan(experience_kl(experience(kept=np.zeros(3, bool), action=np.zeros(4, bool))))


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(train_bpe(["ab"], 300, atoms=()), hidden=16, layers=1, heads=2, max_context=32)


def scored(policy, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
    """Slow reference: the model's own logits, one position at a time, in float64."""
    out = []
    for k in range(len(ids)):
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt, *ids[:k]]])).logits[0, -1].double() / temperature
        out.append(float(torch.log_softmax(logits, -1)[ids[k]]))
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sequence_kl_is_the_mean_of_summed_differences(policy, temperature):
    prompt, expected, items = [5, 6, 7], [], []
    for ids, logprobs in (([10, 11], (-1.0, -2.0)), ([12], (-0.5,))):
        expected.append(sum(logprobs) - sum(scored(policy, prompt, ids, temperature)))
        turn = Turn("policy", "x", tuple(ids), logprobs)
        items.append(Trajectory(Task("t", "p"), (turn,), StopReason.EOS, prompt_ids=tuple(prompt)))
    policy.model.train()
    assert SequenceKl(policy, temperature=temperature)(items) == pytest.approx(np.mean(expected), abs=1e-4)
    assert not policy.model.training


def test_environment_tokens_are_context_only(policy):
    prompt, ids = [5, 6], [10, 20, 21, 11]
    turns = (
        Turn("policy", "x", (10,), (-1.0,)),
        Turn("environment", "y", (20, 21)),
        Turn("policy", "z", (11,), (-2.0,)),
    )
    full = scored(policy, prompt, ids, 1.0)
    trajectory = Trajectory(Task("t", "p"), turns, StopReason.EOS, prompt_ids=tuple(prompt))
    assert SequenceKl(policy)([trajectory]) == pytest.approx(-3.0 - full[0] - full[3], abs=1e-4)


def test_sequence_kl_without_records_is_nan(policy):
    bare = Trajectory(Task("t", "p"), (Turn("policy", "words"),), StopReason.EOS, prompt_ids=(1,))
    silent = Trajectory(Task("t", "p"), (), StopReason.EOS, prompt_ids=(1,))
    half = Trajectory(
        Task("t", "p"), (Turn("policy", "x", (1,), (-1.0,)), Turn("policy", "y", (2,))), StopReason.EOS, prompt_ids=(1,)
    )
    assert math.isnan(SequenceKl(policy)([bare, silent, half])) and math.isnan(SequenceKl(policy)([]))
    for options in ({"temperature": 0.0}, {"temperature": math.inf}, {"max_tokens": 0}):
        with pytest.raises(ConfigError):
            SequenceKl(policy, **options)
