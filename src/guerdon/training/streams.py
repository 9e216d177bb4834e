"""From scored trajectories to per-token streams: the only thing that the update sees.

Layout: everything per token is *flat*, one entry per response token of the step, trajectories one after the
other, environment tokens included (``N`` below). ``B`` counts trajectories. An algorithm is a function from an
:class:`Experience` to :class:`Streams`; the trainer knows nothing else about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, RewardError
from guerdon.training.grids import Grid
from guerdon.types import Group, Score, StopReason, Trajectory

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = [
    "Credit",
    "Experience",
    "StepTable",
    "Streams",
    "TokenWeights",
    "collect",
    "critic_streams",
    "grpo_streams",
    "normalise",
    "ppo_streams",
    "weigh",
    "with_credit",
    "zero_variance",
]

TokenWeights = Callable[[Trajectory], Sequence[float]]
"""Weights of a trajectory's response tokens in one loss term, relative to 1."""


@dataclass
class Experience:
    """One step's trajectories and what is known about each of their tokens.

    Args:
        trajectories, scores: [B].
        items: [B] ``(prompt_ids, response_ids)``.
        group: [B] int64, number of the group of each trajectory.
        kept: [B] bool, False for trajectories outside loss and statistics.
        rewards: [B] float64, outcome of each trajectory (NaN where not kept may occur).
        offsets: [B+1] int64, where each trajectory's tokens begin in the flat layout.
        trajectory, position: [N] int64, owner of each token and its response position.
        action: [N] bool, True on policy tokens of kept trajectories.
        credit: [N] bool, the tokens that count as time steps for a critic: ``action``, or all of a kept trajectory.
        sampled: [N] float32, log-probability at sampling; 0 on other tokens.
        excluded: [B] bool or None, True for trajectories of groups that were filtered out.
        old, reference, values: [N] float32 or None, under the policy before the update, under the
            reference, and of the critic.
    """

    trajectories: list[Trajectory]
    scores: list[Score]
    items: list[tuple[tuple[int, ...], list[int]]]
    group: np.ndarray
    kept: np.ndarray
    rewards: np.ndarray
    offsets: np.ndarray
    trajectory: np.ndarray
    position: np.ndarray
    action: np.ndarray
    credit: np.ndarray
    sampled: Tensor
    excluded: np.ndarray | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def action_counts(self) -> np.ndarray:
        """[B] number of policy tokens that may be learned."""
        return np.bincount(self.trajectory[self.action], minlength=len(self))

    @property
    def last_action(self) -> np.ndarray:
        """[B] flat index of each trajectory's last policy token; -1 where there is none."""
        out = np.full(len(self), -1, dtype=np.int64)
        index = np.flatnonzero(self.action)
        out[self.trajectory[index]] = index  # ascending, so the last one written stays
        return out

    def steps(self) -> StepTable:
        """The step values of all kept trajectories, in the flat layout.

        Raises:
            RewardError: a kept trajectory's score has no steps, or a step lies outside its response or covers a
                token that the policy did not say.
        """
        owners: list[int] = []
        numbers: list[int] = []
        starts: list[int] = []
        stops: list[int] = []
        values: list[float] = []
        for b in np.flatnonzero(self.kept):
            score, base = self.scores[b], int(self.offsets[b])
            if score.steps is None or score.step_spans is None:
                raise RewardError(
                    f"the score of task {self.trajectories[b].task.id!r} has no step values; "
                    "use a reward that scores steps (with a segmenter), or a credit rule for outcomes"
                )
            for k, (value, span) in enumerate(zip(score.steps, score.step_spans, strict=True)):
                start, stop = base + span.start, base + span.stop
                if stop > self.offsets[b + 1] or start == stop or not self.action[start:stop].all():
                    raise RewardError(
                        f"step {k} of task {self.trajectories[b].task.id!r} is [{span.start}, {span.stop}) of a response "
                        f"of {self.offsets[b + 1] - base} tokens; a step covers policy tokens only, and at least one"
                    )
                owners.append(int(b))
                numbers.append(k)
                starts.append(start)
                stops.append(stop)
                values.append(float(value))
        owner, number, start_S, stop_S = (np.asarray(x, dtype=np.int64) for x in (owners, numbers, starts, stops))
        return StepTable(owner, number, start_S, stop_S, np.asarray(values, dtype=np.float64))

    def token_rewards(self) -> np.ndarray:
        """[N] float64, the token values of all kept trajectories; 0 on other tokens.

        Raises:
            RewardError: a kept trajectory's score has no token values, or another number of them.
        """
        out = np.zeros(len(self.action))
        for b in np.flatnonzero(self.kept):
            tokens, length = self.scores[b].tokens, int(self.offsets[b + 1] - self.offsets[b])
            if tokens is None or len(tokens) != length:
                given = "no token values" if tokens is None else f"{len(tokens)} token values for {length} tokens"
                raise RewardError(f"the score of task {self.trajectories[b].task.id!r} has {given}")
            out[self.offsets[b] : self.offsets[b + 1]] = tokens
        return np.where(self.action, out, 0.0)


