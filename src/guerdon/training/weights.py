"""A policy's weights in a checkpoint, and back into the live object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from guerdon.errors import CheckpointError

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["restore_policy", "write_policy"]


def write_policy(policy: Policy, folder: Path) -> None:
    """Write what :func:`guerdon.policies.load_policy` reads again (LoRA: the adapter only)."""
    policy.save(folder)


@torch.no_grad()
def restore_policy(policy: Policy, folder: Path) -> None:
    """Copy saved weights into a live policy, whose parameters stay the objects that optimisers hold.

    Raises:
        CheckpointError: the folder holds another architecture.
    """
    loaded = type(policy).load(folder, device="cpu")
    pairs: list[tuple[str, nn.Module | None, nn.Module | None]] = [
        ("model", policy.model, loaded.model),
        ("value head", policy.value_head, loaded.value_head),
    ]
    for what, live, saved in pairs:
        if (live is None) != (saved is None):
            raise CheckpointError(
                f"{folder}: has {'no' if saved is None else 'a'} {what}, unlike the policy to restore"
            )
        if live is None or saved is None:
            continue
        ours, theirs = live.state_dict(), saved.state_dict()
        odd = sorted(k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs)
        odd += sorted(k for k in ours.keys() & theirs.keys() if ours[k].shape != theirs[k].shape)
        if odd:
            raise CheckpointError(f"{folder}: {len(odd)} tensors of the {what} do not fit the policy, first {odd[0]!r}")
        for key, tensor in ours.items():
            tensor.copy_(theirs[key])
