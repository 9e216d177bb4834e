"""A policy's own judgement of its reasoning: log-probabilities of a reference behind each trace, and the reward of them.

Source: Xu et al. 2025, "Direct Reasoning Optimization" (arXiv 2506.13351).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.shaping.reflection import ReasoningReflection, outcome_length_reward
from guerdon.types import Score, Trajectory, policy_text

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["ReflectionReward", "reference_logprobs", "score_reference"]


@torch.no_grad()
def score_reference(
    model: Any, contexts: Sequence[Sequence[int]], reference: Sequence[int], batch_size: int = 8, *, pad_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probability and rank of each reference token behind each context.

    Args:
        model: a causal language model; position j predicts token j + 1.
        contexts: ``G`` lists of token ids, each at least one.
        reference: ``T`` token ids, the same behind every context.
        batch_size: contexts of one forward pass.
        pad_id: fills rows on the right.

    Returns:
        ``[G, T]`` float32 log-probabilities, and ``[G, T]`` int64 ranks (1: no token is more likely).

    Raises:
        DataError: an empty reference or context.
    """
    if not len(reference):
        raise DataError("the reference has no tokens; nothing can be predicted")
    if any(not len(c) for c in contexts):
        raise DataError("a context has no tokens; the first reference token needs one before it")
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    logprobs, ranks = [], []
    try:
        for start in range(0, len(contexts), batch_size):
            rows = [[*c, *reference] for c in contexts[start : start + batch_size]]
            width = max(map(len, rows))
            ids = torch.tensor([r + [pad_id] * (width - len(r)) for r in rows], device=device)
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
            logits = model(input_ids=ids, attention_mask=mask).logits
            for k, row in enumerate(rows):
                first = len(row) - len(reference)
                table = logits[k, first - 1 : len(row) - 1].float()
                wanted = ids[k, first : len(row)]
                own = table.gather(1, wanted[:, None])
                logprobs.append((own[:, 0] - table.logsumexp(1)).cpu())
                ranks.append((1 + (table > own).sum(1)).cpu())
    finally:
        model.train(was)
    return torch.stack(logprobs), torch.stack(ranks)


def reference_logprobs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | str,
    reasonings: Sequence[str],
    reference: str,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """:func:`score_reference` on texts.

    Args:
        model, tokenizer: of the scoring policy.
        prompts: of each trace (or one for all), as the model reads them.
        reasonings: ``G`` traces up to and including the end-of-reasoning marker and any fixed prefix of the outcome.
        reference: the reference outcome. It is tokenised by itself, so that its tokens are the same behind every trace.
        batch_size: traces of one forward pass.
    """
    if isinstance(prompts, str):
        prompts = [prompts] * len(reasonings)
    if len(prompts) != len(reasonings):
        raise ConfigError(f"{len(prompts)} prompts for {len(reasonings)} reasonings")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    contexts = [encode(p + r) for p, r in zip(prompts, reasonings, strict=True)]
    return score_reference(model, contexts, encode(reference), batch_size)


class ReflectionReward(Reward):
    """``lambda_r3 * R3 + lambda_len * r_len`` within each group of trajectories of one task.

    Args:
        policy: the scoring policy: the one that is trained (synced), a frozen reference, or a copy that lags behind.
        reflection: how R3 is computed.
        start, end: marks around the reasoning. A trace without the end mark gets an invalid score; use
            ``on_error="drop"``, which leaves such trajectories out of loss and group statistics.
        prefix: fixed text between the end mark and the outcome.
        lambda_r3, lambda_len, beta_len: weights and the slope of the length term (not published; 1 each).
        encode_outcome: text of an outcome to its number of tokens; by default the policy's tokenizer.
        batch_size: of the forward passes.

    The reference is ``task.reference``, a text. Parts: ``r3``, ``length``.
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        policy: Policy,
        reflection: ReasoningReflection | None = None,
        *,
        start: str = "<think>",
        end: str = "</think>",
        prefix: str = "",
        lambda_r3: float = 1.0,
        lambda_len: float = 1.0,
        beta_len: float = 1.0,
        encode_outcome: Callable[[str], int] | None = None,
        batch_size: int = 16,
        name: str | None = None,
        on_error: OnError = "drop",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not end:
            raise ConfigError("end must not be empty: it tells where the reasoning ends")
        self.policy, self.reflection = policy, reflection or ReasoningReflection()
        self.start, self.end, self.prefix = start, end, prefix
        self.lambda_r3, self.lambda_len, self.beta_len = lambda_r3, lambda_len, beta_len
        self._count = encode_outcome or (lambda text: len(policy.encode(text)))
        self.batch_size = batch_size

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score all groups of a batch."""
        groups: dict[str, list[int]] = {}
        for k, t in enumerate(trajectories):
            groups.setdefault(t.task.id, []).append(k)
        out: list[Score] = [Score.invalid("not scored")] * len(trajectories)
        for index in groups.values():
            for k, score in zip(index, self._group([trajectories[k] for k in index]), strict=True):
                out[k] = score
        return out

    def _group(self, members: Sequence[Trajectory]) -> list[Score]:
        task = members[0].task
        if not isinstance(task.reference, str) or not task.reference.strip():
            raise DataError(f"task {task.id!r} has no reference text")
        texts = [policy_text(t) for t in members]
        whole = [self.end in text for text in texts]
        none = Score.invalid("the reasoning does not end (no end mark)")
        if sum(whole) < 2:
            few = Score.invalid("fewer than two traces of the group have an end of reasoning")
            return [few if ok else none for ok in whole]
        encode = self.policy.encode
        reference = encode(task.reference)
        chosen = [k for k, ok in enumerate(whole) if ok]
        prompts = [list(members[k].prompt_ids) or encode(task.question) for k in chosen]
        cut = [texts[k].index(self.end) + len(self.end) for k in chosen]
        traces = [p + encode(texts[k][:stop] + self.prefix) for p, k, stop in zip(prompts, chosen, cut, strict=True)]
        masked = [*prompts[0], *encode(f"{self.start}{self.end}{self.prefix}")]
        L, _ = score_reference(self.policy.model, [*traces, masked], reference, self.batch_size)
        r3 = self.reflection(L[:-1], L[-1]).tolist()
        lengths = outcome_length_reward(
            [self._count(texts[k][stop:]) for k, stop in zip(chosen, cut, strict=True)], len(reference), self.beta_len
        )
        out = [none] * len(members)
        for k, value, length in zip(chosen, r3, np.asarray(lengths).tolist(), strict=True):
            total = self.lambda_r3 * value + self.lambda_len * length
            out[k] = Score(total, parts={"r3": value, "length": length})
        return out
