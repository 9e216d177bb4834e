"""Format and length as stand-ins for a missing answer key: the gated sum of both, and the controls beside it.

Source: Xin et al. 2025, "Surrogate Signals from Format and Length" (arXiv 2505.19439) and its released code.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, RewardError
from guerdon.rewards.answer import gold_answers
from guerdon.rewards.base import OnError, Progress, Reward, as_reward
from guerdon.rewards.expression import is_expression, same_answer
from guerdon.rewards.grammar import extract_answer
from guerdon.rewards.length import Count, HumpLength
from guerdon.rewards.plain import RewardBatch, TextReward
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["BoxedFormat", "BoxedMatch", "GatedSum", "extract_answer", "format_length", "gated_sum"]


def gated_sum(gate_B: Tensor, bonus_B: Tensor, gate_weight: float = 1.0) -> Tensor:
    """``gate_weight * gate + bonus`` where the gate is 1, ``min(0, bonus)`` where it is 0.

    Args:
        gate_B: any shape, 0 or 1.
        bonus_B: the same shape.
        gate_weight: 1 as the paper writes it; 0.5 is what its released code pays.

    Raises:
        ConfigError: a weight that is negative or not finite.
        ValueError: shapes differ, a gate other than 0 and 1, a bonus that is NaN or infinite.

    Source: Xin et al. 2025 (arXiv 2505.19439), total reward: text without a readable answer earns nothing by its
    length but still pays for being too long.
    """
    if isinstance(gate_weight, bool) or not 0.0 <= gate_weight < float("inf"):
        raise ConfigError(f"gate_weight must be finite and at least 0, got {gate_weight!r}")
    if gate_B.shape != bonus_B.shape:
        raise ValueError(f"gate {tuple(gate_B.shape)} and bonus {tuple(bonus_B.shape)} must have one shape")
    if not bool(((gate_B == 0) | (gate_B == 1)).all()):
        raise ValueError("the gate must be 0 or 1 everywhere")
    if not bool(torch.isfinite(bonus_B).all()):
        raise ValueError("the bonus must be finite everywhere")
    return torch.where(gate_B == 1, bonus_B + gate_weight, bonus_B.clamp(max=0.0))


class BoxedFormat(TextReward):
    """1 where :func:`extract_answer` finds something that parses as mathematics, else 0; never whether it is right.

    Args:
        validate: ``"sympy"`` accepts the language that SymPy reads, by a parser that evaluates nothing and takes
            linear time (:func:`~guerdon.rewards.expression.is_expression`). Or a function of the extracted answer;
            what it raises means 0, and is counted in :attr:`failures`.
        timeout: seconds for a function of yours, then 0, counted too. It runs in a thread of its own, which is
            abandoned then.

    A score's parts are ``extracted``, and for a function of yours ``timed_out`` and ``raised``.

    Source: Xin et al. 2025 (arXiv 2505.19439), format reward.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        validate: Callable[[str], Any] | Literal["sympy"] = "sympy",
        timeout: float = 1.0,
        *,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if validate != "sympy" and not callable(validate):
            raise ConfigError(f"validate must be 'sympy' or a function of the answer, got {validate!r}")
        if not 0 < timeout < float("inf"):
            raise ConfigError(f"timeout must be positive and finite, got {timeout}")
        self._validate = None if isinstance(validate, str) else validate
        self._seconds = timeout

    def score_text(self, text: str) -> Score:
        answer = extract_answer(text)
        if not answer.strip():
            return Score(0.0, parts={"extracted": 0.0})
        if self._validate is None:
            return Score(float(is_expression(answer)), parts={"extracted": 1.0})
        said, failure = _within(self._seconds, self._validate, answer)
        if failure is None:
            return Score(float(bool(said)), parts={"extracted": 1.0})
        self.failures[f"validate {failure}"] += 1
        return Score(0.0, parts={"extracted": 1.0, failure: 1.0})


class BoxedMatch(Reward):
    """1 where the extracted answer equals a gold answer, else 0: the baseline that does see the key.

    Equal are answers after :func:`~guerdon.rewards.expression.normalise_expression`, and equal numbers (``0.5``,
    ``1/2``, ``\\frac{1}{2}``). The part ``extracted`` says whether there was an answer at all.
    """

    range = (0.0, 1.0)

    def score_one(self, trajectory: Trajectory) -> Score:
        golds = gold_answers(trajectory.task.reference, trajectory.task.id)
        answer = extract_answer(policy_text(trajectory))
        right = any(same_answer(answer, gold) for gold in golds)
        return Score(float(right), parts={"extracted": float(bool(answer.strip()))})


