"""Rewards that lie, and a bonus that repairs some of the lies: group flips, fallbacks, calibration of low scores.

Source of everything here: Lv et al. 2025, "The Climb Carves Wisdom Deeper Than the Summit" (arXiv 2505.22653).
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["CalibrateLow", "Fallback", "FlipScores", "GroupFlip", "calibrate_low", "fallback", "flip", "warm_up"]


def flip(outcome_B: Tensor, flipped_B: Tensor, extracted_B: Tensor) -> Tensor:
    """``1 - outcome`` where flipped, ``outcome`` elsewhere; 0 wherever no answer was extracted.

    With flips of probability p that are shared by a prompt's samples, a right sample earns ``1 - 2p`` more than a
    wrong one in expectation: nothing at p = 0.5.

    Args:
        outcome_B: any shape, 0 or 1.
        flipped_B: bool, the same shape.
        extracted_B: bool, the same shape.

    Raises:
        ValueError: shapes differ, or an outcome is neither 0 nor 1.
    """
    _same_shape(outcome=outcome_B, flipped=flipped_B, extracted=extracted_B)
    _check_outcome(outcome_B)
    turned = torch.where(flipped_B.bool(), 1 - outcome_B, outcome_B)
    return torch.where(extracted_B.bool(), turned, torch.zeros_like(turned))


def fallback(primary_B: Tensor, secondary_B: Tensor, extracted_B: Tensor | None = None) -> Tensor:
    """``secondary`` where ``primary`` is exactly 0, else ``primary``; 0 wherever no answer was extracted.

    After :func:`flip` this is the paper's "pattern reward for wrong answers": an answer judged right (truly or by a
    flip) earns 1, one judged wrong earns its pattern reward.

    Args:
        primary_B: any shape, finite.
        secondary_B: the same shape, finite.
        extracted_B: bool, the same shape; ``None`` takes every answer as extracted.

    Raises:
        ValueError: shapes differ, or a value is NaN or infinite.
    """
    _same_shape(primary=primary_B, secondary=secondary_B, extracted=extracted_B)
    _finite(primary=primary_B, secondary=secondary_B)
    out = torch.where(primary_B == 0, secondary_B, primary_B)
    return out if extracted_B is None else torch.where(extracted_B.bool(), out, torch.zeros_like(out))


def warm_up(first_B: Tensor, then_B: Tensor, step: int, steps: float) -> Tensor:
    """``first`` during the first ``steps`` training steps (counted from 0), ``then`` afterwards.

    ``first`` being the pattern reward and ``then`` the outcome, ``steps=math.inf`` is the pattern reward alone and
    0 the outcome alone.

    Raises:
        ConfigError: ``steps`` is negative or NaN.
        ValueError: shapes differ, or the step is negative.
    """
    if math.isnan(steps) or steps < 0:
        raise ConfigError(f"steps must be at least 0 (inf: always), got {steps}")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    _same_shape(first=first_B, then=then_B)
    return first_B if step < steps else then_B


def calibrate_low(
    base_B: Tensor,
    bonus_B: Tensor,
    valid_B: Tensor,
    *,
    alpha: float = 0.1,
    tau: float = 0.5,
    cap: float = 1.0,
    squash: Literal["none", "sigmoid"] = "none",
    pay_invalid: bool = False,
) -> Tensor:
    """Add a small bonus to the scores of a reward model that lie strictly under a threshold.

    With ``u = base * valid``: ``min(cap, u + alpha * bonus)`` where ``u < tau``, else ``u``. The bonus may lift a
    response above one that needed none (u = 0.49 becomes 0.59): that is the published rule.

    Args:
        base_B: any shape, scores of the reward model; may be NaN where not valid.
        bonus_B: the same shape, in [0, 1], as the pattern reward is.
        valid_B: bool, the same shape: the response could be parsed.
        alpha: size of the bonus.
        tau: threshold.
        cap: most that a lifted score may be.
        squash: how scores become numbers in [0, 1]. ``"none"``: they are so already, which is checked;
            ``"sigmoid"``: they are logits. The paper leaves this open.
        pay_invalid: pay the bonus to responses that could not be parsed too, which the formula taken literally
            does. By default they get 0: a pattern reward is for responses with an answer.

    Returns:
        the calibrated scores; gradients flow to ``base`` and ``bonus``.

    Raises:
        ConfigError: alpha negative, tau or cap not finite, cap below tau, an unknown ``squash``.
        ValueError: shapes differ, a valid score outside [0, 1] with ``squash="none"``, a bonus outside [0, 1], NaN.
    """
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"alpha must be finite and at least 0, got {alpha}")
    if not (math.isfinite(tau) and math.isfinite(cap) and tau <= cap):
        raise ConfigError(f"tau and cap must be finite and tau <= cap, got tau={tau}, cap={cap}")
    if squash not in ("none", "sigmoid"):
        raise ConfigError(f"squash must be 'none' or 'sigmoid', got {squash!r}")
    _same_shape(base=base_B, bonus=bonus_B, valid=valid_B)
    valid = valid_B.bool()
    known = torch.where(valid, base_B, torch.zeros_like(base_B))
    _finite(base=known, bonus=bonus_B)
    if not bool(((bonus_B >= 0) & (bonus_B <= 1)).all()):
        raise ValueError("the bonus must lie in [0, 1]")
    if squash == "sigmoid":
        known = torch.where(valid, torch.sigmoid(known), torch.zeros_like(known))
    elif not bool(((known >= 0) & (known <= 1)).all()):
        raise ValueError("base scores must lie in [0, 1]; map them with squash='sigmoid' where they are logits")
    lifted = (known + alpha * bonus_B).clamp(max=cap)
    low = known < tau
    return torch.where(low if pay_invalid else low & valid, lifted, known)


class GroupFlip:
    """Turns the outcomes of whole prompt groups around, each with probability ``p``.

    One number is drawn per group of a call, in the order in which groups first appear, from a generator that is part
    of :meth:`state_dict`; with ``p = 0``, or outside training, none is drawn.

    Args:
        p: in [0, 1]; at 0.5 the outcome carries no information.
        seed: of the generator; ``None`` takes one from the system, which :attr:`seed` then tells.

    Attributes:
        counts: ``groups`` seen and ``flipped`` since the beginning.
        last: which group of the last training call was flipped.

    Source: Lv et al. 2025 (arXiv 2505.22653), noise on rule rewards. All samples of a prompt share the flip; one
    per sample would be another, milder noise under group-relative advantages.
    """

    def __init__(self, p: float, seed: int | None = None) -> None:
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0.0 <= p <= 1.0:
            raise ConfigError(f"p must be a probability in [0, 1], got {p!r}")
        self.p = float(p)
        self.seed = secrets.randbits(63) if seed is None else seed
        self._generator = np.random.Generator(np.random.PCG64(self.seed))
        self.counts: Counter[str] = Counter()
        self.last: dict[Hashable, bool] = {}

    def __call__(
        self,
        rewards: Tensor | np.ndarray | Sequence[float],
        group_ids: Tensor | np.ndarray | Sequence[Hashable],
        extracted: Tensor | np.ndarray | Sequence[bool],
        training: bool = True,
    ) -> Tensor:
        """See :func:`flip`.

        Args:
            rewards: ``[B]`` outcomes, 0 or 1; integers come back as float64.
            group_ids: ``[B]``, equal for the samples of one prompt, in any order.
            extracted: ``[B]``, whether an answer was found in the response.
            training: False flips nothing and draws nothing: evaluation is never noisy.

        Raises:
            ValueError: lengths differ, or an outcome is neither 0 nor 1 (nothing is drawn then).
        """
        outcome = _floats(rewards)
        ids = group_ids.tolist() if isinstance(group_ids, Tensor | np.ndarray) else list(group_ids)
        found = torch.as_tensor(extracted, device=outcome.device).bool()
        if outcome.ndim != 1 or len(ids) != len(outcome) or found.shape != outcome.shape:
            raise ValueError(
                f"rewards {tuple(outcome.shape)}, {len(ids)} group_ids and extracted {tuple(found.shape)} "
                "must be three lists of one length"
            )
        _check_outcome(outcome)
        flipped = self._draw(ids) if training else [False] * len(ids)
        return flip(outcome, torch.tensor(flipped, dtype=torch.bool, device=outcome.device), found)

    def _draw(self, group_ids: Sequence[Hashable]) -> list[bool]:
        self.last = {}
        for group in dict.fromkeys(group_ids):
            self.last[group] = self.p > 0 and bool(self._generator.random() < self.p)
        self.counts["groups"] += len(self.last)
        self.counts["flipped"] += sum(self.last.values())
        return [self.last[group] for group in group_ids]

    def state_dict(self) -> dict[str, Any]:
        """The generator, the counts, and the probability that they belong to."""
        return {"p": self.p, "generator": self._generator.bit_generator.state, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ConfigError: it belongs to another ``p``.
        """
        if state["p"] != self.p:
            raise ConfigError(f"the saved flips have p={state['p']!r}, these have p={self.p!r}")
        self._generator.bit_generator.state = state["generator"]
        self.counts = Counter(state["counts"])
        self.last = {}


