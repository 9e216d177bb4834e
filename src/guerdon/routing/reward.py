"""Router-R1's reward: a format gate, an outcome, and a running-percentile cost, combined in a hierarchy.

Source: Router-R1 (arXiv 2506.09033), section on rewards, and the released reward manager. The parts
live in ``rewards/`` and ``shaping/``; this file only puts them together, because they share one state
(the window of recent costs) that belongs to a training run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError
from guerdon.rewards import ExactMatch, Reward, RouterFormat, TokenF1
from guerdon.rewards.base import Progress
from guerdon.types import Score, Trajectory

__all__ = ["HierarchicalReward", "router_reward"]


class HierarchicalReward(Reward):
    """Format gate, then outcome, then cost.

    ``r = -1`` where the format is broken; else ``0`` where the outcome is 0 (a cheap wrong answer earns
    nothing); else ``(1 - alpha) * outcome + alpha * cost``.

    Args:
        gate: reward with values in [-1, 0]; a negative value is the whole reward. ``None`` pays the
            outcome whatever the format (the ablation without the format reward).
        outcome: reward with values in [0, 1].
        cost: maps raw costs to [0, 1], 1 being cheapest; stateful, in trajectory order.
        alpha: weight of the cost term in [0, 1].
        gate_wrong: pay the cost term only where the outcome is positive. ``False`` is the sum as the
            paper writes it, and the ablation.
        alpha_after, alpha_ramp: training steps at ``alpha`` 0, and steps over which it then rises linearly to its
            value (ours: a price on calls before several calls pay off teaches to call once; docs/decisions/006).
            0 and 0 are the paper's constant. Scores outside training use ``alpha`` itself.
    """

    def __init__(
        self,
        gate: Reward | None,
        outcome: Reward,
        cost: Any = None,
        alpha: float = 0.0,
        *,
        gate_wrong: bool = True,
        alpha_after: int = 0,
        alpha_ramp: int = 0,
        name: str = "router",
    ) -> None:
        super().__init__(name=name)
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"alpha must be in [0, 1], got {alpha}")
        if alpha_after < 0 or alpha_ramp < 0:
            raise ConfigError(f"alpha_after and alpha_ramp must be >= 0 steps, got {alpha_after} and {alpha_ramp}")
        if cost is None:
            from guerdon.shaping import RunningPercentileCost

            cost = RunningPercentileCost()
        self.gate, self.outcome, self.cost, self.alpha, self.gate_wrong = gate, outcome, cost, alpha, gate_wrong
        self.alpha_after, self.alpha_ramp = alpha_after, alpha_ramp

    def alpha_at(self, progress: Progress | None) -> float:
        """The cost coefficient at a point of training; the final one where there is none."""
        if progress is None:
            return self.alpha
        if progress.step < self.alpha_after:
            return 0.0
        # The first step of the ramp already counts: step alpha_after + alpha_ramp - 1 has the full weight.
        return self.alpha * min(1.0, (progress.step - self.alpha_after + 1) / max(1, self.alpha_ramp))

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> list[Score]:
        """Score a batch; the cost window is advanced by every trajectory, gated or not.

        Args:
            trajectories: with ``info["raw_cost"]``.
            progress: where training is, for the schedule of ``alpha``.

        Returns:
            Scores with the parts ``format``, ``outcome``, ``cost`` and ``raw_cost``.
        """
        import torch

        from guerdon.shaping import hierarchical

        outcome = self.outcome(trajectories)
        gate = self.gate(trajectories) if self.gate is not None else [Score(0.0) for _ in trajectories]
        raw = [float(t.info["raw_cost"]) for t in trajectories]
        cost = [float(c) for c in self.cost(raw)]
        invalid = [next((s for s in pair if not s.valid), None) for pair in zip(gate, outcome, strict=True)]
        total = hierarchical(
            torch.tensor([0.0 if i else g.value for g, i in zip(gate, invalid, strict=True)], dtype=torch.float64),
            torch.tensor([0.0 if i else o.value for o, i in zip(outcome, invalid, strict=True)], dtype=torch.float64),
            torch.tensor(cost, dtype=torch.float64),
            self.alpha_at(progress),
            gate_wrong=self.gate_wrong,
        ).tolist()
        return [
            bad
            if bad is not None
            else Score(r, parts={"format": g.value, "outcome": o.value, "cost": c, "raw_cost": u})
            for bad, r, g, o, c, u in zip(invalid, total, gate, outcome, cost, raw, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """State of the cost window."""
        return {"cost": self.cost.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the cost window."""
        self.cost.load_state_dict(state["cost"])


def router_reward(
    *,
    alpha: float = 0.0,
    metric: str = "em",
    members: Sequence[str] | None = None,
    resolver: Any = None,
    gate_format: bool = True,
    gate_wrong: bool = True,
    alpha_after: int = 0,
    alpha_ramp: int = 0,
    cost: Any = None,
) -> HierarchicalReward:
    """The paper's reward with its defaults.

    Args:
        alpha: cost coefficient in [0, 1].
        metric: ``"em"`` or ``"f1"``.
        members: names that a search block may carry; ``None`` reads them from each trajectory's
            ``info["members"]``, as pools may differ from episode to episode.
        resolver: maps a written name to a member name or ``None``; replaces exact matching.
        gate_format: off for the ablation without the format reward.
        gate_wrong: off for the ablation that pays the cost term for wrong answers too.
        alpha_after, alpha_ramp: schedule of ``alpha``; see :class:`HierarchicalReward`.
        cost: the normaliser of raw costs; a fresh :class:`RunningPercentileCost` by default.

    Raises:
        ConfigError: unknown metric, alpha outside [0, 1].
    """
    outcomes = {"em": ExactMatch, "f1": TokenF1}
    if metric not in outcomes:
        raise ConfigError(f"metric must be 'em' or 'f1', got {metric!r}")
    gate = RouterFormat(members=members, resolver=resolver) if gate_format else None
    return HierarchicalReward(
        gate, outcomes[metric](), cost, alpha, gate_wrong=gate_wrong, alpha_after=alpha_after, alpha_ramp=alpha_ramp
    )