@dataclass(frozen=True, slots=True)
class StepTable:
    """One row per step of the kept trajectories, in order.

    Args:
        trajectory: [S] owner of each step.
        index: [S] its number within the trajectory.
        start, stop: [S] its tokens in the flat layout, half-open.
        value: [S] float64, what the reward said.
    """

    trajectory: np.ndarray
    index: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.value)

    def spread(self, values: np.ndarray, n: int) -> np.ndarray:
        """[n] float64: each step's value on every token of it, 0 elsewhere."""
        out = np.zeros(n)
        lengths = self.stop - self.start
        index = (
            np.repeat(self.start, lengths) + np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        )
        out[index] = np.repeat(values, lengths)
        return out

    def at_ends(self, values: np.ndarray, n: int) -> np.ndarray:
        """[n] float64: each step's value on its last token, 0 elsewhere."""
        out = np.zeros(n)
        out[self.stop - 1] = values
        return out


@dataclass
class Streams:
    """What the objective reads, one float32 entry per flat token [N].

    Args:
        advantage: of each action token.
        policy: weight of a token in the policy term; 0 leaves it out.
        entropy: weight in the entropy term.
        kl: weight in the KL term.
        value: weight in the value term; None without a critic.
        target: what the critic should say at each token; None without a critic.
        skip: [B] bool, trajectories whose policy gradient is exactly zero; they still count in the
            policy term's denominator.
    """

    advantage: Tensor
    policy: Tensor
    entropy: Tensor
    kl: Tensor
    value: Tensor | None
    target: Tensor | None
    skip: np.ndarray


def collect(
    groups: Sequence[Group],
    scores: Sequence[Score],
    *,
    mask_truncated: bool = False,
    credit_all: bool = False,
    excluded: np.ndarray | None = None,
) -> Experience:
    """Lay the trajectories of a step out flat.

    A trajectory is kept when its score is valid, it has a policy token, it did not fail
    (``StopReason.ERROR``, ``ABORTED``), its context did not slide (``info["slid"]``: the policy sampled from
    another context than the trainer would see), is not ``excluded`` ([B] bool), and, with ``mask_truncated``, was not
    cut off.

    Raises:
        ConfigError: a policy turn carries no token ids or no log-probabilities.
        RewardError: another number of scores than of trajectories.
    """
    trajectories = [t for g in groups for t in g.trajectories]
    if len(scores) != len(trajectories):
        raise RewardError(f"{len(scores)} scores for {len(trajectories)} trajectories; a reward returns one for each")
    owners: list[int] = []
    lengths: list[int] = []
    speakers: list[bool] = []
    logprobs: list[Sequence[float]] = []
    for b, trajectory in enumerate(trajectories):
        for turn in trajectory.turns:
            length = len(turn.token_ids)
            policy = turn.speaker == "policy"
            if policy and (turn.logprobs is None or (turn.text and not length)):
                raise ConfigError(
                    f"a policy turn of task {trajectory.task.id!r} carries no token ids or log-probabilities; "
                    "train with an engine that records them (engine.trainable)"
                )
            owners.append(b)
            lengths.append(length)
            speakers.append(policy)
            logprobs.append(turn.logprobs if policy and turn.logprobs is not None else (0.0,) * length)
    lengths_K = np.asarray(lengths, dtype=np.int64)
    n = int(lengths_K.sum())
    trajectory_N = np.repeat(np.asarray(owners, dtype=np.int64), lengths_K)
    counts = np.bincount(trajectory_N, minlength=len(trajectories))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    action = np.repeat(np.asarray(speakers, dtype=bool), lengths_K)
    has_action = np.bincount(trajectory_N[action], minlength=len(trajectories)) > 0
    kept = has_action & np.array([s.valid for s in scores], dtype=bool)
    stops = [t.stop for t in trajectories]
    kept &= np.array([s not in (StopReason.ERROR, StopReason.ABORTED) for s in stops], dtype=bool)
    kept &= np.array([not t.info.get("slid", False) for t in trajectories], dtype=bool)
    if mask_truncated:
        kept &= ~np.array([s.truncated for s in stops], dtype=bool)
    if excluded is not None:
        kept &= ~excluded
    action &= kept[trajectory_N]
    return Experience(
        trajectories=trajectories,
        scores=list(scores),
        items=[(t.prompt_ids, list(chain.from_iterable(turn.token_ids for turn in t.turns))) for t in trajectories],
        group=np.repeat(np.arange(len(groups)), [len(g) for g in groups]),
        kept=kept,
        rewards=np.array([s.value for s in scores], dtype=np.float64),
        offsets=offsets,
        trajectory=trajectory_N,
        position=np.arange(n) - offsets[trajectory_N],
        action=action,
        credit=kept[trajectory_N] if credit_all else action,
        sampled=torch.from_numpy(np.fromiter(chain.from_iterable(logprobs), dtype=np.float32, count=n)),
        excluded=excluded,
    )


