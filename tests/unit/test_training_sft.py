"""Supervised fine-tuning: the loss is right, masks hold, it learns, it resumes exactly."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import DataError
from guerdon.policies import tiny_policy
from guerdon.training import SftConfig, SftTrainer, TrainingError
from guerdon.training.data import batch_indices
from guerdon.training.sft import examples
from guerdon.training.toys import WORDS, toy_texts
from guerdon.types import StopReason, Task, Trajectory, Turn


def small_policy(seed: int = 0):
    return tiny_policy(texts=toy_texts(), hidden=32, layers=2, heads=2, seed=seed)


def word_data(policy, repeats: int = 4) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt "say w", response "w" preceded by environment tokens that must not be learned."""
    noise = policy.encode("hint:")
    out = []
    for word in WORDS * repeats:
        said = policy.encode(f" {word}")
        out.append((policy.encode(f"say {word}"), noise + said, [0] * len(noise) + [1] * len(said)))
    return out


def config(**values) -> SftConfig:
    return SftConfig(**{"steps": 6, "batch_size": 5, "optimiser": {"lr": 1e-2}, **values})


def weights(policy) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in policy.model.state_dict().items()}


def test_loss_is_the_mean_negative_log_probability_of_policy_tokens() -> None:
    policy = small_policy()
    data = word_data(policy, 1)
    total, count = 0.0, 0
    for prompt, response, mask in data:
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + response])).logits[0].double()
        logs = torch.log_softmax(logits, -1)
        for t, (token, learned) in enumerate(zip(response, mask, strict=True)):
            if learned:
                total -= float(logs[len(prompt) - 1 + t, token])
                count += 1
    history = SftTrainer(policy, data, config(steps=1, batch_size=len(data))).fit().history
    assert history[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert history[0]["tokens"] == count


def test_it_learns_the_words() -> None:
    policy = small_policy()
    history = SftTrainer(policy, word_data(policy), config(steps=60, batch_size=16)).fit().history
    assert history[0]["loss"] > 1.0
    assert history[-1]["loss"] < 0.05


def test_micro_batches_do_not_change_the_result() -> None:
    runs = []
    for limit in (8192, 20):
        policy = small_policy()
        SftTrainer(policy, word_data(policy), config(max_tokens_per_microbatch=limit)).fit()
        runs.append(weights(policy))
    for key in runs[0]:
        # Adam divides a gradient by its size, so that rounding shows: 1% of one step of 1e-2 is allowed.
        torch.testing.assert_close(runs[0][key], runs[1][key], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path) -> None:
    whole = small_policy()
    SftTrainer(whole, word_data(whole), config(save_every=2), out=tmp_path / "whole").fit()
    for steps in (1, 3, None):
        part = small_policy()
        result = SftTrainer(part, word_data(part), config(save_every=2), out=tmp_path / "part").fit(steps)
    assert result.step == 6
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(part)[key]), key


def test_a_loss_that_is_not_finite_stops_without_touching_weights_or_checkpoints(tmp_path) -> None:
    policy = small_policy()
    run = SftTrainer(policy, word_data(policy), config(steps=3, save_every=1), out=tmp_path)
    run.fit(1)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(math.nan)
    before = weights(policy)
    with pytest.raises(
        TrainingError, match="step 2: the loss is nan; no weight was changed and no checkpoint was written"
    ):
        run.fit()
    for key, value in weights(policy).items():
        assert torch.equal(value.isnan(), before[key].isnan())
    assert [p.name for p in run.checkpoints.paths()] == ["step-00000001"]  # type: ignore[union-attr]
    healthy = small_policy()
    assert SftTrainer(healthy, word_data(healthy), config(steps=3, save_every=1), out=tmp_path).fit().step == 3


def test_trajectories_are_data_too() -> None:
    turns = (Turn("policy", "a", (5, 6), (0.0, 0.0)), Turn("environment", "b", (7,)), Turn("policy", "c", (8,)))
    trajectory = Trajectory(Task("t", "q"), turns, StopReason.DONE, prompt_ids=(1, 2))
    (example,) = examples([trajectory])
    assert (example.prompt_ids, example.response_ids, example.mask) == ((1, 2), (5, 6, 7, 8), (1, 1, 0, 1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "the data is empty"),
        ([([1], [2, 3], [1])], "mask has 1 entries for 2 response tokens"),
        ([([1], [2], [0])], "no response token is to be learned"),
        ([([], [2], [1])], "the prompt has no tokens"),
        ([([1] * 10_000, [2], [1])], "has 10001 tokens, the policy's context holds"),
    ],
)
def test_bad_data_is_refused_by_number(data, words: str) -> None:
    with pytest.raises(DataError, match=words):
        SftTrainer(small_policy(), data, config())


def test_every_epoch_is_a_permutation_and_depends_on_seed_and_step_alone() -> None:
    first = [i for step in range(4) for i in batch_indices(10, 3, step, seed=1, drop_last=False)]
    assert sorted(first) == list(range(10))
    second = [i for step in range(4, 8) for i in batch_indices(10, 3, step, seed=1, drop_last=False)]
    assert sorted(second) == list(range(10)) and first != second
    assert [len(batch_indices(10, 3, s, seed=1, drop_last=True)) for s in range(6)] == [3] * 6
    assert (batch_indices(10, 3, 5, seed=1, drop_last=True) == batch_indices(10, 3, 5, seed=1, drop_last=True)).all()
