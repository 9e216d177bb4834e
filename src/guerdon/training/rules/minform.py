"""Credit by the worst step, and by the sum of steps which it takes the place of; both with verified outcomes beside.

    reward = StepReward(scorer, verifier=ChainCorrect(), answered=lambda task: task.id in with_answer)
    OnlineTrainer(policy, engine, environment, tasks, reward, config, credit=MinFormCredit(outcome="verified"))

Source: Cheng et al. 2025 (PURE, arXiv 2504.15275).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.credit import length_baseline, min_form_returns, pure_advantage, softmin_rewards, sum_form_returns
from guerdon.errors import ConfigError
from guerdon.training.grids import Grid
from guerdon.training.rules.base import Rule, kl_penalty
from guerdon.training.streams import Experience

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["MinFormCredit", "SumCredit"]

Baseline = Literal["return", "token", "step"]


class _StepCredit(Rule):
    """Returns from each step on become token advantages against the group; subclasses say what the returns are."""

    needs = frozenset({"steps", "group"})
    kl_in_reward = True

    def __init__(
        self,
        *,
        outcome: str | None = None,
        outcome_coef: float = 1.0,
        process: bool = True,
        baseline: Baseline = "return",
        separators: bool = True,
        whiten: bool = True,
        length: int | None = None,
    ) -> None:
        if baseline not in ("return", "token", "step"):
            raise ConfigError(f"{self.name}: baseline must be 'return', 'token' or 'step', got {baseline!r}")
        if not np.isfinite(outcome_coef):
            raise ConfigError(f"{self.name}: outcome_coef must be finite, got {outcome_coef}")
        if not process and outcome is None:
            raise ConfigError(f"{self.name}: process=False leaves nothing to learn from without an outcome")
        self.outcome, self.outcome_coef, self.process = outcome, outcome_coef, process
        self.baseline, self.separators, self.whiten, self.length = baseline, separators, whiten, length
        self.needs = frozenset({"steps", "group"} if process or not separators else {"group"})

    def step_returns(self, rewards_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """``[B, S]`` what each step is credited with."""
        raise TypeError(f"{type(self).__name__} must override step_returns")

    def summable(self, rewards_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """``[B, S]`` rewards whose undiscounted sums from each step on are the returns."""
        returns = self.step_returns(rewards_BS, mask_BS)
        # Steps lie in the first columns, so the next column is the next step, or 0 behind the last one.
        return returns - torch.cat([returns[:, 1:], returns.new_zeros(len(returns), 1)], 1)

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens, ``[N]``.

        Raises:
            RewardError: a score without steps.
        """
        size = len(experience.action)
        index = np.flatnonzero(experience.action)
        kept = np.flatnonzero(experience.kept)
        if not len(index):
            return torch.zeros(size, dtype=torch.float64)
        rewards = self._rewards(experience, size)
        penalty = kl_penalty(experience, config)
        if penalty is not None:
            rewards = rewards - penalty
        tokens = Grid(index, experience.trajectory[index], len(experience), size)
        rows = torch.from_numpy(kept)
        made = pure_advantage(
            tokens.gather(rewards)[rows],
            tokens.mask[rows],
            torch.from_numpy(experience.group)[rows],
            self._outcomes(experience, kept),
            self.outcome_coef,
            self.whiten,
            length=self.length,
            centre=self.baseline == "return",
        )
        advantage = torch.zeros(tokens.mask.shape, dtype=torch.float64)
        advantage[rows] = made
        flat = tokens.scatter(advantage)
        if not self.separators:
            table = experience.steps()
            last = np.r_[table.trajectory[1:] != table.trajectory[:-1], True] if len(table) else np.zeros(0, bool)
            flat[torch.from_numpy(table.stop[~last] - 1)] = 0.0
        return flat

    def _rewards(self, experience: Experience, size: int) -> Tensor:
        """[N] summable rewards on the last tokens of steps."""
        if not self.process:
            return torch.zeros(size, dtype=torch.float64)
        table = experience.steps()
        steps = Grid(np.arange(len(table)), table.trajectory, len(experience), len(table))
        values = steps.gather(torch.from_numpy(table.value))
        made = self.summable(values, steps.mask)
        if self.baseline != "return":
            count = steps.gather(torch.from_numpy(table.stop - table.start))
            made = made - length_baseline(
                made, steps.mask, count, torch.from_numpy(experience.group), per=self.baseline
            )
        return torch.from_numpy(table.at_ends(steps.scatter(made).numpy(), size))

    def _outcomes(self, experience: Experience, kept: np.ndarray) -> Tensor | None:
        if self.outcome is None:
            return None
        if self.outcome == "value":
            return torch.from_numpy(experience.rewards[kept])
        # A part that is absent says that the prompt has no answer.
        parts = [experience.scores[b].parts.get(self.outcome, np.nan) for b in kept]
        return torch.tensor(parts, dtype=torch.float64)


