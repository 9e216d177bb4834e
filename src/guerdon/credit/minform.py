"""Credit by the worst step: a response is worth the minimum of its step rewards, not their sum.

Summed step rewards are earned by many steps; under the minimum one bad step caps the return and filler adds nothing.
A soft minimum of the rewards, taken once over a whole response, turns any summing code into a min-form one: the sum
of the transformed rewards from a step on is (nearly) the minimum up to the worst step, and (nearly) 0 behind it.

Source: Cheng et al. 2025 (PURE, arXiv 2504.15275).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from guerdon.credit.temporal import returns
from guerdon.credit.temporal import whiten as whiten_masked

__all__ = [
    "length_baseline",
    "min_form_returns",
    "predicted_correct",
    "pure_advantage",
    "softmin_rewards",
    "sum_form_returns",
]


def softmin_rewards(step_rewards: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """``r*_i = w_i r_i`` with ``w = softmax(-r / temperature)`` over the steps of each response.

    Args:
        step_rewards: ``[B, S]`` (or ``[S]``, one response) reward of each step; a constant, no gradient flows into the
            scorer.
        mask: same shape, True on steps. What stands elsewhere (NaN too) has no weight: a reward of 0 in its place could
            be the minimum.
        temperature: positive. Towards 0 the sum over a response becomes the minimum, towards infinity the mean.

    Returns:
        Same shape, 0 outside the mask; a response without steps is all 0. One step keeps its reward; n equal rewards
        ``c`` become ``c / n`` each.

    Raises:
        ValueError: shapes differ, the temperature is not positive (``min_form_returns(mode="strict")`` is its limit), or
            a step's reward is not finite.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; for the strict minimum use mode='strict'")
    rewards, kept = _steps(step_rewards, mask)
    worst = torch.where(kept, rewards, math.inf).amin(-1, keepdim=True) if rewards.shape[-1] else rewards
    # Relative to the worst step, so that no temperature overflows; a response without steps has no weights at all.
    weight = torch.where(kept, torch.exp(-(torch.where(kept, rewards - worst, 0.0)) / temperature), 0.0)
    total = weight.sum(-1, keepdim=True)
    return torch.where(kept, rewards * weight / torch.where(total > 0, total, 1.0), 0.0)


def min_form_returns(
    step_rewards: Tensor, mask: Tensor, mode: Literal["softmin", "strict"] = "softmin", temperature: float = 0.1
) -> Tensor:
    """Return from each step on under the minimum, ``[B, S]``.

    Args:
        step_rewards, mask: as in :func:`softmin_rewards`. Steps, not tokens: the zeros of tokens between step ends would
            take part in the minimum.
        mode: ``"softmin"``: sum of the transformed rewards from the step on: about the response's minimum up to its worst
            step, about 0 behind it. ``"strict"``: the minimum of the rewards from the step on, behind the worst step too
            (the released code's option; another rule, not the limit of the first).
        temperature: of ``"softmin"``.

    Returns:
        Same shape, 0 outside the mask.

    Raises:
        ValueError: as there, or another mode.
    """
    if mode == "softmin":
        soft = softmin_rewards(step_rewards, mask, temperature)
        return torch.where(mask.bool(), soft.flip(-1).cumsum(-1).flip(-1), 0.0)
    if mode != "strict":
        raise ValueError(f"mode must be 'softmin' or 'strict', got {mode!r}")
    rewards, kept = _steps(step_rewards, mask)
    if not rewards.shape[-1]:
        return rewards
    running = torch.where(kept, rewards, math.inf).flip(-1).cummin(-1).values.flip(-1)
    return torch.where(kept, running, 0.0)


