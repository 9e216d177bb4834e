"""The states of all global generators, so that a resumed run draws what the interrupted one would have drawn.

Guerdon draws from generators of its own. A user's reward or environment may use the global ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["generator_states", "restore_generators"]


def generator_states() -> dict[str, Any]:
    """States of torch (CPU and GPUs), numpy and Python, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Take over what :func:`generator_states` returned; GPUs that are no longer there are left out."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
