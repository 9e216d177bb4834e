"""PRIME in a trainer: which prompts count, what their tokens earn, and the update of the model that says so.

    prm = PrimeReward.from_policy(policy, lr=1e-4)
    OnlineTrainer(policy, engine, environment, tasks, verifier, prime_config(lr=1e-4), credit=PrimeCredit(prm))

Source: Cui, Yuan, Wang et al. 2025 (arXiv 2502.01456), algorithm 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.credit.channels import accuracy_filter, normalize_by_max_return, rloo_with_process
from guerdon.errors import CheckpointError, ConfigError, RewardError
from guerdon.training.callbacks import Callback
from guerdon.training.grids import Grid
from guerdon.training.rules.base import Rule
from guerdon.training.streams import Experience, Streams
from guerdon.types import Group, Task, Trajectory

if TYPE_CHECKING:
    from guerdon.reward_models import PrimeReward
    from guerdon.training.config import OnlineConfig

__all__ = ["INSTRUCTIONS", "PrimeCredit", "PrimeLog", "PromptBuffer", "prime_config"]

INSTRUCTIONS = {
    "math": "Solve the problem step by step and put the final answer into \\boxed{}.",
    "code": "Solve the problem and end with one fenced block of Python code that holds the whole program.",
}
"""What the verifiers of the paper's two kinds of task rely on, for the system message."""


def prime_config(**settings: Any) -> OnlineConfig:
    """The paper's policy update: 4 responses a prompt at temperature 1, clip 0.2, token mean, one epoch, no KL.

    Its learning rate of 5e-7 is that of a 7 B model; 256 prompts a step and responses of 3072 tokens.
    """
    from guerdon.training.config import OnlineConfig

    lr = settings.pop("lr", 5e-7)
    base: dict[str, Any] = {
        "group_size": 4,
        "temperature": 1.0,
        "max_tokens": 3072,
        "prompts_per_step": 256,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "token",
        "epochs": 1,
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
        "optimiser": {"lr": lr},
    }
    return OnlineConfig(**{**base, **settings})