def normalise(
    weight: Tensor, trajectory: Tensor, how: Literal["token", "sequence", "constant"], length: int | None = None
) -> Tensor:
    """Turn relative token weights into weights that sum a loss term over a minibatch, however it is cut.

    Args:
        weight: [n] relative weights; tokens of weight 0 do not count.
        trajectory: [n] owner of each token.
        how: ``"token"`` divides by the number of counting tokens, ``"sequence"`` gives every trajectory that
            has one the same share, ``"constant"`` divides by their number times ``length``.

    Returns:
        [n] weights; all zero where nothing counts.
    """
    counts = weight != 0
    per_trajectory = torch.bincount(trajectory, weights=counts.double())
    trajectories = (per_trajectory > 0).sum().clamp(min=1)
    if how == "token":
        return weight / counts.sum().clamp(min=1)
    if how == "sequence":
        return (weight / (per_trajectory[trajectory].clamp(min=1) * trajectories)).to(weight.dtype)
    if length is None:
        raise ConfigError("aggregation 'constant' needs a length")
    return weight / (trajectories * length)


def grpo_streams(experience: Experience, config: OnlineConfig) -> Streams:
    """Advantages relative to the group: every action token gets its trajectory's outcome, centred (and scaled).

    Statistics are over the kept trajectories of each group. Source: Shao et al. 2024 (DeepSeekMath), eq. 3.
    """
    from guerdon.credit import group_relative

    advantage_B = torch.zeros(len(experience), dtype=torch.float64)
    kept = np.flatnonzero(experience.kept)
    if len(kept):
        rewards = torch.from_numpy(experience.rewards[kept])
        ids = torch.from_numpy(experience.group[kept])
        advantage_B[torch.from_numpy(kept)] = group_relative(rewards, ids, scale=config.scale == "std")
    flat = torch.zeros(len(experience.action))
    action = torch.from_numpy(experience.action)
    owner = torch.from_numpy(experience.trajectory)
    flat[action] = advantage_B[owner[action]].float()
    flat = _whiten(flat, experience, config)
    skip = np.zeros(len(experience), dtype=bool)
    if config.skip_zero_variance and config.whiten == "none":
        skip = zero_variance(experience)
    ones = action.float()
    return Streams(flat, ones, ones.clone(), ones.clone(), None, None, skip)


def ppo_streams(experience: Experience, config: OnlineConfig) -> Streams:
    """Generalised advantage estimates over a critic's values, the outcome on the last action token.

    With ``kl_in="reward"`` each action token also pays ``kl_coef`` times its KL estimate between the policy
    before the update and the reference. Environment tokens are no time steps, unless ``whiten="response"``
    asks for the released Router-R1 code's way, in which they are. Source: Schulman et al. 2016, 2017.
    """
    credit = experience.credit
    rewards = torch.zeros(len(credit))
    last = experience.last_action
    kept = np.flatnonzero(experience.kept)
    rewards[torch.from_numpy(last[kept])] = torch.from_numpy(experience.rewards[kept]).float()
    action = torch.from_numpy(experience.action)
    if config.kl_coef > 0 and config.kl_in == "reward":
        from guerdon.training.losses import KL

        assert experience.old is not None and experience.reference is not None
        penalty = KL[config.kl_kind](experience.old, experience.reference)
        rewards -= torch.where(action, config.kl_coef * penalty, 0.0)
    return critic_streams(experience, rewards, config, config.gamma, config.lam)