class FlipScores:
    """:class:`GroupFlip` for scored trajectories: the ``shape`` of a training run, never of an evaluation.

    Args:
        p, seed: of the flips.
        wrong: a reward that is paid in place of 0 to what is judged wrong after the flip (the paper's pattern reward
            for wrong answers, :func:`fallback`).
        extracted: whether a response holds an answer; by default that is read from the score's part ``extracted``.
        group: what the samples of one prompt share; the task's id by default.

    A score keeps the true outcome as its part ``outcome``, and ``flipped`` as 0 or 1. Invalid scores pass unchanged,
    and draw nothing on their account. Only outcomes are flipped: a score with step or token values is refused.
    """

    def __init__(
        self,
        p: float,
        seed: int | None = 0,
        *,
        wrong: Callable[[Sequence[Trajectory]], Sequence[Score]] | None = None,
        extracted: Callable[[Trajectory], bool] | None = None,
        group: Callable[[Trajectory], Hashable] = lambda trajectory: trajectory.task.id,
    ) -> None:
        self.flips = GroupFlip(p, seed)
        self._wrong, self._extracted, self._group = wrong, extracted, group

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Return the scores with noise."""
        index = _outcomes(trajectories, scores)
        chosen = [trajectories[k] for k in index]
        groups = [self._group(t) for t in chosen]
        found = [_found(trajectories[k], scores[k], self._extracted) for k in index]
        noisy = self.flips([scores[k].value for k in index], groups, found)
        if self._wrong is not None:
            second = torch.tensor([s.value for s in self._wrong(chosen)], dtype=torch.float64)
            noisy = fallback(noisy, second, torch.tensor(found, dtype=torch.bool))
        out = list(scores)
        for k, group, value in zip(index, groups, noisy.tolist(), strict=True):
            flipped = float(self.flips.last[group])
            out[k] = scores[k].with_value(value, outcome=scores[k].value, flipped=flipped)
        return out

    def state_dict(self) -> dict[str, Any]:
        """State of the flips."""
        return self.flips.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.flips.load_state_dict(state)


class Fallback:
    """:func:`fallback` of two functions of texts: the second speaks where the first gives 0.

    Args:
        primary, secondary: from ``B`` texts to ``[B]`` numbers.
    """

    def __init__(self, primary: Callable[[Sequence[str]], Any], secondary: Callable[[Sequence[str]], Any]) -> None:
        self.primary, self.secondary = primary, secondary

    def __call__(self, texts: Sequence[str], extracted: Sequence[bool] | None = None) -> Tensor:
        """``[B]`` float64; 0 wherever ``extracted`` says that there is no answer."""
        first, second = (_floats(part(texts)).double() for part in (self.primary, self.secondary))
        return fallback(first, second, None if extracted is None else torch.as_tensor(extracted).bool())


class CalibrateLow:
    """:func:`calibrate_low` with a bonus that is computed from the texts, in training only.

    Args:
        bonus: from ``B`` texts to ``[B]`` numbers in [0, 1], for example
            ``PhraseReward(OPEN_PHRASES, stop_marker=None, think_tag=None)``.
        alpha, tau, cap, squash, pay_invalid: see :func:`calibrate_low`.

    :meth:`scores` is the same as the ``shape`` of a training run.
    """

    def __init__(
        self,
        bonus: Callable[[Sequence[str]], Any],
        alpha: float = 0.1,
        tau: float = 0.5,
        cap: float = 1.0,
        *,
        squash: Literal["none", "sigmoid"] = "none",
        pay_invalid: bool = False,
    ) -> None:
        self.bonus = bonus
        self._rule = partial(calibrate_low, alpha=alpha, tau=tau, cap=cap, squash=squash, pay_invalid=pay_invalid)
        empty = torch.zeros(0)
        self._rule(empty, empty, empty.bool())

    def __call__(
        self, base: Any, texts: Sequence[str], valid: Sequence[bool] | Tensor, training: bool = True
    ) -> Tensor:
        """Calibrate ``[B]`` scores; with ``training=False`` the bonus is neither computed nor paid."""
        score = _floats(base)
        if len(texts) != len(score):
            raise ValueError(f"{len(texts)} texts for {len(score)} base scores")
        bonus = _floats(self.bonus(texts)).to(score) if training else torch.zeros_like(score)
        return self._rule(score, bonus, torch.as_tensor(valid, device=score.device).bool())

    def scores(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Calibrate the scores of trajectories; their part ``extracted`` says whether a response could be parsed."""
        index = _outcomes(trajectories, scores)
        texts = [policy_text(trajectories[k]) for k in index]
        valid = [_found(trajectories[k], scores[k], None) for k in index]
        calibrated = self([scores[k].value for k in index], texts, valid).tolist()
        out = list(scores)
        for k, value in zip(index, calibrated, strict=True):
            out[k] = scores[k].with_value(value, uncalibrated=scores[k].value)
        return out


