"""Credit from rewards of turns: GAE over a critic's values, or returns-to-go against the group.

    reward = ProgressReward(estimator, outcome=ReachGoal())
    OnlineTrainer(policy, engine, environment, tasks, reward, config, critic="shared", credit=ProgressCredit())

Only the step values of the scores are paid, each on the last token of its turn; the outcome, which is a score's value,
is in them already or deliberately not.

Source: Wang et al. 2025, "SPA-RL: Reinforcing LLM Agents via Stepwise Progress Attribution" (arXiv 2505.20732).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.credit import group_statistics
from guerdon.errors import ConfigError
from guerdon.training.losses import KL
from guerdon.training.rules.base import Rule
from guerdon.training.rules.critic import Gae
from guerdon.training.rules.stepwise import StepLeaveOneOut
from guerdon.training.streams import Experience, Streams, collect, with_credit
from guerdon.training.timing import Phases
from guerdon.types import Group, Score

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig
    from guerdon.training.online import OnlineTrainer

__all__ = ["ProgressCredit", "adapt_kl", "update_offline"]


def adapt_kl(coef: float, kl: float, target: float, tokens: int, horizon: float) -> float:
    """KL coefficient of the next step: raised where the KL was above its target, lowered where below.

    ``coef * (1 + clip(kl / target - 1, -0.2, 0.2) * min(tokens / horizon, 1))``

    Args:
        coef: of this step.
        kl: mean per token in this step.
        target: of it; positive.
        tokens: seen in this step.
        horizon: tokens over which the coefficient may change by a fifth.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; the minimum keeps the coefficient positive.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * min(tokens / horizon, 1.0))


class ProgressCredit(Rule):
    """Advantages from the rewards of turns (or of any other steps).

    With ``baseline="critic"``, the paper's PPO: rewards stand on the last token of their turn, each of the policy's
    tokens pays the KL penalty of ``kl_in="reward"``, and GAE runs over the policy's tokens. With ``"group"``, every
    token of a turn gets the turn's return-to-go minus the other members' from the same turn on
    (:func:`guerdon.credit.step_leave_one_out`).

    Args:
        baseline: ``"critic"`` or ``"group"``.
        gamma: discount per turn, with ``"group"`` (with a critic ``config.gamma`` is read, per token).
        scale: divide by the standard deviation of the group's returns, with ``"group"``.
        kl_target: mean KL per token towards which the coefficient is adapted, beginning at ``config.kl_coef``
            (:func:`adapt_kl`); None keeps it.
        kl_horizon: tokens over which the coefficient may change by a fifth.

    Attributes:
        kl_coef: coefficient of the next step; None before the first adaptation.

    Raises:
        ConfigError: a setting is out of range, or has no meaning with this baseline.
    """

    name = "progress"

    def __init__(
        self,
        baseline: Literal["critic", "group"] = "critic",
        *,
        gamma: float | None = None,
        scale: bool = False,
        kl_target: float | None = None,
        kl_horizon: float = 10_000.0,
    ) -> None:
        if baseline not in ("critic", "group"):
            raise ConfigError(f"progress: baseline must be 'critic' or 'group', got {baseline!r}")
        if baseline == "critic" and (gamma is not None or scale):
            raise ConfigError("progress: gamma and scale are of baseline='group'; with a critic set the run's gamma")
        if baseline == "group" and kl_target is not None:
            raise ConfigError("progress: kl_target adapts the KL in the reward, which needs baseline='critic'")
        if kl_target is not None and not kl_target > 0:
            raise ConfigError(f"progress: kl_target must be positive or None, got {kl_target}")
        if not kl_horizon > 0:
            raise ConfigError(f"progress: kl_horizon must be positive, got {kl_horizon}")
        self.baseline, self.scale = baseline, scale
        self.kl_target, self.kl_horizon = kl_target, kl_horizon
        self.kl_coef: float | None = None
        self._gae = Gae("steps")
        self._against_group = StepLeaveOneOut(1.0 if gamma is None else gamma)
        self.needs = frozenset({"steps", baseline})
        self.kl_in_reward = baseline == "critic"

    def conflicts(self, config: OnlineConfig) -> Iterator[str]:
        """Refuse an adapted coefficient where there is nothing to adapt."""
        if self.kl_target is not None and not (config.kl_coef > 0 and config.kl_in == "reward"):
            yield "progress: kl_target adapts the KL in the reward; set kl_coef > 0 and kl_in='reward'"

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor | Streams:
        """Advantages ``[N]``, or whole streams with a critic's targets.

        Raises:
            RewardError: a score without steps.
            ConfigError: no critic.
        """
        if self.baseline == "group":
            return self._scaled(experience, self._against_group(experience, config))
        if experience.values is None:
            raise ConfigError("progress: baseline='critic' needs one: set algorithm='ppo' and critic='shared'")
        if self.kl_coef is not None:
            config = config.model_copy(update={"kl_coef": self.kl_coef})
        streams = self._gae(experience, config)
        if self.kl_target is not None:
            self._adapt(experience, config)
        return streams

    def _scaled(self, experience: Experience, advantage: Tensor) -> Tensor:
        if not self.scale:
            return advantage
        table = experience.steps()
        total_B = torch.from_numpy(np.bincount(table.trajectory, weights=table.value, minlength=len(experience)))
        std_B = group_statistics(total_B, torch.from_numpy(experience.group), torch.from_numpy(experience.kept)).std
        return advantage / (std_B[torch.from_numpy(experience.trajectory)] + 1e-6)

    def _adapt(self, experience: Experience, config: OnlineConfig) -> None:
        if experience.old is None or experience.reference is None:
            raise ConfigError("progress: kl_target adapts the KL in the reward; set kl_coef > 0 and kl_in='reward'")
        action = torch.from_numpy(experience.action)
        tokens = int(action.sum())
        if tokens:
            kl = KL[config.kl_kind](experience.old[action].double(), experience.reference[action].double()).mean()
            assert self.kl_target is not None
            self.kl_coef = adapt_kl(config.kl_coef, float(kl), self.kl_target, tokens, self.kl_horizon)

    def state_dict(self) -> dict[str, Any]:
        """The adapted coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.kl_coef = state["kl_coef"]


def update_offline(
    trainer: OnlineTrainer, groups: Sequence[Group], scores: Sequence[Score], credit: ProgressCredit
) -> dict[str, Any]:
    """One update of a trainer's policy on trajectories that were sampled before: the offline form of the method.

    The recorded log-probabilities are the ratio's denominator, so the trajectories should come from a policy that is
    not far from the present one.

    Args:
        trainer: whose learner is moved; its step counter is not.
        groups, scores: explored trajectories, and their rewards of turns.
        credit: the rule.

    Returns:
        Metrics of the update.
    """
    config: Any = trainer.config
    phases = Phases(trainer.policy.device)
    experience = collect(groups, scores, mask_truncated=config.mask_truncated)
    mismatch = trainer.learner.prepare(experience, phases)
    streams = with_credit(credit)(experience, config)
    return trainer.learner.update(experience, streams, mismatch, step=trainer.step, total=trainer.total, phases=phases)
