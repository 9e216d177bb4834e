"""A reward model of turns that learns from returns alone: its values per turn sum to the return.

Nothing says what a single turn was worth: any split with the right sum has zero loss, and only what generalises over
many different trajectories gives the values a meaning. So explore widely, keep successes and failures, and look at the
error on held-out trajectories.

Source: Wang et al. 2025, "SPA-RL: Reinforcing LLM Agents via Stepwise Progress Attribution" (arXiv 2505.20732).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.errors import ConfigError, DataError, TrainingError
from guerdon.reward_models.turn_states import EncodedTurns, PolicyTurns, TurnFeatures
from guerdon.types import Segmenter, Trajectory

__all__ = ["PAPER_FIT", "FitReport", "FitSettings", "ProgressEstimator"]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How an estimator is fitted, by AdamW on the mean of ``(sum_t c_t - R)^2`` over trajectories.

    The defaults suit models of up to a few million parameters; :data:`PAPER_FIT` holds the paper's, for a language
    model of billions.

    Args:
        epochs: passes over the data.
        lr: learning rate, after the warm-up.
        batch_size: trajectories of one backward pass.
        accumulation: backward passes of one optimiser step.
        warmup: optimiser steps of linear warm-up.
        weight_decay: decoupled.
        grad_clip: largest gradient norm; None leaves gradients as they are.
        bf16: run the trunk under bfloat16 autocast.
        heldout: share of the trajectories that are not trained on, for the report; below 20 trajectories none are.
        seed: of the order and of the held-out choice.

    Raises:
        ConfigError: a setting is out of range.
    """

    epochs: int = 20
    lr: float = 2e-3
    batch_size: int = 32
    accumulation: int = 1
    warmup: int = 0
    weight_decay: float = 0.01
    grad_clip: float | None = 1.0
    bf16: bool = False
    heldout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout must be in [0, 1), got {self.heldout}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ConfigError(f"grad_clip must be positive or None, got {self.grad_clip}")