class PrimeCredit(Rule):
    """Leave-one-out advantages in two channels: process rewards of tokens, and outcomes.

    Prompts whose mean outcome lies outside ``[low, high]`` are in no loss term, no statistic and no update of the
    reward model; so are groups with fewer than two kept trajectories. Where nothing is left, the step trains nothing
    and says so.

    Args:
        reward: scores the tokens of the kept prompts and then trains itself. ``None`` reads the token values of the
            scores instead (a reward or a ``shape`` made them, for example a frozen scorer).
        low, high: see :func:`~guerdon.credit.accuracy_filter`.
        gamma, baseline, whiten: see :func:`~guerdon.credit.rloo_with_process`.
        normalize: divide process rewards by the batch's largest return first.
        outcome: named part of the scores that is the verifier's verdict; default the score's value.

    Attributes:
        metrics: of the last step, for :class:`PrimeLog`.
    """

    name = "prime"

    def __init__(
        self,
        reward: PrimeReward | None = None,
        *,
        low: float = 0.2,
        high: float = 0.8,
        gamma: float = 1.0,
        baseline: Literal["paper", "official"] = "paper",
        normalize: bool = True,
        whiten: bool = True,
        outcome: str | None = None,
    ) -> None:
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"low and high must satisfy 0 <= low <= high <= 1, got {low} and {high}")
        if not 0 <= gamma <= 1:
            raise ConfigError(f"gamma must be in [0, 1], got {gamma}")
        if baseline not in ("paper", "official"):
            raise ConfigError(f"baseline must be 'paper' or 'official', got {baseline!r}")
        self.reward = reward
        self.low, self.high, self.gamma = low, high, gamma
        self.baseline: Literal["paper", "official"] = baseline
        self.normalize, self.whiten, self.outcome = normalize, whiten, outcome
        self.needs = frozenset({"group"} if reward is not None else {"group", "tokens"})
        self.metrics: dict[str, float] = {}

    def __call__(self, experience: Experience, config: OnlineConfig) -> Streams:
        """Streams of one step.

        Raises:
            ConfigError: groups of one, or a second whitening asked for in the configuration.
            RewardError: an outcome is outside [0, 1] or not finite, or token values are missing.
        """
        for problem in self.conflicts(config):
            raise ConfigError(problem)
        outcome_B = self._outcomes(experience)
        rows = self._rows(experience, outcome_B)
        groups = len(np.unique(experience.group))
        self.metrics = {"prompts": float(groups), "prompts_kept": float(len(np.unique(experience.group[rows])))}
        if not len(rows):
            warnings.warn(
                f"no prompt of the step has a mean outcome in [{self.low}, {self.high}]: nothing is trained. "
                "Choose prompts of middling difficulty, larger groups, or a wider band",
                stacklevel=2,
            )
            return _streams(experience, torch.zeros(len(experience.action)), rows)
        tokens = self._tokens(experience, rows, outcome_B)
        number = np.full(len(experience), -1)
        number[rows] = np.arange(len(rows))
        index = np.flatnonzero(experience.action & (number[experience.trajectory] >= 0))
        grid = Grid(index, number[experience.trajectory[index]], len(rows), len(experience.action))
        process_BT = grid.gather(tokens)
        if self.normalize:
            process_BT = normalize_by_max_return(process_BT, grid.mask)
        advantage_BT = rloo_with_process(
            process_BT,
            grid.mask,
            torch.from_numpy(outcome_B[rows]),
            torch.from_numpy(experience.group[rows]),
            self.gamma,
            self.baseline,
            self.whiten,
        )
        return _streams(experience, grid.scatter(advantage_BT).float(), rows)

    def conflicts(self, config: OnlineConfig) -> Iterator[str]:
        """Groups of one, and a second whitening."""
        if config.group_size < 2:
            yield "PRIME compares the responses to one prompt; set group_size to at least 2"
        if self.whiten and config.whiten != "none":
            yield f"whiten={config.whiten!r} would whiten twice; leave it out, or use PrimeCredit(whiten=False)"

    def state_dict(self) -> dict[str, Any]:
        """State of the reward model, if it has one of its own."""
        return {} if self.reward is None else {"reward": self.reward.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        if self.reward is not None:
            self.reward.load_state_dict(state["reward"])

    def _outcomes(self, experience: Experience) -> np.ndarray:
        out = experience.rewards
        if self.outcome is not None:
            out = np.full(len(experience), np.nan)
            for b in np.flatnonzero(experience.kept):
                parts = experience.scores[b].parts
                if self.outcome not in parts:
                    raise RewardError(
                        f"the score of task {experience.trajectories[b].task.id!r} has no part {self.outcome!r}; "
                        f"it has {', '.join(parts) or 'none'}"
                    )
                out[b] = parts[self.outcome]
        for b in np.flatnonzero(experience.kept):
            if not 0 <= out[b] <= 1:
                raise RewardError(
                    f"the outcome of task {experience.trajectories[b].task.id!r} is {out[b]}; PRIME needs a verifier's "
                    "verdict in [0, 1]: use such a reward, or name the part with outcome="
                )
        return out

    def _rows(self, experience: Experience, outcome_B: np.ndarray) -> np.ndarray:
        """Trajectories that count: kept, in a group of at least two, and of middling difficulty."""
        kept = np.flatnonzero(experience.kept)
        sizes = np.bincount(experience.group[kept], minlength=int(experience.group.max(initial=-1)) + 1)
        kept = kept[sizes[experience.group[kept]] > 1]
        inside = accuracy_filter(
            torch.from_numpy(outcome_B[kept]), torch.from_numpy(experience.group[kept]), self.low, self.high
        )
        return kept[inside.numpy()]

    def _tokens(self, experience: Experience, rows: np.ndarray, outcome_B: np.ndarray) -> Tensor:
        """[N] process reward of each token, 0 on trajectories that do not count."""
        if self.reward is None:
            return torch.from_numpy(experience.token_rewards())
        made = self.reward.step_trajectories(
            [experience.trajectories[b] for b in rows],
            torch.from_numpy(outcome_B[rows]),
            group=experience.group[rows].tolist(),
        )
        self.metrics |= self.reward.metrics
        out = torch.zeros(len(experience.action), dtype=torch.float64)
        for b, row in zip(rows, made, strict=True):
            out[int(experience.offsets[b]) : int(experience.offsets[b + 1])] = row.double()
        return out


class PrimeLog(Callback):
    """Puts a rule's metrics into the trainer's rows, under ``prime/``."""

    name = "prime"

    def __init__(self, credit: PrimeCredit) -> None:
        self._credit = credit

    def measure(self, run: Any, row: Mapping[str, Any], detail: Any) -> Mapping[str, float]:
        """The metrics of the step that was just done."""
        return {f"prime/{key}": value for key, value in self._credit.metrics.items()}


class PromptBuffer:
    """Samples until enough prompts are of middling difficulty; prompts kept beyond that begin the next iteration.

    Only prompts are buffered: their responses are sampled anew, by the policy as it is then.

    Args:
        tasks: all tasks, by whose ids a resumed buffer finds its prompts again.
        low, high: see :func:`~guerdon.credit.accuracy_filter`.
        rounds: most rounds of sampling for one batch.
    """

    def __init__(self, tasks: Sequence[Task], *, low: float = 0.2, high: float = 0.8, rounds: int = 10) -> None:
        if rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {rounds}")
        self._tasks = {task.id: task for task in tasks}
        self.low, self.high, self.rounds = low, high, rounds
        self.waiting: list[Task] = []

    def fill(
        self,
        n: int,
        draw: Callable[[int], Sequence[Task]],
        sample: Callable[[Sequence[Task]], Sequence[Group]],
        verify: Callable[[Sequence[Trajectory]], Sequence[float]],
    ) -> list[Group]:
        """Up to ``n`` groups inside the band; fewer (with a warning) where the rounds did not suffice.

        Args:
            n: groups wanted.
            draw: gives so many new tasks.
            sample: gives one group per task.
            verify: outcome of each trajectory, in [0, 1].
        """
        kept: list[Group] = []
        for _ in range(self.rounds):
            if len(kept) >= n:
                break
            tasks, self.waiting = self.waiting[:n], self.waiting[n:]
            if len(tasks) < n:
                tasks = [*tasks, *draw(n - len(tasks))]
            for group in sample(tasks):
                outcome = torch.as_tensor(list(verify(group.trajectories)), dtype=torch.float64)
                inside = accuracy_filter(outcome, torch.zeros(len(outcome), dtype=torch.int64), self.low, self.high)
                if len(inside) and bool(inside.all()):
                    kept.append(group)
        self.waiting = [*(group.task for group in kept[n:]), *self.waiting]
        if len(kept) < n:
            warnings.warn(
                f"{len(kept)} of {n} prompts are of middling difficulty after {self.rounds} rounds of sampling; "
                "train on those, or give other prompts",
                stacklevel=2,
            )
        return kept[:n]

    def state_dict(self) -> dict[str, Any]:
        """Ids of the prompts that wait."""
        return {"waiting": [task.id for task in self.waiting]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the prompts that waited.

        Raises:
            CheckpointError: one of them is not among the tasks.
        """
        missing = [i for i in state["waiting"] if i not in self._tasks]
        if missing:
            raise CheckpointError(f"the saved prompt buffer holds task {missing[0]!r}, which is not among the tasks")
        self.waiting = [self._tasks[i] for i in state["waiting"]]


def _streams(experience: Experience, advantage: Tensor, rows: np.ndarray) -> Streams:
    """Every term over the action tokens of the given trajectories alone."""
    inside = np.zeros(len(experience), dtype=bool)
    inside[rows] = True
    weight = torch.from_numpy(experience.action & inside[experience.trajectory]).float()
    return Streams(advantage, weight, weight.clone(), weight.clone(), None, None, ~inside)