def sum_form_returns(step_rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each step on, ``[B, S]``: what the minimum takes the place of.

    Args:
        step_rewards, mask: as in :func:`softmin_rewards`.
        gamma: discount per step, in [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    rewards, kept = _steps(step_rewards, mask)
    if rewards.ndim == 1:
        return returns(rewards[None], kept[None], gamma)[0]
    return returns(rewards, kept, gamma)


def pure_advantage(
    token_rewards: Tensor,
    mask: Tensor,
    group: Tensor,
    outcome: Tensor | None = None,
    outcome_coef: float = 1.0,
    whiten: bool = True,
    *,
    length: int | None = None,
    centre: bool = True,
) -> Tensor:
    """Advantages from transformed step rewards and verified outcomes, each against the group's other responses.

    ``A_t = coef (v_i - mean_{k != i} v_k) + sum_{s >= t} r*_s - mean_{k != i} (1 / N) sum_u sum_{s >= u} r*_{k,s}``: the
    baseline of the process part is the mean over token positions of the others' returns, one number per response.

    Args:
        token_rewards: ``[B, T]`` transformed rewards, each on the last token of its step, 0 elsewhere. The transform
            comes before (:func:`softmin_rewards`): it knows steps, and is applied to whole responses.
        mask: ``[B, T]`` True on the policy's tokens; only those have returns. Elsewhere anything may stand.
        group: ``[B]`` integer ids, in any order; equal ids, one prompt.
        outcome: ``[B]`` verified outcomes, NaN for a prompt without an answer, whose verified part is 0. Any offset
            cancels. None: process rewards alone.
        outcome_coef: its coefficient.
        whiten: bring the sum of both parts to mean 0 and variance 1 over the masked tokens.
        length: N; the number of columns T by default, which is the padded response length (as in the released verl code;
            the paper does not say whether the longest possible length is meant).
        centre: False leaves the process part without this baseline, for rewards that have one (:func:`length_baseline`).

    Returns:
        ``[B, T]``, 0 outside the mask. A response that is alone in its group has no baseline: it gets 0 and stays out of
        the whitening.

    Raises:
        ValueError: shapes differ, ``length`` is shorter than a response, the coefficient or a masked reward is not finite,
            or an outcome is infinite.
    """
    if token_rewards.ndim != 2 or group.shape != token_rewards.shape[:1]:
        raise ValueError(
            f"expected token_rewards [B, T] and group [B], got {tuple(token_rewards.shape)} and {tuple(group.shape)}"
        )
    rewards, kept = _steps(token_rewards, mask)
    rewards = rewards.double()
    n = rewards.shape[1] if length is None else length
    if n < int(kept.sum(1).max() if kept.numel() else 0):
        raise ValueError(f"length={length} is shorter than the longest response, {int(kept.sum(1).max())} tokens")
    if not math.isfinite(outcome_coef):
        raise ValueError(f"outcome_coef must be finite, got {outcome_coef}")
    ids = torch.unique(group, return_inverse=True)[1]
    togo = torch.where(kept, rewards.flip(-1).cumsum(-1).flip(-1), 0.0)
    everyone = torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)
    others, count = _mean_of_others(togo.sum(1) / max(n, 1), ids, everyone)
    advantage = togo - others[:, None] if centre else togo
    if outcome is not None:
        advantage = advantage + outcome_coef * _outcome_part(outcome, ids)[:, None]
    kept = kept & (count > 0)[:, None]
    advantage = torch.where(kept, advantage, 0.0)
    if whiten:
        chosen = advantage[kept]
        # Equal advantages may differ by rounding; whitened that would not be nothing.
        flat = not len(chosen) or bool(chosen.max() - chosen.min() <= 1e-12 * chosen.abs().max().clamp(min=1.0))
        advantage = torch.zeros_like(advantage) if flat else whiten_masked(advantage, kept)
    return advantage.to(_float(token_rewards))


def length_baseline(
    step_rewards: Tensor,
    mask: Tensor,
    step_tokens: Tensor,
    group: Tensor,
    per: Literal["token", "step"] = "token",
) -> Tensor:
    """The released main branch's baseline: what to subtract at each step's end, ``[B, S]``.

    Args:
        step_rewards: ``[B, S]`` transformed rewards.
        mask: ``[B, S]`` True on steps.
        step_tokens: ``[B, S]`` number of tokens of each step.
        group: ``[B]`` ids.
        per: ``"token"``: reward per token of the others, times the step's number of tokens. ``"step"``: reward per step
            of the others; it favours responses of few long steps and is here to show just that.

    Returns:
        0 outside the mask and for a response that is alone in its group, or whose others have no step.

    Raises:
        ValueError: shapes differ, or ``per`` is none of these.
    """
    if per not in ("token", "step"):
        raise ValueError(f"per must be 'token' or 'step', got {per!r}")
    rewards, kept = _steps(step_rewards, mask)
    if step_tokens.shape != kept.shape or group.shape != kept.shape[:1]:
        raise ValueError(
            f"expected step_tokens {tuple(kept.shape)} and group {tuple(kept.shape[:1])}, got "
            f"{tuple(step_tokens.shape)} and {tuple(group.shape)}"
        )
    size = torch.where(kept, step_tokens.double() if per == "token" else 1.0, 0.0)
    ids = torch.unique(group, return_inverse=True)[1]
    reward_B, size_B = rewards.double().sum(1), size.sum(1)
    rest_reward, rest_size = (_total(x, ids) - x for x in (reward_B, size_B))
    average = torch.where(rest_size > 0, rest_reward / torch.where(rest_size > 0, rest_size, 1.0), 0.0)
    return (average[:, None] * size).to(_float(step_rewards))


def predicted_correct(step_rewards: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """``[B]`` bool: does the step scorer take the response to be right? It does where the transformed sum exceeds 0.

    Compared with a verifier it says how far the scorer can still be trusted. Rewards are in [-1, 1].
    """
    return softmin_rewards(step_rewards, mask, temperature).sum(-1) > 0


def _outcome_part(outcome: Tensor, ids: Tensor) -> Tensor:
    if outcome.shape != ids.shape:
        raise ValueError(f"outcome {tuple(outcome.shape)} must be [B] with B = {len(ids)}")
    values = outcome.detach().double()
    if bool(values.isinf().any()):
        raise ValueError("outcomes must be finite, or NaN where a prompt has no answer")
    known = ~values.isnan()
    values = torch.where(known, values, 0.0)
    others, count = _mean_of_others(values, ids, known)
    return torch.where(known & (count > 0), values - others, 0.0)


def _mean_of_others(values_B: Tensor, ids_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the other valid members of each row's group, 0 where there is none; and how many there are."""
    weight = valid_B.double()
    values = torch.where(valid_B, values_B, 0.0)
    count = _total(weight, ids_B) - weight
    rest = _total(values, ids_B) - values
    return torch.where(count > 0, rest / count.clamp(min=1), 0.0), count


def _total(values_B: Tensor, ids_B: Tensor) -> Tensor:
    groups = int(ids_B.max()) + 1 if ids_B.numel() else 0
    return torch.zeros(groups, dtype=values_B.dtype, device=values_B.device).index_add_(0, ids_B, values_B)[ids_B]


def _steps(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards without gradient and 0 outside the mask, and the mask as bool."""
    if rewards.shape != mask.shape or rewards.ndim not in (1, 2):
        raise ValueError(
            f"rewards and mask must have one shape [B, S] or [S], got {tuple(rewards.shape)} and {tuple(mask.shape)}"
        )
    kept = mask.bool()
    values = torch.where(kept, rewards.detach().to(_float(rewards)), 0.0)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{bad} rewards inside the mask are not finite; leave such responses out")
    return values, kept


def _float(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32