PAPER_FIT = FitSettings(epochs=1, lr=3e-6, batch_size=2, accumulation=2, warmup=500, bf16=True)
"""The paper's settings."""


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit used and how well it predicts.

    Attributes:
        trained, heldout: numbers of trajectories.
        excluded: number of trajectories left out, by reason (of those not readable the first reason in full).
        losses: mean training loss of each epoch.
        mse: mean squared error on what was trained on, after the last step.
        heldout_mse: on held-out trajectories; NaN where there are none.
        variance: of the held-out returns (of all used returns where nothing is held out): the error of a constant.
        success_share: share of used returns above 0.5.
    """

    trained: int
    heldout: int
    excluded: Mapping[str, int]
    losses: tuple[float, ...]
    mse: float
    heldout_mse: float
    variance: float
    success_share: float


_ROWS = 32
"""Trajectories of one forward pass when scoring."""


@dataclass(frozen=True, slots=True)
class _Item:
    states: Any
    total: float = field(default=0.0)


class ProgressEstimator(nn.Module):
    """Values of turns, ``c_t = E(u, a_1, o_1, ..., a_t)``, whose sum predicts the trajectory's return.

    A value is read at the last token of the policy's turn, so it depends on the past and the action itself, never on
    what the environment answers to it. Values may be negative: a turn can undo progress.

    Args:
        source: what turns are seen through.

            * a :class:`~guerdon.policies.Policy`: a copy of its trunk, trained along; trajectories need token ids that
              its tokenizer made. Usually the supervised agent.
            * an object with ``encode(texts) -> [n, d]`` (such as :class:`~guerdon.policies.Encoder`): each turn is the
              embedding of the observation before it and its own text, and a recurrent network runs over the turns.
            * an int ``d``: trajectories are given as feature tensors ``[T, d]``, one row per turn.
        head: ``"mlp"`` on the last hidden state (the paper's text), ``"linear"`` on it, or ``"logits"``, linear on the
            vocabulary logits (the paper's code; policies only).
        memory: ``"gru"`` runs over the turns' features from the first to the last, ``"none"`` sees each turn alone.
            A policy's trunk has a memory of its own.
        hidden: width of the recurrent network and of the MLP; default 64, or the policy's width.
        train_trunk: also train the policy's copied trunk.
        max_tokens: longer sequences lose the beginning of their prompt.
        max_turns: trajectories with more turns are left out of a fit (35 in the paper's code).
        seed: of the initial weights.

    Raises:
        ConfigError: a setting is out of range, or has no meaning for this source.
    """

    def __init__(
        self,
        source: Any,
        *,
        head: Literal["mlp", "linear", "logits"] = "mlp",
        memory: Literal["gru", "none"] = "gru",
        hidden: int | None = None,
        train_trunk: bool = True,
        max_tokens: int = 4096,
        max_turns: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if head not in ("mlp", "linear", "logits"):
            raise ConfigError(f"head must be 'mlp', 'linear' or 'logits', got {head!r}")
        if memory not in ("gru", "none"):
            raise ConfigError(f"memory must be 'gru' or 'none', got {memory!r}")
        for name, value in (("hidden", hidden), ("max_turns", max_turns), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.max_turns = max_turns
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if hasattr(source, "model") and hasattr(source, "tokenizer") and hasattr(source, "render"):
                self.turns: Any = PolicyTurns(source, logits=head == "logits", train=train_trunk, max_tokens=max_tokens)
                hidden = hidden or self.turns.width
            elif head == "logits":
                raise ConfigError("head='logits' reads a language model's vocabulary; give a policy, or another head")
            elif isinstance(source, int) and not isinstance(source, bool):
                self.turns = TurnFeatures(source, memory=memory, hidden=hidden or 64)
            elif callable(getattr(source, "encode", None)) and not isinstance(source, str):
                self.turns = EncodedTurns(source, memory=memory, hidden=hidden or 64)
            else:
                raise ConfigError(
                    f"source must be a policy, an encoder with encode(texts), or the width of feature vectors, "
                    f"got {type(source).__name__}"
                )
            self.head = _head("linear" if head == "logits" else head, self.turns.width, hidden or 64)
        self.report: FitReport | None = None
        self.eval()

    # Values -----------------------------------------------------------------------------------------------------------

    def forward(self, trajectories: Sequence[Any]) -> list[Tensor]:
        """Contributions of several trajectories, ``[T_i]`` each, with gradients.

        Raises:
            DataError: a trajectory that cannot be read through this estimator's source.
        """
        return self._values([self.turns.prepare(t) for t in trajectories])

    @torch.no_grad()
    def contributions(self, trajectory: Any) -> Tensor:
        """Contribution of each turn, ``[T]`` float32; empty where the policy took no turn.

        Raises:
            DataError: the trajectory cannot be read through this estimator's source.
        """
        return self([trajectory])[0].float().cpu()

    def predict(self, trajectory: Any) -> float:
        """Predicted return: the sum (not the mean) of the contributions; 0 without a turn."""
        return float(self.contributions(trajectory).double().sum())

    def step_scores(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """Contributions per step, ``[S_i]`` each.

        Args:
            trajectories: to be scored.
            segmenter: how steps are cut; by turns (the default) everywhere, otherwise for policies only, where the
                value at a step's last token is read.
        """
        items = [self.turns.prepare(t, segmenter) for t in trajectories]
        out: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, len(items), _ROWS):
                out += [v.float().cpu() for v in self._values(items[start : start + _ROWS])]
        return out

    def token_rewards(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """Per response token, ``[L_i]`` each: each step's contribution on its last token, 0 elsewhere."""
        out = []
        for trajectory, values in zip(trajectories, self.step_scores(trajectories, segmenter), strict=True):
            row = torch.zeros(len(trajectory))
            spans = (segmenter or Segmenter("turns")).spans(trajectory)
            if len(spans) != len(values):
                raise DataError(f"task {trajectory.task.id!r}: {len(values)} values for {len(spans)} steps with tokens")
            row[[span.stop - 1 for span in spans]] = values
            out.append(row)
        return out

    # Learning ---------------------------------------------------------------------------------------------------------

    def fit(
        self, trajectories: Sequence[Any], returns: Sequence[float] | Tensor, settings: FitSettings | None = None
    ) -> ProgressEstimator:
        """Learn so that the sum of a trajectory's contributions is its return; what happened is in :attr:`report`.

        Afterwards the estimator is frozen: nothing requires a gradient until it is fitted again.

        Args:
            trajectories: explored by the agent, successes and failures. Those without a turn of the policy, longer
                than ``max_turns``, or not readable are left out and counted.
            returns: final reward of each, usually in [0, 1].
            settings: of the optimisation.

        Raises:
            DataError: another number of returns, a return that is NaN or infinite, or nothing to learn from.
            TrainingError: the loss is not finite.
        """
        settings = settings or FitSettings()
        totals = [float(r) for r in returns]
        if len(totals) != len(trajectories):
            raise DataError(f"{len(totals)} returns for {len(trajectories)} trajectories; give one for each")
        for k, total in enumerate(totals):
            if not math.isfinite(total):
                raise DataError(f"the return of trajectory {k} is {total}; leave such trajectories out")
        items, excluded = self._items(trajectories, totals)
        if not items:
            raise DataError(f"nothing to learn from: {len(trajectories)} trajectories given, left out {dict(excluded)}")
        share = _check_returns([item.total for item in items], excluded)
        order = np.random.default_rng([settings.seed & 0xFFFFFFFF, 0]).permutation(len(items))
        n_held = int(settings.heldout * len(items)) if len(items) >= 20 else 0
        held, used = [items[i] for i in order[:n_held]], [items[i] for i in order[n_held:]]
        losses = self._optimise(used, settings)
        self.report = FitReport(
            trained=len(used),
            heldout=len(held),
            excluded=dict(excluded),
            losses=tuple(losses),
            mse=self._mse(used, settings.batch_size),
            heldout_mse=self._mse(held, settings.batch_size),
            variance=float(np.var([item.total for item in held or used])),
            success_share=share,
        )
        return self

    def _items(self, trajectories: Sequence[Any], totals: Sequence[float]) -> tuple[list[_Item], Counter[str]]:
        items: list[_Item] = []
        excluded: Counter[str] = Counter()
        unreadable = ""
        for trajectory, total in zip(trajectories, totals, strict=True):
            try:
                states = self.turns.prepare(trajectory)
            except DataError as error:
                if not isinstance(trajectory, Trajectory):
                    raise
                unreadable = unreadable or f"no reading ({error})"
                excluded[unreadable] += 1
                continue
            turns = self.turns.count(states)
            if turns == 0:
                excluded["no turn of the policy"] += 1
            elif self.max_turns is not None and turns > self.max_turns:
                excluded[f"more than {self.max_turns} turns"] += 1
            else:
                items.append(_Item(states, total))
        return items, excluded

    def _optimise(self, items: Sequence[_Item], settings: FitSettings) -> list[float]:
        trained = [*self.turns.trainable(), *self.head.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        group = settings.batch_size * settings.accumulation
        losses = []
        step = 0
        self.train()
        try:
            for epoch in range(settings.epochs):
                order = np.random.default_rng([settings.seed & 0xFFFFFFFF, 1, epoch]).permutation(len(items))
                total = 0.0
                for start in range(0, len(order), group):
                    chosen = [items[i] for i in order[start : start + group]]
                    optimiser.zero_grad(set_to_none=True)
                    for k in range(0, len(chosen), settings.batch_size):
                        part = chosen[k : k + settings.batch_size]
                        total += self._backward(part, len(chosen), settings.bf16) * len(chosen)
                    if settings.grad_clip is not None:
                        nn.utils.clip_grad_norm_(trained, settings.grad_clip)
                    step += 1
                    for entry in optimiser.param_groups:
                        entry["lr"] = settings.lr * min(1.0, step / max(settings.warmup, 1))
                    optimiser.step()
                losses.append(total / len(items))
        finally:
            self.eval()
            self.requires_grad_(False)
            optimiser.zero_grad(set_to_none=True)
        return losses

    def _backward(self, part: Sequence[_Item], n: int, bf16: bool) -> float:
        last: Any = self.head[-1]
        device = str(last.weight.device.type)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            values = self._values([item.states for item in part])
        predicted = torch.stack([v.float().sum() for v in values])
        target = torch.tensor([item.total for item in part], dtype=torch.float32, device=predicted.device)
        loss = ((predicted - target) ** 2).sum() / n
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the progress estimator's loss is {value}; lower the learning rate or look at the data"
            )
        loss.backward()
        return value

    @torch.no_grad()
    def _mse(self, items: Sequence[_Item], batch_size: int) -> float:
        if not items:
            return math.nan
        errors = []
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            values = self._values([item.states for item in part])
            errors += [(float(v.double().sum()) - item.total) ** 2 for v, item in zip(values, part, strict=True)]
        return float(np.mean(errors))

    def _values(self, prepared: Sequence[Any]) -> list[Tensor]:
        counts = [self.turns.count(p) for p in prepared]
        states = self.turns(prepared)
        return list(self.head(states.to(self.head[-1].weight.dtype)).squeeze(-1).split(counts))


def _head(kind: str, width: int, hidden: int) -> nn.Sequential:
    """From ``[n, width]`` to ``[n, 1]``. The last layer starts at zero: an untrained estimator credits nobody."""
    last = nn.Linear(width if kind == "linear" else hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if kind == "linear":
        return nn.Sequential(last)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), last)


def _check_returns(totals: Sequence[float], excluded: Mapping[str, int]) -> float:
    """Warn of what makes contributions meaningless; the share of returns above 0.5."""
    outside = sum(not 0 <= t <= 1 for t in totals)
    if outside:
        warnings.warn(
            f"{outside} of {len(totals)} returns lie outside [0, 1]; the weight of grounding is meant for that range",
            stacklevel=3,
        )
    share = sum(t > 0.5 for t in totals) / len(totals)
    if not 0.05 <= share <= 0.95:
        warnings.warn(
            f"{share:.0%} of the trajectories succeed; with nearly equal returns contributions become constant: "
            "explore so that both outcomes occur",
            stacklevel=3,
        )
    if excluded:
        some = "; ".join(f"{count} with {reason}" for reason, count in excluded.items())
        warnings.warn(f"{sum(excluded.values())} trajectories were left out of the fit: {some}", stacklevel=3)
    return share
