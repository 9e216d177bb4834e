"""New weights for a running vLLM: what its workers do when a trainer has updated the policy.

vLLM makes its workers inherit from the class that ``worker_extension_cls`` names, so this file must be importable where
they run, and imports nothing of vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["EXTENSION", "TakesWeights"]

EXTENSION = f"{__name__}.TakesWeights"
"""The name under which vLLM finds :class:`TakesWeights`."""


class TakesWeights:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def take_weights(self, folder: str) -> int:
        """Load every tensor of the safetensors files of a folder into the running model; returns their number."""
        from safetensors.torch import load_file

        count = 0
        for path in sorted(Path(folder).glob("*.safetensors")):
            tensors = load_file(path)
            self.model_runner.model.load_weights(iter(tensors.items()))
            count += len(tensors)
        return count