def _outcomes(trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[int]:
    """Indices of the valid scores, all of which must be plain outcomes."""
    if len(trajectories) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(trajectories)} trajectories")
    index = [k for k, score in enumerate(scores) if score.valid]
    if any(scores[k].steps is not None or scores[k].tokens is not None for k in index):
        raise ValueError("a score with step or token values cannot be changed by its outcome alone; give outcomes only")
    return index


def _found(trajectory: Trajectory, score: Score, extracted: Callable[[Trajectory], bool] | None) -> bool:
    if extracted is not None:
        return bool(extracted(trajectory))
    if "extracted" not in score.parts:
        raise ValueError(
            f"the score of task {trajectory.task.id!r} has no part 'extracted' (whether the response holds an answer); "
            "use a reward that reports it, such as BoxedMatch"
        )
    return bool(score.parts["extracted"])


def _floats(values: Any) -> Tensor:
    if not isinstance(values, Tensor | np.ndarray):
        return torch.tensor(list(values), dtype=torch.float64)
    out = torch.as_tensor(values)
    return out if out.is_floating_point() else out.double()


def _same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def _finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite everywhere")


def _check_outcome(outcome: Tensor) -> None:
    if not bool(((outcome == 0) | (outcome == 1)).all()):
        raise ValueError("outcomes must be 0 or 1 everywhere")
