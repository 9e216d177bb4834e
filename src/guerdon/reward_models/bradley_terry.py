"""A scalar reward model: fitted to preferences (Bradley-Terry) or to ratings (regression), then asked for scores.

``r(x, y)`` is a linear head on the state at the last token of a response; the chance that one response is preferred
to another is ``sigmoid(r - r')``, so scores are in logits and mean something only as differences within a prompt.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import CheckpointError, ConfigError, DataError, TrainingError
from guerdon.reward_models.model_reward import ModelReward
from guerdon.reward_models.pair_losses import masked_regression_loss, preference_loss
from guerdon.reward_models.scalar import Preference, ScalarRewardModel
from guerdon.reward_models.trunks import Item, batches, load_trunk

__all__ = ["BradleyTerry"]


class BradleyTerry:
    """A scalar reward model with ``fit`` and ``score``.

    Args:
        model: a :class:`ScalarRewardModel`, or what one is made of: a trunk, or a policy (whose trunk is copied).
        kind: what the strength of a pair does: ``"regular"`` nothing, ``"margin"`` it is added to the pair's margin,
            ``"scaled"`` it multiplies the pair's loss.
        ties: pairs with label 1/2: ``"half"`` pulls their scores together, ``"drop"`` leaves them out.
        smoothing: labels are drawn towards 1/2: ``p (1 - 2 a) + a``.
        regularisation: adds this times the mean of ``r_c^2 + r_r^2`` (0.005 is the "Reg" baseline of arXiv 2502.18770).
        output: which head output is the reward.
        max_tokens: positions of one forward pass; changes memory and speed only.
        seed: of the head, where one is made here.

    Attributes:
        history: loss of each optimiser step so far.
        mean, std: what :meth:`calibrate` found; scores are ``(r - mean) / std``, at first ``r`` itself.
    """

    def __init__(
        self,
        model: Any,
        *,
        kind: Literal["regular", "margin", "scaled"] = "regular",
        ties: Literal["half", "drop"] = "half",
        smoothing: float = 0.0,
        regularisation: float = 0.0,
        output: int = 0,
        max_tokens: int = 16_384,
        seed: int = 0,
    ) -> None:
        if kind not in ("regular", "margin", "scaled"):
            raise ConfigError(f"kind must be 'regular', 'margin' or 'scaled', got {kind!r}")
        if ties not in ("half", "drop"):
            raise ConfigError(f"ties must be 'half' or 'drop', got {ties!r}")
        if not 0.0 <= smoothing < 0.5:
            raise ConfigError(f"smoothing must be in [0, 0.5), got {smoothing}")
        if not 0.0 <= regularisation < math.inf:
            raise ConfigError(f"regularisation must be finite and at least 0, got {regularisation}")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
        self.model = model if isinstance(model, ScalarRewardModel) else ScalarRewardModel(model, seed=seed)
        if not 0 <= output < self.model.n_attributes:
            raise ConfigError(f"output must be in [0, {self.model.n_attributes}), got {output}")
        self.kind, self.ties, self.smoothing, self.regularisation = kind, ties, smoothing, regularisation
        self.output, self.max_tokens = output, max_tokens
        self.history: list[float] = []
        self.mean, self.std = 0.0, 1.0

    # Training ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        pairs: Iterable[Preference | tuple[Any, Any]],
        *,
        epochs: int = 1,
        batch_size: int = 64,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        grad_clip: float | None = 1.0,
        head_only: bool = False,
        seed: int = 0,
    ) -> Self:
        """Fit to preferences; returns the model.

        Args:
            pairs: preferences, or plain ``(chosen, rejected)``. Both responses of a pair are always in one batch.
            epochs: passes over the pairs, each in its own order.
            batch_size: pairs of one optimiser step; the loss is the mean over them.
            lr: of AdamW, constant. A few hundred thousand parameters want about 1e-3, a language model about 5e-6.
            weight_decay: of AdamW.
            grad_clip: largest norm of the gradient.
            head_only: leave the trunk as it is.
            seed: of the order (and of dropout, where a trunk has some).

        Raises:
            DataError: no pairs (or only ties that are dropped), or an item that cannot be read.
            TrainingError: a loss or gradient is not finite; no weight was changed by that step.
        """
        wanted = [p if isinstance(p, Preference) else Preference(*p) for p in pairs]
        if self.ties == "drop":
            wanted = [p for p in wanted if p.label != 0.5]
        if not wanted:
            raise DataError("there is nothing to fit: no pairs (ties are dropped with ties='drop')")
        flat = self.model.trunk.prepare([x for p in wanted for x in (p.chosen, p.rejected)])
        prepared = list(zip(flat[::2], flat[1::2], strict=True))
        numbers = torch.tensor([[p.label, p.margin, p.strength] for p in wanted], dtype=torch.float32)
        numbers[:, 0] = numbers[:, 0] * (1 - 2 * self.smoothing) + self.smoothing

        def loss(rows: list[int]) -> Tensor:
            scores = self.model([x for k in rows for x in prepared[k]])[:, self.output].reshape(-1, 2)
            return self._loss(scores[:, 0], scores[:, 1], numbers[rows].to(scores.device))

        sizes = [2 * max(map(self.model.trunk.size, pair)) for pair in prepared]
        self._descend(loss, sizes, epochs, batch_size, lr, weight_decay, grad_clip, head_only, seed)
        return self

    def fit_ratings(
        self,
        items: Sequence[Item],
        labels: Any,
        *,
        ignore: float = -100.0,
        epochs: int = 1,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        grad_clip: float | None = 1.0,
        head_only: bool = False,
        seed: int = 0,
    ) -> Self:
        """Fit to ratings by squared error; afterwards :meth:`fit` goes on from the same head.

        Args:
            items: ``N`` responses.
            labels: ``[N]`` (the reward's output) or ``[N, n_attributes]``; ``ignore`` or NaN is no label.
            ignore: stands for an absent label.
            epochs, batch_size, lr, weight_decay, grad_clip, head_only, seed: as for :meth:`fit`, in responses.

        Raises:
            DataError: labels of another shape, or none that counts.
        """
        target = torch.as_tensor(np.asarray(labels, dtype=np.float32))
        if target.ndim == 1 and len(target) == len(items):
            full = torch.full((len(items), self.model.n_attributes), ignore)
            full[:, self.output] = target
            target = full
        if target.shape != (len(items), self.model.n_attributes):
            raise DataError(
                f"labels have shape {tuple(target.shape)} for {len(items)} items and "
                f"{self.model.n_attributes} attributes"
            )
        known = ((target != ignore) & ~target.isnan()).any(1)
        if not bool(known.any()):
            raise DataError(f"every label is {ignore} or NaN: there is nothing to fit")
        index = torch.nonzero(known)[:, 0].tolist()
        prepared = self.model.trunk.prepare([items[k] for k in index])
        target = target[index]

        def loss(rows: list[int]) -> Tensor:
            made = self.model([prepared[k] for k in rows])
            # Micro-batches are put together by their number of items, so each counts its labels over the items.
            wanted = target[rows].to(made.device)
            count = ((wanted != ignore) & ~wanted.isnan()).sum()
            return masked_regression_loss(made, wanted, ignore) * count / len(rows)

        sizes = [self.model.trunk.size(p) for p in prepared]
        self._descend(loss, sizes, epochs, batch_size, lr, weight_decay, grad_clip, head_only, seed)
        return self

    def _loss(self, rc: Tensor, rr: Tensor, numbers: Tensor) -> Tensor:
        label, margin, strength = numbers.unbind(1)
        loss = preference_loss(
            rc,
            rr,
            p=label,
            margin=margin + strength if self.kind == "margin" else margin,
            weight=strength if self.kind == "scaled" else None,
        )
        if self.regularisation:
            loss = loss + self.regularisation * (rc**2 + rr**2).mean()
        return loss

    def _descend(
        self,
        loss: Callable[[list[int]], Tensor],
        sizes: Sequence[int],
        epochs: int,
        batch_size: int,
        lr: float,
        weight_decay: float,
        grad_clip: float | None,
        head_only: bool,
        seed: int,
    ) -> None:
        if epochs < 1 or batch_size < 1 or not 0 < lr < math.inf:
            raise ConfigError(f"epochs, batch_size and lr must be positive, got {epochs}, {batch_size} and {lr}")
        source = self.model.head if head_only else self.model
        parameters = [p for p in source.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for epoch in range(epochs):
                order = np.random.default_rng([seed & 0xFFFFFFFF, epoch]).permutation(len(sizes)).tolist()
                for start in range(0, len(order), batch_size):
                    rows = order[start : start + batch_size]
                    optimiser.zero_grad(set_to_none=True)
                    total = 0.0
                    for chosen in batches([sizes[k] for k in rows], self.max_tokens):
                        part = [rows[i] for i in chosen]
                        piece = loss(part) * (len(part) / len(rows))
                        total += float(piece.detach())
                        piece.backward()
                    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
                    if not (math.isfinite(total) and math.isfinite(norm)):
                        optimiser.zero_grad(set_to_none=True)
                        raise TrainingError(
                            f"reward model, step {len(self.history) + 1}: loss {total}, gradient norm {norm}; no weight "
                            "was changed by this step. Lower the learning rate"
                        )
                    if grad_clip is not None:
                        torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
                    optimiser.step()
                    self.history.append(total)
        self.model.eval()

    # Scoring ----------------------------------------------------------------------------------------------------------

    def score(self, items: Sequence[Item]) -> np.ndarray:
        """``[B]`` float64 rewards, calibrated if :meth:`calibrate` was called.

        Raises:
            DataError: an item cannot be read (an empty response, ids of another tokenizer, too long).
        """
        return (self.attributes(items)[:, self.output] - self.mean) / self.std

    def attributes(self, items: Sequence[Item]) -> np.ndarray:
        """``[B, n_attributes]`` float64, as the head says."""
        return self.model.scores(self.model.trunk.prepare(items), self.max_tokens).double().numpy()

    def probability(self, first: Sequence[Item], second: Sequence[Item]) -> np.ndarray:
        """``[B]`` probability that each first response is preferred to the second, ``sigmoid(r - r')``."""
        if len(first) != len(second):
            raise ValueError(f"{len(first)} first for {len(second)} second responses")
        gap = self.attributes([*first, *second])[:, self.output]
        return torch.sigmoid(torch.from_numpy(gap[: len(first)] - gap[len(first) :])).numpy()

    def accuracy(self, pairs: Iterable[Preference | tuple[Any, Any]]) -> float:
        """Share of pairs whose chosen response scores strictly higher; equal scores count as wrong, ties are left out.

        NaN where there are no pairs.
        """
        wanted = [p if isinstance(p, Preference) else Preference(*p) for p in pairs]
        wanted = [p for p in wanted if p.label != 0.5]
        if not wanted:
            return math.nan
        scores = self.attributes([x for p in wanted for x in (p.chosen, p.rejected)])[:, self.output].reshape(-1, 2)
        right = np.where([p.label > 0.5 for p in wanted], scores[:, 0] > scores[:, 1], scores[:, 1] > scores[:, 0])
        return float(right.mean())

    def calibrate(self, items: Sequence[Item]) -> Self:
        """From now on, scores are standardised by the mean and deviation of these items' rewards.

        Standardised scores are no Bradley-Terry logits any more, unless the deviation was 1.

        Raises:
            DataError: fewer than two items, or all with the same reward.
        """
        values = self.attributes(items)[:, self.output] if len(items) > 1 else np.zeros(0)
        if len(values) < 2 or values.std() == 0:
            raise DataError("calibration needs at least two items with different rewards")
        self.mean, self.std = float(values.mean()), float(values.std())
        return self

    def reward(self, **options: Any) -> ModelReward:
        """The model as a reward on trajectories; ``options`` are ``name`` and ``on_error``."""
        return ModelReward(self, **options)

    # State ------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write trunk, head and settings to ``folder``, atomically; an older save there is replaced.

        Raises:
            CheckpointError: it cannot be written.
        """
        from safetensors.torch import save_file

        target = Path(folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        except OSError as error:
            raise CheckpointError(f"cannot write the reward model to {target}: {error.strerror or error}") from error
        try:
            meta = {
                "format": 1,
                "trunk": self.model.trunk.save(temporary),
                "n_attributes": self.model.n_attributes,
                **{key: getattr(self, key) for key in _SETTINGS},
            }
            state = {k: v.contiguous().cpu() for k, v in self.model.head.state_dict().items()}
            save_file(state, temporary / "head.safetensors")
            (temporary / "reward_model.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            if target.exists():
                old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
                os.replace(target, old)
                os.replace(temporary, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, target)
        except OSError as error:
            raise CheckpointError(f"cannot write the reward model to {target}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, policy: Any = None, features: Any = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            folder: of the save.
            policy: for a GRU trunk, whose tokenizer reads.
            features: for a feature trunk, the function that makes them.

        Raises:
            CheckpointError: the folder holds no reward model, or a broken one.
            ConfigError: what the trunk needs was not given.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(folder)
        try:
            meta = json.loads((source / "reward_model.json").read_text(encoding="utf-8"))
            trunk = load_trunk(source, meta["trunk"], policy=policy, features=features)
            model = ScalarRewardModel(trunk, meta["n_attributes"])
            model.head.load_state_dict(load_file(source / "head.safetensors"))
            made = cls(model, **{key: meta[key] for key in _SETTINGS if key not in ("mean", "std")})
            made.mean, made.std = float(meta["mean"]), float(meta["std"])
        except ConfigError:
            raise
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{source} holds no reward model that can be read: {error}") from error
        made.model.eval()
        return made


_SETTINGS = ("kind", "ties", "smoothing", "regularisation", "output", "max_tokens", "mean", "std")
