"""An implicit process reward model that learns on line, from the outcomes of the policy's own rollouts.

Source: Cui, Yuan, Wang et al. 2025 (PRIME, arXiv 2502.01456), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.credit.channels import pairwise_accuracy
from guerdon.errors import ConfigError, DataError
from guerdon.objectives.implicit import implicit_ce
from guerdon.reward_models.implicit import ImplicitPRM, check_labels
from guerdon.reward_models.logratio import Responses
from guerdon.types import Score, Segmenter, Trajectory, response_logprobs

__all__ = ["PrimeReward"]


class PrimeReward(ImplicitPRM):
    """Token rewards for a batch of rollouts, and then an update of itself on their outcomes.

    The model begins as the policy (the supervised checkpoint), so that its first rewards are 0. As a trainer's
    ``shape`` it gives every score token values; :class:`guerdon.training.rules.prime.PrimeCredit` wires it with the
    paper's filter and credit.

    Args:
        model, ref_model, tokenizer, beta, segmenter, max_tokens_per_microbatch: as of :class:`ImplicitPRM`.
        lr: of AdamW, constant; the default is that of a 7 B model.
        grad_clip: largest norm of the gradient.
        minibatch_size: responses of one optimiser step; a batch is passed once.
        order: ``"after"``: rewards are those before the update (from the very same forward pass where the batch is one
            minibatch). ``"before"``: update first, then compute the rewards, at the cost of a second pass.
        granularity: ``"token"``, or ``"whole"``: the sum of a response's rewards on its last token.
        reference: ``"frozen"``, or ``"sampled"``: the log-probabilities that were recorded when the policy sampled the
            response (at temperature 1) stand in for the reference, which costs no forward pass.

    Attributes:
        learning: False makes it a fixed scorer: :meth:`step` gives rewards and updates nothing.
        updates: optimiser steps so far.
        metrics: of the last batch: ``loss``, ``updates``, and the pairwise accuracy of the sums of its rewards,
            ``accuracy_before`` the update and ``accuracy_after`` it (the latter with ``measure_after``, at the cost of
            one more forward pass, or with order ``"before"``).
    """

    name = "prime_reward"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        tokenizer: Any = None,
        beta: float = 0.05,
        *,
        lr: float = 1e-6,
        grad_clip: float = 10.0,
        minibatch_size: int = 256,
        order: Literal["after", "before"] = "after",
        granularity: Literal["token", "whole"] = "token",
        reference: Literal["frozen", "sampled"] = "frozen",
        measure_after: bool = False,
        segmenter: Segmenter | None = None,
        max_tokens_per_microbatch: int = 16_384,
    ) -> None:
        super().__init__(
            model, ref_model, tokenizer, beta, "ce",
            segmenter=segmenter, max_tokens_per_microbatch=max_tokens_per_microbatch,
        )  # fmt: skip
        for name, value, allowed in (
            ("order", order, ("after", "before")),
            ("granularity", granularity, ("token", "whole")),
            ("reference", reference, ("frozen", "sampled")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        if minibatch_size < 1 or not lr > 0 or not grad_clip > 0:
            raise ConfigError(
                f"minibatch_size, lr and grad_clip must be positive, got {minibatch_size}, {lr} and {grad_clip}"
            )
        self.order, self.granularity, self.reference_kind = order, granularity, reference
        self.minibatch_size, self.grad_clip, self.measure_after = minibatch_size, grad_clip, measure_after
        self.optimiser = self._optimiser(lr, 0.0)
        self.learning = True
        self.updates = 0
        self.metrics: dict[str, float] = {}

    def step(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any] | None = None,
        outcomes: Sequence[Any] | Tensor | None = None,
        *,
        group: Sequence[int] | None = None,
        old_logprobs: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """Rewards of a batch of rollouts; the model then learns from the outcomes (or first, with ``order="before"``).

        Args:
            prompts, responses: as of :class:`ImplicitPRM`.
            outcomes: verifier's verdict on each, in [0, 1].
            group: number of each response's prompt, for the pairwise accuracy; by default equal prompts are one.
            old_logprobs: with ``reference="sampled"`` and text: log-probability of each response token under the
                policy that sampled it. Trajectories carry them.

        Returns:
            ``[B, T]`` float ``beta * log-ratio`` of each response token, 0 on padding and on environment tokens.
            It carries no gradient.

        Raises:
            DataError: outcomes of another number or out of range, or old log-probabilities that are missing.
            TrainingError: a loss or gradient is not finite; that step changed no weight.
        """
        trajectories = self._trajectories(prompts, responses)
        rows = self.step_trajectories(trajectories, outcomes, group=group, old_logprobs=old_logprobs)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)

    def step_trajectories(
        self,
        trajectories: Sequence[Trajectory],
        outcomes: Sequence[Any] | Tensor | None,
        *,
        group: Sequence[int] | None = None,
        old_logprobs: Sequence[Sequence[float]] | None = None,
    ) -> list[Tensor]:
        """:meth:`step` with one ``[T]`` tensor per response in place of a padded grid."""
        made = Responses.from_trajectories(trajectories)
        labels = check_labels(outcomes, len(made), soft=True)
        reference_N = self._old(trajectories, made, old_logprobs)
        busy = torch.nonzero(made.counts).squeeze(1)
        ids = _groups(made, group)
        before_N: Tensor | None = None
        if not self.learning or (self.order == "after" and not 0 < len(busy) <= self.minibatch_size):
            before_N = self._ratio(made, reference_N)
        losses: list[float] = []
        for start in range(0, len(busy) if self.learning else 0, self.minibatch_size):
            rows = busy[start : start + self.minibatch_size]
            loss, ratio = self._learn(made, rows, labels, reference_N, len(losses))
            losses.append(loss)
            if before_N is None and len(busy) <= self.minibatch_size:
                before_N = torch.zeros_like(reference_N)
                before_N[made.flat(rows)] = ratio
        after_N = None
        if self.learning and (self.order == "before" or self.measure_after):
            after_N = self._ratio(made, reference_N)
        given = after_N if after_N is not None and self.order == "before" else before_N
        assert given is not None
        self.metrics = {"updates": float(len(losses))}
        if losses:
            self.metrics["loss"] = sum(losses) / len(losses)
        for name, ratio_N in (("accuracy_before", before_N), ("accuracy_after", after_N)):
            if ratio_N is not None:
                sums = torch.zeros(len(made), dtype=ratio_N.dtype).index_add_(0, made.owner, ratio_N)
                self.metrics[name] = float(pairwise_accuracy(sums, labels, ids))
        rewards = made.split(self.beta * given)
        return [_whole(r, m) for r, m in zip(rewards, made.split(made.mask), strict=True)] if (
            self.granularity == "whole"
        ) else rewards  # fmt: skip

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """As a trainer's ``shape``: valid scores get token values, and their outcomes train the model.

        Invalid scores stay as they are. Trajectories of one task are one group.

        Raises:
            DataError: a valid score's value is outside [0, 1].
        """
        if len(trajectories) != len(scores):
            raise DataError(f"{len(scores)} scores for {len(trajectories)} trajectories")
        out = list(scores)
        valid = [b for b, s in enumerate(scores) if s.valid]
        numbers: dict[str, int] = {}
        rows = self.step_trajectories(
            [trajectories[b] for b in valid],
            [scores[b].value for b in valid],
            group=[numbers.setdefault(trajectories[b].task.id, len(numbers)) for b in valid],
        )
        for b, row in zip(valid, rows, strict=True):
            s = scores[b]
            parts = {**s.parts, "prime/process": float(row.sum())}
            out[b] = Score(s.value, s.steps, s.step_spans, tuple(row.tolist()), parts)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, and number of updates: a resumed run goes on exactly."""
        state = self.optimiser.state_dict()
        copied = {
            k: {n: v.clone() if isinstance(v, Tensor) else v for n, v in s.items()} for k, s in state["state"].items()
        }
        return {
            **super().state_dict(),
            "optimiser": {"state": copied, "param_groups": [dict(g) for g in state["param_groups"]]},
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.optimiser.load_state_dict(dict(state["optimiser"]))
        self.updates = int(state["updates"])

    def _old(
        self, trajectories: Sequence[Trajectory], made: Responses, old_logprobs: Sequence[Sequence[float]] | None
    ) -> Tensor:
        """[N] log-probabilities of the reference."""
        if self.reference_kind == "frozen":
            if old_logprobs is not None:
                raise ConfigError("old_logprobs are read with reference='sampled' only; leave them out")
            return self._reference(made)
        rows: list[Sequence[float]] = []
        for b, t in enumerate(trajectories):
            try:
                rows.append(response_logprobs(t) if old_logprobs is None else old_logprobs[b])
            except (ValueError, IndexError):
                raise DataError(
                    f"reference='sampled' needs the log-probabilities recorded at sampling, and response {b} has none; "
                    "give old_logprobs, or use reference='frozen'"
                ) from None
            if len(rows[-1]) != len(made.items[b][1]):
                raise DataError(
                    f"response {b} has {len(made.items[b][1])} tokens but {len(rows[-1])} old log-probabilities"
                )
        flat = torch.tensor([x for row in rows for x in row], dtype=torch.float32)
        return torch.where(made.mask, flat, 0.0)

    def _ratio(self, made: Responses, reference_N: Tensor) -> Tensor:
        from guerdon.reward_models.logratio import logprobs

        return logprobs(self.policy, made, max_tokens=self._max_tokens) - reference_N

    def _learn(
        self, made: Responses, rows: Tensor, labels: Tensor, reference_N: Tensor, minibatch: int
    ) -> tuple[float, Tensor]:
        part, wanted = made.select(rows), labels[rows]
        value, ratio = self._update(
            self.optimiser,
            part,
            reference_N[made.flat(rows)],
            lambda rewards, some: implicit_ce(rewards[some], wanted[some], soft=True).sum() / len(rows),
            True,
            self.grad_clip,
            where=f"update {self.updates + 1} (minibatch {minibatch + 1})",
        )
        self.updates += 1
        return value, ratio


def _whole(rewards_T: Tensor, mask_T: Tensor) -> Tensor:
    out = torch.zeros_like(rewards_T)
    last = torch.nonzero(mask_T)
    if len(last):
        out[last[-1]] = rewards_T.sum()
    return out


def _groups(made: Responses, group: Sequence[int] | None) -> Tensor:
    if group is not None:
        if len(group) != len(made):
            raise DataError(f"group has {len(group)} entries for {len(made)} responses")
        return torch.as_tensor(list(group), dtype=torch.int64)
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(p, len(numbers)) for p, _ in made.items], dtype=torch.int64)
