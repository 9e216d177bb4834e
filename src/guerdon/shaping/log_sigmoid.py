"""Log-sigmoid of the reward centred on a per-prompt reference, and the logical AND of several such rewards.

``log sigmoid(r - r_ref)`` is the log-probability that a response beats a reference-quality one under Bradley-Terry:
nearly ``r - r_ref`` far below the reference, nearly 0 far above. The sum over reward models is the log-probability
that a response is good on all counts. Source: Wang et al., ICML 2024 (arXiv 2402.00742).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError

__all__ = [
    "AllGood",
    "LogSigmoidCentered",
    "RewardCombiner",
    "RewardTransform",
    "all_good",
    "best_of_k_kl",
    "log_sigmoid_centred",
    "reference_quantile",
]


def log_sigmoid_centred(rewards: Tensor, reference: Tensor | float, scale: float = 1.0) -> Tensor:
    """``log sigmoid(scale (r - reference))``, exact for differences of any size.

    Args:
        rewards: any shape.
        reference: broadcastable to it; a constant, so no gradient flows into it.
        scale: steepness for rewards that are no Bradley-Terry logits, positive.

    Raises:
        ConfigError: scale is not positive.
        ValueError: a reward or a reference is NaN or infinite, or their shapes do not fit.
    """
    if isinstance(scale, bool) or not 0.0 < scale < math.inf:
        raise ConfigError(f"scale must be positive and finite, got {scale!r}")
    r = _finite(rewards, "rewards")
    ref = _finite(reference, "reference rewards").detach().to(r)
    try:
        fits = torch.broadcast_shapes(r.shape, ref.shape) == r.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"reference {tuple(ref.shape)} does not broadcast to rewards {tuple(r.shape)}")
    return torch.nn.functional.logsigmoid(scale * (r - ref))


def all_good(rewards: Tensor, reference: Tensor | float, weights: Sequence[float] | None = None) -> Tensor:
    """``sum_i w_i log sigmoid(r_i - ref_i)``: log-probability of being good on all ``n`` counts, ``[B, n]`` to ``[B]``.

    Args:
        rewards: ``[.., n]``.
        reference: broadcastable to it, each reward's own.
        weights: exponents of the probabilities, at least 0; the paper's sum has none.
    """
    terms = log_sigmoid_centred(rewards, reference)
    if weights is None:
        return terms.sum(-1)
    return (terms * torch.tensor(_weights(weights, terms.shape[-1]), dtype=terms.dtype, device=terms.device)).sum(-1)


def best_of_k_kl(k: int) -> float:
    """``log k - (k - 1) / k`` nats: the usual estimate of the KL of best-of-``k`` to the base policy."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k must be an integer of at least 1, got {k!r}")
    return math.log(k) - (k - 1) / k


def reference_quantile(
    samples: Sequence[float], q: float = 0.85, estimator: Literal["empirical", "gaussian"] = "empirical"
) -> float:
    """The ``q`` quantile of one prompt's base-policy rewards.

    Args:
        samples: at least one finite reward.
        q: in (0, 1).
        estimator: ``"empirical"`` interpolates linearly between order statistics; ``"gaussian"`` is
            ``mean + z_q * sd`` with the sample deviation (0 for one sample), for very few samples.
    """
    x = np.asarray(samples, dtype=np.float64)
    if estimator == "empirical":
        return float(np.quantile(x, q))
    deviation = float(x.std(ddof=1)) if x.size > 1 else 0.0
    return float(x.mean()) + NormalDist().inv_cdf(q) * deviation


class RewardTransform:
    """Base of fitted maps from rewards to rewards, in the manner of scikit-learn."""

    def fit(self, prompts: Sequence[Hashable], base_rewards: Any) -> RewardTransform:
        """Learn from rewards of the base policy; returns the transform."""
        raise TypeError(f"{type(self).__name__} must override fit")

    def transform(self, rewards: Any, prompts: Sequence[Hashable] | None = None, reference: Any = None) -> Tensor:
        """Map rewards."""
        raise TypeError(f"{type(self).__name__} must override transform")