class GatedSum(Reward):
    """:func:`gated_sum` of two rewards: ``GatedSum(BoxedFormat(), HumpLength(1024))``.

    Args:
        gate: gives 0 or 1; anything else is an error.
        bonus: paid in full where the gate is open, only as a penalty where it is closed.
        gate_weight: 1.0 (paper) or 0.5 (released code).

    A score's parts hold both values; an invalid term makes the sum invalid, and ``on_error`` says what follows.
    ``reward(texts, lengths)`` takes plain responses and their numbers of tokens, and gives a
    :class:`~guerdon.rewards.plain.RewardBatch`; there any function of texts and any of lengths will do.
    """

    def __init__(
        self,
        gate: Callable[..., Any],
        bonus: Callable[..., Any],
        gate_weight: float = 1.0,
        *,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        for what, term in (("gate", gate), ("bonus", bonus)):
            if not callable(term):
                raise ConfigError(f"{what} must be a reward, got {type(term).__name__}")
        gated_sum(torch.zeros(0), torch.zeros(0), gate_weight)
        self.gate, self.bonus, self.gate_weight = gate, bonus, gate_weight
        low, high = getattr(bonus, "range", Reward.range)
        self.range = (min(0.0, low), max(0.0, gate_weight + high))

    def __call__(self, trajectories: Sequence[Any], lengths: Any = None, *, progress: Progress | None = None) -> Any:
        """Scores of trajectories; or, with ``lengths`` (tokens, ``[B]``), the batch of plain texts."""
        if lengths is None:
            return super().__call__(trajectories, progress=progress)
        if len(trajectories) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths for {len(trajectories)} texts")
        gate, bonus = (
            torch.as_tensor(np.asarray(values, dtype=np.float64))
            for values in (self.gate(trajectories), self.bonus(lengths))
        )
        total = gated_sum(gate, bonus, self.gate_weight)
        return RewardBatch(total.numpy(), {"gate": gate.numpy(), "bonus": bonus.numpy()})

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> list[Score]:
        """One score per trajectory, the two terms among its parts."""
        terms = [as_reward(part).assess(trajectories, progress=progress)[0] for part in (self.gate, self.bonus)]
        return [self._one(t, gate, bonus) for t, gate, bonus in zip(trajectories, *terms, strict=True)]

    def _one(self, trajectory: Trajectory, gate: Score, bonus: Score) -> Score:
        parts = {"gate": gate.value, "bonus": bonus.value}
        for key, score in (("gate", gate), ("bonus", bonus)):
            parts.update({f"{key}/{name}": value for name, value in score.parts.items()})
        bad = next((s for s in (gate, bonus) if not s.valid), None)
        if bad is not None:
            return Score.invalid(bad.reason or "a term is invalid", **parts)
        if gate.value not in (0.0, 1.0):
            raise RewardError(f"the gate gave {gate.value} for task {trajectory.task.id!r}; it must give 0 or 1")
        opened, paid = (torch.tensor(s.value, dtype=torch.float64) for s in (gate, bonus))
        return Score(float(gated_sum(opened, paid, self.gate_weight)), parts=parts)

    def state_dict(self) -> dict[str, Any]:
        """State of the terms that have one."""
        return {
            key: part.state_dict()
            for key, part in (("gate", self.gate), ("bonus", self.bonus))
            if hasattr(part, "state_dict")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the terms."""
        for key, part in state.items():
            getattr(self, key).load_state_dict(part)


def format_length(
    max_len: float,
    p: float = 0.5,
    shape: Literal["quadratic", "polyline"] = "quadratic",
    *,
    format_weight: float = 1.0,
    count: Count | None = None,
) -> GatedSum:
    """The paper's reward: :class:`BoxedFormat` as the gate, :class:`~guerdon.rewards.length.HumpLength` as the bonus.

    Args:
        max_len, p, shape, count: of the length reward; the paper's budget is 3072 tokens.
        format_weight: 1.0 (paper, total in [-1, 2]) or 0.5 (released code).
    """
    return GatedSum(BoxedFormat(), HumpLength(max_len, p, shape, count=count), format_weight, name="format_length")


def _within(seconds: float, function: Callable[[str], Any], text: str) -> tuple[Any, str | None]:
    """What ``function`` returns within ``seconds``, or how it failed."""
    box: queue.SimpleQueue[tuple[Any, str | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((function(text), None))
        except Exception:  # noqa: BLE001  a validator refuses by raising; it is counted
            box.put((False, "raised"))

    threading.Thread(target=work, daemon=True).start()
    try:
        return box.get(timeout=seconds)
    except queue.Empty:
        return False, "timed_out"
