"""Drawing tokens: one uniform number per token, inverted through the cumulative distribution of the kept tokens.

A stream's uniforms come from its own counter-based generator, so its tokens do not depend on which other streams
share a batch (up to rounding in the model's forward pass).
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["BLOCK", "Uniforms", "sample"]

BLOCK = 64
_PREFIX = 256


class Uniforms:
    """An endless sequence of float32 numbers in [0, 1) that depends on ``seed`` alone, read in blocks of 64."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator = np.random.Generator(np.random.Philox(key=seed & ((1 << 128) - 1)))
        self.block = self._generator.random(BLOCK, dtype=np.float32)
        self.used = 0

    def refill(self) -> np.ndarray:
        """Replace the block by the next one and return it."""
        self.block = self._generator.random(BLOCK, dtype=np.float32)
        self.used = 0
        return self.block


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row, and its log-probability under the distribution it was drawn from.

    The order is the customary one: temperature, then the ``top_k`` largest, then the smallest set of the most
    probable tokens whose mass reaches ``top_p``; what remains is renormalised.

    Args:
        logits: [B, V].
        uniforms: [B] float32 in [0, 1).
        temperature: [B] float32; 0 takes the most probable token and reports log-probabilities at temperature 1.
            None: all are 1.
        top_k: [B] int64, 0 keeps all; None where no row asks for it.
        top_p: [B] float32, 1 keeps all; None where no row asks for it.

    Returns:
        tokens [B] int64 and log-probabilities [B] float32; a row whose logits are not finite has NaN.
    """
    greedy = None
    scaled = logits.float()
    if temperature is not None:
        greedy = temperature == 0
        scaled = scaled / torch.where(greedy, 1.0, temperature)[:, None]
    if top_k is not None or top_p is not None:
        never = torch.zeros(len(scaled), dtype=torch.bool, device=scaled.device)
        scaled = _restrict(scaled, never if greedy is None else greedy, top_k, top_p)
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    total = weights.sum(-1)
    cdf = weights.cumsum(-1)
    mass = cdf[:, -1]
    # Strictly below the whole mass: rounding may not step past the last token that has any.
    level = torch.minimum(uniforms * mass, torch.nextafter(mass, torch.zeros_like(mass)))
    tokens = torch.searchsorted(cdf, level[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    if greedy is not None:
        tokens = torch.where(greedy, scaled.argmax(-1), tokens)
    logprobs = scaled.gather(-1, tokens[:, None])[:, 0] - top[:, 0] - total.log()
    return tokens, logprobs


def _restrict(
    scaled: torch.Tensor, greedy: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """Put -inf on the tokens outside of top-k and top-p; greedy rows are left whole."""
    size = scaled.shape[-1]
    keep = torch.full_like(greedy, size, dtype=torch.long)
    if top_k is not None:
        keep = torch.where((top_k > 0) & ~greedy, top_k.clamp(max=size), keep)
    limit = torch.ones(len(scaled), device=scaled.device) if top_p is None else torch.where(greedy, 1.0, top_p)
    rows = torch.nonzero((keep < size) | (limit < 1))[:, 0]
    if len(rows) == 0:
        return scaled
    part, keep, limit = scaled[rows], keep[rows], limit[rows]
    # Sorting a whole vocabulary is slow and rarely needed: try the most probable few first.
    width = min(size, max(_PREFIX, int(keep[keep < size].max()) if (keep < size).any() else 0))
    while True:
        values, order = part.topk(width, dim=-1)
        within = torch.arange(width, device=part.device) < keep[:, None]
        masked = values.masked_fill(~within, -torch.inf)
        # Rows with top-k normalise over what it kept, the others over the whole vocabulary.
        norm = torch.where(keep < size, masked.logsumexp(-1), part.logsumexp(-1))
        before = (masked - norm[:, None]).exp().cumsum(-1)
        if width == size or bool(((before[:, -1] >= limit) | (keep <= width)).all()):
            break
        width = min(size, width * 8)
    before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], dim=-1)
    kept = within & ((before < limit[:, None]) | (limit[:, None] >= 1))
    kept[:, 0] = True
    out = torch.full_like(part, -torch.inf)
    out.scatter_(-1, order, values.masked_fill(~kept, -torch.inf))
    result = scaled.clone()
    result[rows] = out
    return result
