"""Matrix products by the faster of torch's two CPU libraries.

torch sends float32 products to MKL. oneDNN, which comes with it as well, is a tenth faster on large ones where the
processor has AVX-512, and about twice as fast on few rows with weights that were put into its own layout beforehand:
the case of sampling from a large model. Its operations carry no gradients and are not part of torch's public
interface, so they are looked up and tried once, and where they are absent or differ everything goes the usual way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PackedWeight", "linear", "matmul", "pack"]

# Multiplications from which the other library's start-up cost is small.
_LARGE = 1 << 26
# Entries from which a weight is worth a second copy in another layout.
_WORTH_PACKING = 1 << 16


@cache
def _onednn() -> Any:
    """oneDNN's operations where they work here and give the right numbers, else None."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not torch.backends.mkldnn.is_available():
        return None
    operations = getattr(torch.ops, "mkldnn", None)
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            x, w, b = (torch.randn(*shape, generator=generator) for shape in ((5, 24), (40, 24), (40,)))
            packed = operations._reorder_linear_weight(w, 5)  # type: ignore[union-attr]
            for weight in (w, w.t().contiguous().t(), packed):
                ours = operations._linear_pointwise(x, weight, b, "none", [], "")  # type: ignore[union-attr]
                if not torch.allclose(ours, F.linear(x, w, b), rtol=1e-4, atol=1e-4):
                    return None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
    return operations


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        len(x) * weight.numel() >= _LARGE
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and weight.dtype == torch.float32
        and _onednn() is not None
    )


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for ``[M, K]`` and ``[N, K]``, anew; a packed weight brings its bias. No gradient flows."""
    if isinstance(weight, PackedWeight):
        return weight(x)
    if _suits(x, weight):
        return _onednn()._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight`` for ``[M, N]`` and ``[N, K]``; no gradient flows."""
    if _suits(x, weight):
        return _onednn()._linear_pointwise(x, weight.t(), None, "none", [], "")
    return torch.mm(x, weight)


class PackedWeight:
    """A weight in oneDNN's layout, and its bias; a copy, so it does not follow later changes of the weight."""

    __slots__ = ("_bias", "_operations", "_packed")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._operations = _onednn()
        self._packed = self._operations._reorder_linear_weight(weight.detach(), 8)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``[M, K]`` to ``[M, N]``; no gradient flows."""
        return self._operations._linear_pointwise(x, self._packed, self._bias, "none", [], "")


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedWeight | None:
    """Copy a weight ``[N, K]`` into the layout that is fast for few rows; None where that gains nothing."""
    if (
        weight.numel() < _WORTH_PACKING
        or weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or _onednn() is None
    ):
        return None
    return PackedWeight(weight, bias)
