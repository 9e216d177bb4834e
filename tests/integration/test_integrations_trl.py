"""Rewards inside TRL's own trainer, for real: GRPO steps of a tiny policy on a CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import guerdon as gd
from guerdon.errors import RewardError

pytest.importorskip("trl", reason="TRL is not installed: pip install 'guerdon[integrations]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'guerdon[integrations]'")

pytestmark = pytest.mark.integration

ROWS = [{"prompt": f"Count {k}.", "answer": "e", "level": k} for k in range(4)]
CHAT = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]


def train(tmp_path: Path, functions: Any, rows: Any = ROWS, steps: int = 2, **settings: Any) -> Any:
    """A trainer after its steps; every group has 4 completions of 8 tokens."""
    from trl import GRPOConfig, GRPOTrainer

    from guerdon.policies.tiny import tiny_policy

    policy = tiny_policy(hidden=32, layers=1, heads=2)
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=steps, num_generations=4, per_device_train_batch_size=4,
        max_completion_length=8, learning_rate=1e-2, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", logging_steps=1, seed=1, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=policy.model,
        reward_funcs=functions,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    trainer.train()
    return trainer


def logs(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["plain", "chat"])
def test_grpo_learns_from_a_reward(tmp_path: Path, rows: Any) -> None:
    seen: list[Any] = []

    @gd.reward(range=(0, 1))
    def letters(completion: str, reference: str, level: int, progress: Any = None) -> float:
        seen.append((completion, reference, level, progress))
        return completion.count(reference) / max(1, len(completion))

    total = letters + 0.1 * gd.rewards.TagFormat("answer")
    trainer = train(tmp_path, [gd.integrations.trl(total)], rows)
    assert trainer.state.global_step == 2 and len(seen) == 8
    assert all(isinstance(c, str) and r == "e" and 0 <= level < 4 for c, r, level, _ in seen)
    assert [p.step for *_, p in (seen[0], seen[-1])] == [0, 1] and seen[0][-1].total == 2
    rewards = logs(trainer, "rewards/letters___TagFormat/mean")
    assert len(rewards) == 2 and all(0 <= r <= 1.1 for r in rewards)
    assert logs(trainer, "reward") == pytest.approx(rewards)
    # the first step's mean is that of what the reward gave for the four completions it was shown
    values = [
        c.count("e") / max(1, len(c)) + 0.1 * gd.rewards.TagFormat("answer").text(completion=c).value for c, *_ in seen
    ]
    assert rewards == pytest.approx([sum(values[:4]) / 4, sum(values[4:]) / 4], abs=1e-6)


def test_several_rewards_have_columns_of_their_own(tmp_path: Path) -> None:
    functions = [
        gd.integrations.trl(gd.rewards.ExactMatch()),
        gd.integrations.trl(gd.rewards.TagFormat("answer"), reference="answer"),
    ]
    trainer = train(tmp_path, functions, steps=1, reward_weights=[1.0, 0.2])
    for name in ("ExactMatch", "TagFormat"):
        assert len(logs(trainer, f"rewards/{name}/mean")) == 1


def test_a_dropped_reward_is_left_out_and_is_no_zero(tmp_path: Path) -> None:
    """TRL takes a row without any reward out of its group's mean; before 1.16 that row counted as 0."""
    calls: list[int] = []

    @gd.reward(on_error="drop")
    def half(completion: str) -> float | None:
        calls.append(1)
        return None if len(calls) % 2 else 5.0

    trainer = train(tmp_path, gd.integrations.trl(half), steps=1)
    assert logs(trainer, "reward") == [pytest.approx(5.0)] and logs(trainer, "rewards/half/mean") == [5.0]
    assert half.failures["none"] == 2 and math.isfinite(logs(trainer, "loss")[0])


def test_a_failing_reward_stops_the_run_and_says_where(tmp_path: Path) -> None:
    @gd.reward
    def broken(completion: str) -> float:
        raise ValueError("no such thing")

    with pytest.raises(RewardError, match=r"'broken' raised ValueError.*completion 0"):
        train(tmp_path, gd.integrations.trl(broken), steps=1)
