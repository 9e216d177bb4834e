"""One AdamW over the policy and its critic: learning rates, clipping, and a refusal to take a broken step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guerdon.errors import TrainingError
from guerdon.policies.memory import return_freed
from guerdon.training.config import OptimiserConfig
from guerdon.training.sharded import gathered, is_sharded, sharded_like, whole_state

# Parameters from which giving freed memory back is worth having it mapped again later.
_WORTH_RETURNING = 1 << 23

__all__ = ["Optimiser", "TrainingError", "require_finite"]


class Optimiser:
    """AdamW over named sets of parameters, each with its own peak learning rate and gradient clip.

    Args:
        sets: name to parameters, for example ``{"policy": [...], "critic": [...]}``.
        config: rates, betas, decay and clip.
        lrs: peak learning rate of each set; ``config.lr`` where absent.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[nn.Parameter]],
        config: OptimiserConfig,
        lrs: Mapping[str, float] | None = None,
    ) -> None:
        self.sets = {name: list(parameters) for name, parameters in sets.items()}
        self._config = config
        groups: list[dict[str, Any]] = []
        for name, parameters in self.sets.items():
            peak = (lrs or {}).get(name, config.lr)
            # Decay pulls weights to zero; for gains and biases zero is no natural centre.
            for decayed in (True, False):
                chosen = [p for p in parameters if (p.ndim > 1) == decayed]
                if chosen:
                    groups.append(
                        {"params": chosen, "peak": peak, "weight_decay": config.weight_decay if decayed else 0.0}
                    )
        self._large = sum(p.numel() for g in groups for p in g["params"]) >= _WORTH_RETURNING
        devices = {p.device.type for g in groups for p in g["params"]}
        divided = any(is_sharded(p) for g in groups for p in g["params"])
        self._adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=devices <= {"cpu", "cuda"} and not divided
        )

    def zero_grad(self) -> None:
        """Drop the gradients of every set."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, scale: float, *, where: str) -> dict[str, float]:
        """Clip, check and apply the gradients, and drop them.

        Args:
            scale: factor on every peak learning rate (the schedule).
            where: begins the message of an error, for example ``"step 12, minibatch 3"``.

        Returns:
            Gradient norm before clipping, per set.

        Raises:
            TrainingError: a norm is not finite; no parameter has been changed.
        """
        norms = {name: _norm([p.grad for p in parameters]) for name, parameters in self.sets.items()}
        values = {name: float(norm) for name, norm in norms.items()}
        for name, value in values.items():
            if not value < float("inf"):
                raise TrainingError(
                    f"{where}: the gradient of the {name} is not finite (norm {value}); no weight was changed. "
                    "Lower the learning rate or look at the step's rewards and log-probabilities"
                )
        clip = self._config.grad_clip
        if clip is not None:
            for name, parameters in self.sets.items():
                if values[name] > clip:
                    torch.nn.utils.clip_grads_with_norm_(parameters, clip, norms[name])
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * scale
        self._adamw.step()
        # Sampling comes next, and they would take as much memory as the weights meanwhile.
        self.zero_grad()
        if self._large:
            return_freed()
        return values

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts, whole; where they are divided, all processes must ask for them."""
        return whole_state(self._adamw.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        entries = {
            key: {
                name: sharded_like(value, parameters[key]) if isinstance(value, Tensor) and value.ndim else value
                for name, value in entry.items()
            }
            for key, entry in state["state"].items()
        }
        self._adamw.load_state_dict({**state, "state": entries})


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    there = [g for g in gradients if g is not None]
    return gathered(torch.nn.utils.get_total_norm(there)) if there else torch.zeros(())


def require_finite(values: Tensor, *, where: str, what: str, advice: str = "") -> None:
    """Raise a :class:`TrainingError` that counts and names non-finite entries of ``values``."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        tail = f"; {advice}" if advice else ""
        raise TrainingError(f"{where}: {bad} of {values.numel()} values of {what} are not finite{tail}")


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Parameters that ask for a gradient, each once."""
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())