class LogSigmoidCentered(RewardTransform):
    """``log sigmoid(scale (r - r_ref))`` with a reference per prompt, from rewards of the base policy.

    Args:
        reference: ``"quantile"`` (what an output must beat to count as good, the paper's default for open-ended
            properties), ``"mean"`` of the samples, or ``"value"``: the given reward itself, one per prompt, for example
            that of a canned refusal (the paper's choice for harmlessness).
        q: the quantile, in (0, 1).
        estimator: of the quantile, see :func:`reference_quantile`. The paper does not say which one it uses, nor how
            many samples; linear interpolation is chosen here.
        scale: 1 for Bradley-Terry logits; other rewards need one that makes them such.
        fallback: for prompts without samples: ``None`` refuses them, a number is their reference, ``"pooled"`` applies
            the estimator to the rewards of all fitted prompts together (which lets their difficulty in).
        bradley_terry: False says that the rewards are no Bradley-Terry logits; a scale of 1 then draws a warning.

    Attributes:
        references: ``{prompt: reference}``, after :meth:`fit`. They are those of the base policy and stay fixed through
            training; fitting on the present policy would move the goal.

    The transform is strictly increasing, so it changes nothing in best-of-k with a single reward.
    """

    def __init__(
        self,
        reference: Literal["quantile", "mean", "value"] = "quantile",
        q: float = 0.85,
        estimator: Literal["empirical", "gaussian"] = "empirical",
        scale: float = 1.0,
        *,
        fallback: float | Literal["pooled"] | None = None,
        bradley_terry: bool = True,
    ) -> None:
        if reference not in ("quantile", "mean", "value"):
            raise ConfigError(f"reference must be 'quantile', 'mean' or 'value', got {reference!r}")
        if isinstance(q, bool) or not isinstance(q, int | float) or not 0.0 < q < 1.0:
            raise ConfigError(f"q must be strictly between 0 and 1, got {q!r}")
        if estimator not in ("empirical", "gaussian"):
            raise ConfigError(f"estimator must be 'empirical' or 'gaussian', got {estimator!r}")
        if isinstance(fallback, str) and fallback != "pooled":
            raise ConfigError(f"fallback must be a number, 'pooled' or None, got {fallback!r}")
        if fallback is not None and not isinstance(fallback, str) and not math.isfinite(fallback):
            raise ConfigError(f"fallback must be finite, got {fallback}")
        if fallback == "pooled" and reference == "value":
            raise ConfigError("fallback='pooled' has no meaning with reference='value'; give a number")
        log_sigmoid_centred(torch.zeros(0), 0.0, scale)
        self.reference, self.q, self.estimator, self.scale = reference, q, estimator, scale
        self.fallback, self.bradley_terry = fallback, bradley_terry
        self.references: dict[Hashable, float] = {}
        self._default: float | None = None
        if not bradley_terry:
            self._warn_scale()

    def fit(self, prompts: Sequence[Hashable], base_rewards: Mapping[Hashable, Any] | Any) -> LogSigmoidCentered:
        """Compute the reference of each prompt.

        Args:
            prompts: each once.
            base_rewards: ``{prompt: rewards}`` (or ``{prompt: number}`` with ``reference="value"``), or ``[P, m]`` in the
                order of ``prompts``: rewards of samples of the base policy.

        Raises:
            DataError: a prompt twice, a prompt without samples and no fallback, or a reward that is NaN or infinite;
                with ``reference="value"`` also more than one reward for a prompt.
        """
        prompts = list(prompts)
        if len(set(prompts)) != len(prompts):
            raise DataError("a prompt is given twice; give each once, with all of its samples")
        if isinstance(base_rewards, Mapping):
            rows = [np.atleast_1d(_array(base_rewards.get(p, ()), p)) for p in prompts]
        else:
            if len(base_rewards) != len(prompts):
                raise DataError(f"{len(base_rewards)} rows of base rewards for {len(prompts)} prompts")
            rows = [np.atleast_1d(_array(row, p)) for p, row in zip(prompts, base_rewards, strict=True)]
        bare = [p for p, row in zip(prompts, rows, strict=True) if not row.size]
        if bare and self.fallback is None:
            raise DataError(
                f"{len(bare)} prompt(s) have no base-policy rewards, the first {bare[0]!r}; sample some, or give "
                "fallback= a number or 'pooled'"
            )
        known = [row for row in rows if row.size]
        if self.bradley_terry and self.scale == 1.0:
            pooled = np.concatenate([*known, np.zeros(0)])
            if pooled.size >= 8 and np.array_equal(pooled, np.round(pooled)):
                self._warn_scale("all base rewards are whole numbers, which logits of a Bradley-Terry model never are")
        self.references = {p: self._one(row, p) for p, row in zip(prompts, rows, strict=True) if row.size}
        self._default = None if self.fallback == "pooled" or self.fallback is None else float(self.fallback)
        if self.fallback == "pooled" and known:
            self._default = self._one(np.concatenate(known), "all prompts")
        return self

    def transform(
        self, rewards: Tensor | Any, prompts: Sequence[Hashable] | None = None, reference: Tensor | Any = None
    ) -> Tensor:
        """``log sigmoid(scale (r - ref))``, the shape of ``rewards``.

        Args:
            rewards: ``[B]`` or ``[B, ..]``.
            prompts: ``[B]`` the prompt of each row, whose fitted reference is used; or
            reference: reference rewards, broadcastable to ``rewards``. Give exactly one of the two.

        Raises:
            ConfigError: neither or both are given, or prompts before :meth:`fit`.
            DataError: a prompt that was not fitted, and no fallback.
            ValueError: lengths differ, or a value is NaN or infinite.
        """
        if (prompts is None) == (reference is None):
            raise ConfigError(
                "give prompts= (whose fitted references are used) or reference=, exactly one of them; "
                "a batch mean is no reference"
            )
        if reference is not None:
            return log_sigmoid_centred(rewards, reference, self.scale)
        r = _finite(rewards, "rewards")
        assert prompts is not None
        if r.ndim == 0 or len(prompts) != len(r):
            raise ValueError(f"{len(prompts)} prompts for rewards {tuple(r.shape)}; give one prompt per row")
        refs = torch.tensor([self.reference_of(p) for p in prompts], dtype=torch.float64, device=r.device)
        return log_sigmoid_centred(r, refs.reshape(-1, *[1] * (r.ndim - 1)), self.scale)

    def rows(self, rewards: Tensor, base_rewards: Sequence[Sequence[float]] | None) -> Tensor:
        """``[B]`` rewards with each row's own base-policy rewards, without :meth:`fit`: a shaper's way of calling.

        Raises:
            ConfigError: no base rewards at all.
            DataError: none for some row.
        """
        if base_rewards is None:
            raise ConfigError("this shaping needs reference rewards and got none; give those of base-policy samples")
        rows = [np.atleast_1d(_array(row, b)) for b, row in enumerate(base_rewards)]
        if len(rows) != len(rewards) or not all(row.size for row in rows):
            raise DataError(f"{len(rewards)} rewards need a row of base-policy rewards each, got {len(rows)} rows")
        refs = torch.tensor([self._one(row, b) for b, row in enumerate(rows)], dtype=torch.float64)
        return log_sigmoid_centred(rewards, refs, self.scale)

    def reference_of(self, prompt: Hashable) -> float:
        """The fitted reference of a prompt, or the fallback that was opted into.

        Raises:
            ConfigError: nothing has been fitted.
            DataError: the prompt was not among those fitted, and there is no fallback.
        """
        if prompt in self.references:
            return self.references[prompt]
        if self._default is not None:
            return self._default
        if not self.references:
            raise ConfigError("call fit(prompts, base_rewards) first, or give reference= to transform")
        raise DataError(f"no reference was fitted for prompt {prompt!r}; fit it, or opt into a fallback=")

    def state_dict(self) -> dict[str, Any]:
        """The fitted references."""
        return {"references": list(self.references.items()), "default": self._default}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.references = {key: float(value) for key, value in state["references"]}
        self._default = state["default"]

    def _one(self, row: np.ndarray, prompt: Hashable) -> float:
        if self.reference == "quantile":
            return reference_quantile(row.tolist(), self.q, self.estimator)
        if self.reference == "mean":
            return float(row.mean())
        if row.size != 1:
            raise DataError(f"reference='value' takes one reward per prompt, got {row.size} for {prompt!r}")
        return float(row[0])

    def _warn_scale(self, why: str = "the rewards are said to be no Bradley-Terry logits") -> None:
        if self.scale == 1.0:
            warnings.warn(
                f"{why}; log sigmoid(r - ref) is then no log-probability: give scale= one that makes them logits",
                UserWarning,
                stacklevel=3,
            )


