"""Shapers of scalar rewards by name: Preference As Reward (PAR) and everything that it was compared with.

A shaper maps ``[B]`` rewards, and where it needs them reference rewards, to ``[B]`` rewards. Shape first, subtract a KL
penalty or normalise advantages afterwards: neither belongs inside. Source: Fu et al. 2025 (arXiv 2502.18770).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guerdon.errors import ConfigError, UnknownName, nearest
from guerdon.shaping.relative import (
    References,
    _check_k,
    _out,
    _rewards,
    centred,
    fitted_sigmoid,
    log_sigmoid_gaussian,
    preference_probability,
    relative,
    slow_growth,
)

__all__ = ["SHAPERS", "PreferenceAsReward", "RewardShaper", "apply_ceiling", "penalise_length", "shape", "shaper"]


class RewardShaper:
    """Base of shapers: called with rewards ``[B]`` and references, returns ``[B]``.

    Attributes:
        name: for logs.
        needs_references: a call without reference rewards is refused.
    """

    name: str = "shaper"
    needs_references: bool = False

    def __call__(self, rewards: Tensor, ref_rewards: References | None = None) -> Tensor:
        """Shape ``[B]`` rewards."""
        raise TypeError(f"{type(self).__name__} must override __call__")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty for shapers without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


class PreferenceAsReward(RewardShaper):
    """Preference As Reward: the reward model's own probability that a response beats a reference response.

    See :func:`guerdon.shaping.preference_probability` for the formula.

    Args:
        k: steepness, positive; 1 is the Bradley-Terry probability.
        max_refs: references read per prompt; one is enough, says the study.

    The references are responses of the initial policy, sampled and scored once before RL and frozen from then on.
    """

    name = "par"
    needs_references = True

    def __init__(self, k: float = 1.0, max_refs: int = 10) -> None:
        preference_probability(torch.zeros(0), [], k, max_refs)
        self.k, self.max_refs = k, max_refs

    def __call__(self, rewards: Tensor, ref_rewards: References | None = None) -> Tensor:
        """``[B]`` rewards and ``[B, M]`` (or ragged) references to ``[B]`` in (0, 1).

        Raises:
            ConfigError: no references, or none for some row.
            ValueError: shapes do not fit, or a value is NaN or infinite.
        """
        return preference_probability(rewards, ref_rewards, self.k, self.max_refs)  # type: ignore[arg-type]


class _Function(RewardShaper):
    """A shaper without memory made of a function."""

    def __init__(self, name: str, function: Callable[..., Tensor], needs_references: bool) -> None:
        self.name, self.function, self.needs_references = name, function, needs_references

    def __call__(self, rewards: Tensor, ref_rewards: References | None = None) -> Tensor:
        if self.needs_references:
            return self.function(rewards, ref_rewards)
        return self.function(_rewards(rewards)).to(_out(rewards))


def _vanilla() -> RewardShaper:
    return _Function("vanilla", lambda r: r, False)


def _running(mode: str) -> RewardShaper:
    from guerdon.shaping.running import RunningShaper

    return RunningShaper(mode)  # type: ignore[arg-type]


def _ceil(c: float = 4.0) -> RewardShaper:
    apply_ceiling(torch.zeros(0), c)
    return _Function("ceil", partial(apply_ceiling, ceiling=c), False)


def _lsc(q: float = 0.85, max_refs: int = 10) -> RewardShaper:
    log_sigmoid_gaussian(torch.zeros(0), [], q, max_refs)
    return _Function("lsc", partial(log_sigmoid_gaussian, q=q, max_refs=max_refs), True)


def _log_sigmoid(
    reference: str = "quantile", q: float = 0.85, estimator: str = "empirical", scale: float = 1.0
) -> RewardShaper:
    from guerdon.shaping.log_sigmoid import LogSigmoidCentered

    return _Function("log_sigmoid", LogSigmoidCentered(reference, q, estimator, scale).rows, True)  # type: ignore[arg-type]


def _centred(max_refs: int = 10) -> RewardShaper:
    centred(torch.zeros(0), [], max_refs)
    return _Function("centred", partial(centred, max_refs=max_refs), True)


def _relative_tanh(max_refs: int = 10) -> RewardShaper:
    return _relative("relative_tanh", torch.tanh, max_refs)


def _relative_poly(max_refs: int = 10) -> RewardShaper:
    return _relative("relative_poly", fitted_sigmoid, max_refs)


def _relative(name: str, function: Callable[[Tensor], Tensor], max_refs: int) -> RewardShaper:
    centred(torch.zeros(0), [], max_refs)
    return _Function(name, partial(relative, function=function, max_refs=max_refs), True)


def _sgfc(k: float = 3.0, shift: float = 3.0, max_refs: int = 10) -> RewardShaper:
    slow_growth(torch.zeros(0), [], k, shift, max_refs)
    return _Function("sgfc", partial(slow_growth, k=k, shift=shift, max_refs=max_refs), True)


def _pure_sigmoid(k: float = 1.0) -> RewardShaper:
    _check_k(k)
    return _Function("pure_sigmoid", lambda r: torch.sigmoid(k * r), False)


SHAPERS: dict[str, Callable[..., RewardShaper]] = {
    "vanilla": _vanilla,
    "meanstd": lambda: _running("meanstd"),
    "clip": lambda: _running("clip"),
    "minmax": lambda: _running("minmax"),
    "lsc": _lsc,
    "log_sigmoid": _log_sigmoid,
    "ceil": _ceil,
    "centred": _centred,
    "relative_tanh": _relative_tanh,
    "relative_poly": _relative_poly,
    "sgfc": _sgfc,
    "pure_sigmoid": _pure_sigmoid,
    "pure_tanh": lambda: _Function("pure_tanh", torch.tanh, False),
    "pure_poly": lambda: _Function("pure_poly", fitted_sigmoid, False),
    "par": PreferenceAsReward,
}
"""Factories by the name of the method."""


def shaper(method: str = "par", **settings: Any) -> RewardShaper:
    """Make a shaper.

    Args:
        method: ``"vanilla"`` (unchanged), ``"meanstd"``, ``"clip"``, ``"minmax"`` (running statistics), ``"lsc"``
            (log-sigmoid with PAR's Gaussian quantile: ``q``, ``max_refs``), ``"log_sigmoid"`` (the transform's own paper:
            ``reference``, ``q``, ``estimator``, ``scale``; see :class:`LogSigmoidCentered`), ``"ceil"`` (``min(r, c)``; the study tries c = 3, 4, 5, here 4 unless
            given), ``"centred"``, ``"relative_tanh"``, ``"relative_poly"`` (``max_refs``), ``"sgfc"`` (``k``,
            ``shift``, ``max_refs``), ``"pure_sigmoid"`` (``k``), ``"pure_tanh"``, ``"pure_poly"`` (uncentred
            counter-examples), or ``"par"`` (``k``, ``max_refs``).
        settings: of the method.

    Raises:
        UnknownName: no such method.
        ConfigError: a setting that the method has not, or one out of range.
    """
    if method not in SHAPERS:
        raise UnknownName(f"unknown shaping {method!r}{nearest(method, SHAPERS)}; known: {', '.join(SHAPERS)}")
    known = inspect.signature(SHAPERS[method]).parameters
    for key in settings:
        if key not in known:
            raise ConfigError(f"shaping {method!r} has no setting {key!r}; it has {', '.join(known) or 'none'}")
    return SHAPERS[method](**settings)


def shape(
    rewards: Tensor,
    method: str | RewardShaper = "par",
    ref_rewards: References | None = None,
    *,
    lengths: Tensor | None = None,
    ceiling: float | None = None,
    **settings: Any,
) -> Tensor:
    """Shape ``[B]`` rewards in the study's order: ceiling, then length penalty, then the method.

    Args:
        rewards: ``[B]``, finite.
        method: a name (see :func:`shaper`), or a shaper, which keeps its statistics from call to call; by name, the
            running methods see this batch only.
        ref_rewards: ``[B, M]`` or one row per reward, for the methods that need them; others ignore them.
        lengths: ``[B]`` tokens of the responses; given, :func:`penalise_length` is applied with the study's constants.
        ceiling: first hold rewards under this; off by default.
        settings: of the method.

    Raises:
        ConfigError: the method needs references and has none, or a setting is wrong.
        ValueError: shapes do not fit, or a value is NaN or infinite.
    """
    if isinstance(method, RewardShaper):
        if settings:
            raise ConfigError(f"settings {', '.join(settings)} belong to the shaper that was given; set them there")
        made = method
    else:
        made = shaper(method, **settings)
    out = _out(rewards)
    rewards = _rewards(rewards)
    if ceiling is not None:
        rewards = apply_ceiling(rewards, ceiling)
    if lengths is not None:
        rewards = penalise_length(rewards, lengths)
    return made(rewards, ref_rewards).to(out)


def apply_ceiling(rewards: Tensor, ceiling: float) -> Tensor:
    """``min(r, ceiling)``, any shape.

    Raises:
        ConfigError: the ceiling is NaN or infinite.
    """
    if isinstance(ceiling, bool) or not -float("inf") < ceiling < float("inf"):
        raise ConfigError(f"a ceiling must be a finite number, got {ceiling!r}")
    return torch.as_tensor(rewards).clamp(max=ceiling)


def penalise_length(rewards: Tensor, lengths: Tensor, free: int = 300, per_token: float = 0.01) -> Tensor:
    """``r - per_token * max(0, length - free)``, before any shaping.

    Args:
        rewards: ``[B]``.
        lengths: ``[B]`` response tokens, at least 0.
        free: tokens that cost nothing (300 in the study).
        per_token: price of each further one (0.01 in the study, in units of the reward).

    Raises:
        ConfigError: a negative setting.
        ValueError: shapes differ, or a length is negative.
    """
    if not (free >= 0 and 0 <= per_token < float("inf")):
        raise ConfigError(f"free and per_token must be at least 0, got {free} and {per_token}")
    reward, length = torch.as_tensor(rewards), torch.as_tensor(lengths)
    if reward.shape != length.shape:
        raise ValueError(f"rewards {tuple(reward.shape)} and lengths {tuple(length.shape)} differ in shape")
    if length.numel() and not bool((length >= 0).all()):
        raise ValueError("lengths must be at least 0 everywhere")
    if not reward.is_floating_point():
        reward = reward.double()
    return reward - per_token * (length.to(reward.device) - free).clamp(min=0).to(reward.dtype)