def critic_streams(experience: Experience, rewards: Tensor, config: OnlineConfig, gamma: float, lam: float) -> Streams:
    """Streams of generalised advantage estimates over given rewards.

    Args:
        experience: with values.
        rewards: [N] float32 reward of each action token.
        config: for whitening.
        gamma, lam: discount and trace decay.
    """
    from guerdon.credit import gae

    assert experience.values is not None
    # Only credit tokens are time steps: they are gathered to the left of a [B, T] grid.
    index = np.flatnonzero(experience.credit)
    grid = Grid(index, experience.trajectory[index], len(experience), len(rewards))
    advantage_BT, target_BT = gae(grid.gather(rewards), grid.gather(experience.values), grid.mask, gamma, lam)
    advantage = _whiten(grid.scatter(advantage_BT), experience, config)
    ones = torch.from_numpy(experience.action).float()
    value = torch.from_numpy(experience.credit).float()
    skip = np.zeros(len(experience), dtype=bool)
    return Streams(advantage, ones, ones.clone(), ones.clone(), value, grid.scatter(target_BT), skip)


def zero_variance(experience: Experience) -> np.ndarray:
    """[B] bool, True for kept trajectories whose group's kept rewards are all equal."""
    kept = experience.kept
    groups = int(experience.group.max(initial=-1)) + 1
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, experience.group[kept], experience.rewards[kept])
    np.maximum.at(high, experience.group[kept], experience.rewards[kept])
    return kept & (low == high)[experience.group]


def _whiten(advantage: Tensor, experience: Experience, config: OnlineConfig) -> Tensor:
    if config.whiten == "none":
        return advantage
    from guerdon.credit import whiten

    mask = experience.action if config.whiten == "action" else experience.kept[experience.trajectory]
    return whiten(advantage, torch.from_numpy(mask))


def weigh(stream: Tensor, experience: Experience, weights: TokenWeights, what: str) -> None:
    """Multiply a term's weights in place by a caller's weights per response token of each trajectory.

    Raises:
        ConfigError: a trajectory gets another number of weights than it has response tokens.
    """
    rows: list[Sequence[float]] = []
    for b, trajectory in enumerate(experience.trajectories):
        row = weights(trajectory)
        length = int(experience.offsets[b + 1] - experience.offsets[b])
        if len(row) != length:
            raise ConfigError(
                f"token_weights[{what!r}] gave {len(row)} weights for {length} response tokens of task "
                f"{trajectory.task.id!r}; return one per response token, environment tokens included"
            )
        rows.append(row)
    stream *= torch.from_numpy(np.fromiter(chain.from_iterable(rows), dtype=np.float32, count=len(stream)))


Credit = Callable[[Experience, "OnlineConfig"], "Tensor | Streams"]
"""A credit rule: advantages per flat token ``[N]``, 0 off the policy's tokens, or whole streams."""


def with_credit(credit: Credit) -> Callable[[Experience, OnlineConfig], Streams]:
    """Make an algorithm of a credit rule: its advantages, and each action token once in every term.

    Raises:
        ConfigError: the rule returned another number of advantages than there are response tokens.
    """

    def algorithm(experience: Experience, config: OnlineConfig) -> Streams:
        made = credit(experience, config)
        if isinstance(made, Streams):
            return made
        advantage = torch.as_tensor(made, dtype=torch.float32)
        if advantage.shape != (len(experience.action),):
            raise ConfigError(
                f"the credit rule returned advantages of shape {tuple(advantage.shape)}, "
                f"one per response token ({len(experience.action)}) is expected"
            )
        action = torch.from_numpy(experience.action)
        ones = action.float()
        advantage = _whiten(torch.where(action, advantage, 0.0), experience, config)
        skip = np.zeros(len(experience), dtype=bool)
        if config.skip_zero_variance and config.whiten == "none":
            skip = experience.kept & ~_stirred(experience, advantage)
        return Streams(advantage, ones, ones.clone(), ones.clone(), None, None, skip)

    return algorithm


def _stirred(experience: Experience, advantage: Tensor) -> np.ndarray:
    """[B] bool, True for trajectories of a group in which any token's advantage is not 0."""
    moved = np.zeros(int(experience.group.max(initial=-1)) + 1, dtype=bool)
    moved[experience.group[experience.trajectory[advantage.numpy() != 0]]] = True
    return moved[experience.group]


ALGORITHMS: dict[str, Callable[[Experience, OnlineConfig], Streams]] = {"grpo": grpo_streams, "ppo": ppo_streams}
