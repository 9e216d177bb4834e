"""Similarity of two texts by static token embeddings, in both directions: a dense reward without a judge.

Source: Xu et al. 2025, "Mixed-R1" (arXiv 2505.24164), Bidirectional Max-Average Similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError
from guerdon.rewards.referenced import AnswerReward

__all__ = ["BMAS", "max_average_similarity"]

_BLOCK = 256


def max_average_similarity(u_MD: Tensor, v_ND: Tensor) -> tuple[float, float]:
    """``P = mean_i max_j cos(u_i, v_j)`` and ``Q = mean_j max_i cos(u_i, v_j)``.

    Args:
        u_MD, v_ND: rows of any length; a row of zeros has cosine 0 with everything.

    Returns:
        P (is what ``u`` says covered by ``v``) and Q (is ``v`` covered by ``u``); both 0 where one side is empty.
    """
    if not len(u_MD) or not len(v_ND):
        return 0.0, 0.0
    u, v = (x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (u_MD, v_ND))
    rows: list[Tensor] = []
    best = torch.full((len(v),), -torch.inf, dtype=u.dtype, device=u.device)
    for start in range(0, len(u), _BLOCK):
        part = u[start : start + _BLOCK] @ v.T
        rows.append(part.amax(1))
        best = torch.maximum(best, part.amax(0))
    return float(torch.cat(rows).double().mean()), float(best.double().mean())


class BMAS(AnswerReward):
    """Mean of both directions of :func:`max_average_similarity`, clipped to [0, 1].

    One direction alone can be had by a short safe answer (P) or an endless enumeration (Q); the parts ``p`` and ``q`` show
    both. The table is copied: it is the initial policy's, and does not move while that learns.

    Args:
        embedding: ``[V, D]`` static input embeddings.
        tokenize: text to token ids below V, special tokens left out.
        mean: ``"arithmetic"``, or ``"harmonic"`` (0 where either is not positive).
        clip: hold the value in [0, 1]; without, it is in [-1, 1].
        mask: token ids that count on neither side (stop words, punctuation), or a function that says so.
        directions: ``"both"``, or only ``"p"`` or ``"q"``, for ablations.
        rescale: ``(floor, 1)`` maps the floor of unrelated texts to 0.
        max_tokens: of each side; longer ones are cut.

    An empty response or reference gives 0. ``bmas(texts, refs)`` on plain lists.
    """

    def __init__(
        self,
        embedding: Tensor,
        tokenize: Callable[[str], Sequence[int]],
        mean: Literal["arithmetic", "harmonic"] = "arithmetic",
        clip: bool = True,
        mask: Collection[int] | Callable[[int], bool] | None = None,
        *,
        directions: Literal["both", "p", "q"] = "both",
        rescale: tuple[float, float] | None = None,
        max_tokens: int = 1024,
        tag: str | None = "answer",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(tag=tag, name=name, on_error=on_error)
        if embedding.ndim != 2 or not len(embedding):
            raise ConfigError(f"embedding must be a table [V, D], got shape {tuple(embedding.shape)}")
        if mean not in ("arithmetic", "harmonic"):
            raise ConfigError(f"mean must be 'arithmetic' or 'harmonic', got {mean!r}")
        if directions not in ("both", "p", "q"):
            raise ConfigError(f"directions must be 'both', 'p' or 'q', got {directions!r}")
        if rescale is not None and not -1 <= rescale[0] < rescale[1] <= 1:
            raise ConfigError(f"rescale must be two increasing numbers in [-1, 1], got {rescale}")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
        self._table = embedding.detach().clone().float()
        self._tokenize, self.mean, self.clip, self.directions = tokenize, mean, clip, directions
        self._masked = mask if callable(mask) else frozenset(mask or ()).__contains__
        self.rescale, self.max_tokens = rescale, max_tokens
        self.range = (0.0, 1.0) if clip else (-1.0, 1.0)

    @classmethod
    def from_policy(cls, policy: Any, **settings: Any) -> BMAS:
        """With the own input embeddings of a :class:`guerdon.policies.Policy` as they are now, and its tokenizer."""
        special = frozenset(policy.tokenizer.all_special_ids)
        return cls(
            policy.model.get_input_embeddings().weight,
            lambda text: [i for i in policy.encode(text) if i not in special],
            **settings,
        )

    def vectors(self, text: str) -> Tensor:
        """Rows of a text's tokens, ``[n, D]`` float32.

        Raises:
            DataError: the tokenizer gives an id outside the table.
        """
        ids = [int(i) for i in self._tokenize(text) if not self._masked(int(i))][: self.max_tokens]
        bad = next((i for i in ids if not 0 <= i < len(self._table)), None)
        if bad is not None:
            raise DataError(f"the tokenizer gives id {bad}, and the embedding table has {len(self._table)} rows")
        return self._table[torch.tensor(ids, dtype=torch.long, device=self._table.device)]

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> Any:
        from guerdon.types import Score

        if not isinstance(reference, str):
            raise DataError(f"a reference text is needed, got {type(reference).__name__}")
        p, q = max_average_similarity(self.vectors(answer), self.vectors(reference))
        return Score(self._combine(p, q), parts={"p": p, "q": q})

    def _combine(self, p: float, q: float) -> float:
        if self.directions != "both":
            value = p if self.directions == "p" else q
        elif self.mean == "arithmetic":
            value = (p + q) / 2
        else:
            value = 2 * p * q / (p + q) if p > 0 and q > 0 else 0.0
        if self.rescale is not None:
            low, high = self.rescale
            value = (value - low) / (high - low)
        return min(1.0, max(0.0, value)) if self.clip else value