class MinFormCredit(_StepCredit):
    """The return from a step on is the minimum of the step rewards; a drop-in for :class:`SumCredit`.

    Args:
        mode: ``"softmin"`` (rewards are transformed once per response, then summed) or ``"strict"``; see
            :func:`guerdon.credit.min_form_returns`.
        temperature: of ``"softmin"``.
        outcome: name of the scores' part that holds the verified outcome (``"value"``: the outcome itself); None uses
            process rewards alone. A score without the part belongs to a prompt without an answer and gets no verified
            advantage.
        outcome_coef: coefficient of the verified part.
        process: False leaves the process part out (verified outcomes alone).
        baseline: ``"return"``: mean token-level return of the other responses (the paper's). ``"token"``, ``"step"``:
            those of the released main branch in its place, see :func:`guerdon.credit.length_baseline`.
        separators: False gives the last token of each step but the last no advantage, so that the policy is trained
            neither to avoid nor to emit separators (the main branch does so).
        whiten: over the policy's tokens of the step.
        length: N of the ``"return"`` baseline; by default the longest response of the step.

    With ``kl_in="reward"`` each token also pays its KL penalty. Source: see :func:`guerdon.credit.pure_advantage`.
    """

    name = "min_form"

    def __init__(
        self,
        mode: Literal["softmin", "strict"] = "softmin",
        temperature: float = 0.1,
        *,
        outcome: str | None = None,
        outcome_coef: float = 1.0,
        process: bool = True,
        baseline: Baseline = "return",
        separators: bool = True,
        whiten: bool = True,
        length: int | None = None,
    ) -> None:
        if mode not in ("softmin", "strict"):
            raise ConfigError(f"min_form: mode must be 'softmin' or 'strict', got {mode!r}")
        if not temperature > 0:
            raise ConfigError(f"min_form: temperature must be positive, got {temperature}; or choose mode='strict'")
        super().__init__(
            outcome=outcome, outcome_coef=outcome_coef, process=process, baseline=baseline, separators=separators,
            whiten=whiten, length=length,
        )  # fmt: skip
        self.mode: Literal["softmin", "strict"] = mode
        self.temperature = temperature

    def step_returns(self, rewards_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """See :func:`guerdon.credit.min_form_returns`."""
        return min_form_returns(rewards_BS, mask_BS, self.mode, self.temperature)

    def summable(self, rewards_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """The transformed rewards."""
        if self.mode == "softmin":
            return softmin_rewards(rewards_BS, mask_BS, self.temperature)
        return super().summable(rewards_BS, mask_BS)


class SumCredit(_StepCredit):
    """The return from a step on is the discounted sum of the step rewards.

    Args:
        gamma: discount per step, in [0, 1].
        outcome, outcome_coef, process, baseline, separators, whiten, length: as in :class:`MinFormCredit`.
    """

    name = "sum_form"

    def __init__(
        self,
        gamma: float = 1.0,
        *,
        outcome: str | None = None,
        outcome_coef: float = 1.0,
        process: bool = True,
        baseline: Baseline = "return",
        separators: bool = True,
        whiten: bool = True,
        length: int | None = None,
    ) -> None:
        if not 0 <= gamma <= 1:
            raise ConfigError(f"sum_form: gamma must be in [0, 1], got {gamma}")
        super().__init__(
            outcome=outcome, outcome_coef=outcome_coef, process=process, baseline=baseline, separators=separators,
            whiten=whiten, length=length,
        )  # fmt: skip
        self.gamma = gamma

    def step_returns(self, rewards_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """See :func:`guerdon.credit.sum_form_returns`."""
        return sum_form_returns(rewards_BS, mask_BS, self.gamma)