class RewardCombiner:
    """Base of maps from several named rewards to one."""

    def __call__(self, rewards: Mapping[str, Any], prompts: Sequence[Hashable]) -> Tensor:
        """``{name: [B]}`` to ``[B]``."""
        raise TypeError(f"{type(self).__name__} must override __call__")


class AllGood(RewardCombiner):
    """Log-probability that a response is good on every count: the sum of log-sigmoid rewards, each with its own reference.

    Args:
        transforms: ``{name: fitted LogSigmoidCentered}``.
        weights: ``{name: exponent of its probability}``, at least 0; missing names count 1. The paper uses none, and
            with weights :meth:`prob` is no longer the probability that all are good.

    Raises:
        ConfigError: no transforms, or a weight without a transform.
    """

    def __init__(
        self, transforms: Mapping[str, LogSigmoidCentered], *, weights: Mapping[str, float] | None = None
    ) -> None:
        if not transforms:
            raise ConfigError("transforms must name at least one reward")
        for name in weights or {}:
            if name not in transforms:
                raise ConfigError(f"weight of {name!r}, for which there is no transform")
        self.transforms = dict(transforms)
        given = dict(weights or {})
        values = _weights([given.get(name, 1.0) for name in self.transforms], len(self.transforms))
        self.weights = dict(zip(self.transforms, values, strict=True))

    def terms(self, rewards: Mapping[str, Any], prompts: Sequence[Hashable]) -> dict[str, Tensor]:
        """The log-probability of being good on each count, ``{name: [B, ..]}``, unweighted.

        Raises:
            ValueError: names other than those of the transforms, or shapes that differ.
        """
        if rewards.keys() != self.transforms.keys():
            raise ValueError(f"rewards are named {sorted(rewards)}, transforms {sorted(self.transforms)}")
        out = {name: t.transform(rewards[name], prompts) for name, t in self.transforms.items()}
        if len({term.shape for term in out.values()}) > 1:
            raise ValueError("rewards differ in shape: " + ", ".join(f"{n} {tuple(t.shape)}" for n, t in out.items()))
        return out

    def log_prob(self, rewards: Mapping[str, Any], prompts: Sequence[Hashable]) -> Tensor:
        """``[B]`` log-probability of being good on all counts, at most 0."""
        terms = self.terms(rewards, prompts)
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(0)

    def prob(self, rewards: Mapping[str, Any], prompts: Sequence[Hashable]) -> Tensor:
        """``[B]`` probability of being good on all counts, in [0, 1]."""
        return self.log_prob(rewards, prompts).exp()

    def __call__(self, rewards: Mapping[str, Any], prompts: Sequence[Hashable]) -> Tensor:
        """:meth:`log_prob`, the reward to maximise."""
        return self.log_prob(rewards, prompts)

    def best_of(self, rewards: Mapping[str, Any], prompts: Sequence[Hashable]) -> Tensor:
        """``{name: [B, k]}`` rewards of k samples of each prompt to the ``[B]`` index of the best; ties go to the first."""
        total = self.log_prob(rewards, prompts)
        if total.ndim != 2 or total.shape[1] == 0:
            raise ValueError(f"best_of needs [B, k] rewards with k of at least 1, got {tuple(total.shape)}")
        # torch.argmax does not promise which of several maxima it returns.
        is_best = total == total.amax(1, keepdim=True)
        position = torch.arange(total.shape[1], device=total.device).expand_as(total)
        return torch.where(is_best, position, total.shape[1]).amin(1)


def _array(row: Any, prompt: Hashable) -> np.ndarray:
    values = row.detach().cpu().numpy() if isinstance(row, Tensor) else row
    out = np.asarray(values, dtype=np.float64)
    if out.ndim > 1:
        raise DataError(f"base rewards of prompt {prompt!r} have shape {out.shape}; a list of numbers is expected")
    if not np.isfinite(out).all():
        raise DataError(f"base rewards of prompt {prompt!r} must be finite, got {out.tolist()}")
    return out


def _finite(values: Any, what: str) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values, dtype=np.float64))
    if not tensor.is_floating_point():
        tensor = tensor.double()
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{bad} of {tensor.numel()} {what} are NaN or infinite; leave such responses out first")
    return tensor


def _weights(weights: Sequence[float], n: int) -> list[float]:
    values = [float(w) for w in weights]
    if len(values) != n:
        raise ConfigError(f"{len(values)} weights for {n} rewards")
    if not all(0.0 <= w < math.inf for w in values):
        raise ConfigError(f"weights must be finite and at least 0, got {values}")
    return values
