"""What a batch of responses looks like, reward aside: length, repetition, copying, truncation, KL, entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.rewards.repetition import copied_share, repeated_share
from guerdon.types import Trajectory, policy_text, response_ids

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["MONITORS", "SequenceKl", "experience_kl", "text_monitors"]

MONITORS = ("length", "length_max", "repetition", "copying", "truncated", "empty", "duplicates", "entropy")
"""Keys of :func:`text_monitors`."""


def text_monitors(trajectories: Sequence[Trajectory], *, ngram: int = 4) -> dict[str, float]:
    """Numbers of a batch that move when a policy finds a way round its reward.

    Args:
        trajectories: of one step; an empty batch gives NaN everywhere.
        ngram: words per n-gram for repetition and copying.

    Returns:
        ``length`` (mean policy tokens; words of a turn where an engine records no ids), ``length_max``, ``repetition``
        (mean share of word n-grams that repeat an earlier one of the same response), ``copying`` (mean share that occurs
        in the prompt), ``truncated`` (share that the policy did not choose to end), ``empty`` (share of blank
        responses), ``duplicates`` (share of responses equal to an earlier one for the same task), and ``entropy`` (mean of
        minus the sampled log-probability over policy tokens, NaN where none is recorded).
    """
    texts = [policy_text(t) for t in trajectories]
    lengths = [_length(t) for t in trajectories]
    logprobs = [x for t in trajectories for turn in t.turns for x in turn.logprobs or ()]
    seen: set[tuple[str, str]] = set()
    duplicates = 0
    for trajectory, text in zip(trajectories, texts, strict=True):
        key = (trajectory.task.id, text)
        duplicates += key in seen
        seen.add(key)
    return {
        "length": _mean(lengths),
        "length_max": float(max(lengths, default=math.nan)),
        "repetition": _mean([repeated_share(text, ngram) for text in texts]),
        "copying": _mean([copied_share(text, _prompt(t), ngram) for t, text in zip(trajectories, texts, strict=True)]),
        "truncated": _mean([t.stop.truncated for t in trajectories]),
        "empty": _mean([not text.strip() for text in texts]),
        "duplicates": duplicates / len(texts) if texts else math.nan,
        "entropy": -_mean(logprobs),
    }


def experience_kl(experience: Any) -> float:
    """Mean over kept trajectories of ``sum_t log pi(a_t) - log pi_ref(a_t)``; NaN where no reference was scored.

    This is the k1 estimate of the sequence KL in nats: unbiased, and negative by chance on small samples.

    Args:
        experience: :class:`guerdon.training.streams.Experience`.
    """
    if experience.reference is None or not experience.kept.any():
        return math.nan
    now = experience.sampled if experience.old is None else experience.old
    action = experience.action
    difference = (now.double() - experience.reference.double()).numpy()[action]
    sums = np.bincount(experience.trajectory[action], weights=difference, minlength=len(experience))
    return _mean(sums[experience.kept])


class SequenceKl:
    """The sequence KL of sampled trajectories to a reference policy, in nats, where training keeps no reference.

    Args:
        reference: frozen policy with the tokenizer of the one that sampled.
        temperature: at which the trajectories were sampled; both sides must be of one distribution. Sampling with top-p or
            top-k has another support than the reference, and the result is then no KL.
        max_tokens: per forward pass.

    The estimate is k1: the mean over trajectories of the summed differences of log-probabilities.
    """

    def __init__(self, reference: Policy, *, temperature: float = 1.0, max_tokens: int = 8192) -> None:
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature must be positive and finite, got {temperature}")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
        self.reference, self.temperature, self.max_tokens = reference, temperature, max_tokens

    def __call__(self, trajectories: Sequence[Trajectory]) -> float:
        """The mean over trajectories whose policy turns all carry log-probabilities; NaN where there is none."""
        import torch

        from guerdon.policies.logprobs import token_logprobs
        from guerdon.policies.packing import make_batches
        from guerdon.types import action_mask, response_logprobs

        usable = [t for t in trajectories if _recorded(t)]
        if not usable:
            return math.nan
        items = [(t.prompt_ids, response_ids(t)) for t in usable]
        masks = [action_mask(t) for t in usable]
        sampled = [response_logprobs(t) for t in usable]
        device = self.reference.device
        self.reference.model.eval()
        total = 0.0
        with torch.no_grad():
            for batch in make_batches(items, groups=None, max_tokens=self.max_tokens, share_prompt=False):
                made = token_logprobs(self.reference, batch.to(device), temperature=self.temperature)
                scored = made.logprobs.double().cpu().tolist()
                where = zip(batch.trajectory.tolist(), batch.position.tolist(), strict=True)
                for (i, k), reference in zip(where, scored, strict=True):
                    if masks[i][k]:
                        total += sampled[i][k] - reference
        return total / len(usable)


def _recorded(trajectory: Trajectory) -> bool:
    turns = [t for t in trajectory.turns if t.speaker == "policy" and (t.text or t.token_ids)]
    return bool(turns) and bool(trajectory.prompt_ids) and all(t.logprobs for t in turns)


def _length(trajectory: Trajectory) -> int:
    turns = [t for t in trajectory.turns if t.speaker == "policy"]
    return sum(len(t) if t.token_ids else len(t.text.split()) for t in turns)


def _prompt(trajectory: Trajectory) -> str:
    return "\n".join(_content(m) for m in trajectory.task.prompt)


def _content(message: Mapping[str, Any]) -> str:
    """Text of a message; of one with several parts, the text parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan
