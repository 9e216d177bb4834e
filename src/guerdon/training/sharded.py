"""Weights, gradients and moments of the policy divided among processes (FSDP), each of which samples from a whole copy.

What is trained is a twin of the policy whose layers are sharded; after every update the whole weights are gathered into
the policy itself, which is what samples, is evaluated and is saved. So the engine, callbacks and checkpoints need not
know, and a checkpoint can be continued by one process. It pays where gradients and moments are what does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guerdon.errors import ConfigError
from guerdon.policies import make_batches, token_logprobs
from guerdon.policies.logprobs import TokenOutputs
from guerdon.policies.packing import TokenBatch

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["ShardedPolicy", "gathered", "is_sharded", "sharded_like", "whole_state"]


class _Scoring(nn.Module):
    """A forward pass of the whole policy: sharding gathers weights around modules' calls, so there must be one."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model, self.head = policy.model, policy.value_head
        # Not a submodule: the policy is no module, and its parts are registered above.
        object.__setattr__(self, "policy", policy)

    def forward(self, batch: TokenBatch, **options: Any) -> TokenOutputs:
        return token_logprobs(self.policy, batch, **options)


class ShardedPolicy:
    """The twin of a policy whose weights are divided among the processes of the default group.

    Args:
        policy: whole in every process; stays so.

    Attributes:
        twin: the policy that is trained.
    """

    def __init__(self, policy: Policy) -> None:
        from torch.distributed import get_world_size
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.policy = policy
        self.twin = copy.copy(policy)
        self.twin.model = copy.deepcopy(policy.model)
        self.twin.value_head = copy.deepcopy(policy.value_head)
        self._whole = dict(_named(policy))
        # What the architecture allows is found out on whole weights: later each pass is one of all processes.
        with torch.no_grad():
            (probe,) = make_batches([([0, 0], [0, 0]), ([0, 0], [0])], groups=[0, 0], max_tokens=64)
            token_logprobs(self.twin, probe.to(policy.device), values=policy.value_head is not None)
        names = set(getattr(self.twin.model, "_no_split_modules", None) or ())
        layers = [m for m in self.twin.model.modules() if type(m).__name__ in names]
        if not layers:
            raise ConfigError(
                f"{type(self.twin.model).__name__} does not say where it can be divided; use distributed.strategy='replicate'"
            )
        mesh = init_device_mesh(policy.device.type, (get_world_size(),))
        self._module: Any = _Scoring(self.twin)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self._module, mesh=mesh)
        # Loss terms are normalised over all processes already, so gradients are added, not averaged.
        module: Any
        for module in self._module.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def __call__(self, batch: TokenBatch, **options: Any) -> TokenOutputs:
        """As :func:`guerdon.policies.token_logprobs`; all processes must call it equally often."""
        return self._module(batch, **options)

    def idle(self, *, learning: bool) -> None:
        """Take part in a pass of the others without having anything to compute."""
        (batch,) = make_batches([([0], [0])], groups=None, max_tokens=8)
        values = self.twin.value_head is not None
        out = self._module(batch.to(self.policy.device), values=values)
        if learning:
            loss = out.logprobs.sum() * 0.0
            (loss + out.values.sum() * 0.0 if values else loss).backward()

    @torch.no_grad()
    def publish(self) -> None:
        """Gather the trained weights into the whole policy of every process."""
        for name, parameter in _named(self.twin):
            if parameter.requires_grad:
                self._whole[name].copy_(gathered(parameter))

    @torch.no_grad()
    def adopt(self) -> None:
        """Take the whole policy's weights over into the shards."""
        for name, parameter in _named(self.twin):
            parameter.copy_(sharded_like(self._whole[name], parameter))


def _named(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in (("model", policy.model), ("head", policy.value_head)):
        if module is not None:
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is divided among processes."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor; all processes must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(whole: Tensor, like: Any) -> Any:
    """A whole tensor divided as ``like`` is."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.detach().to(like.device), like.device_mesh, like.placements)


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state with every divided tensor gathered; all processes must ask for it."""
    entries = {
        key: {name: gathered(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for key, entry in state["state"].items()
    }
    return {**state, "state": entries}
