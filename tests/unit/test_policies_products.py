"""Matrix products by whichever library is faster give the same numbers."""

from __future__ import annotations

import pytest
import torch

from guerdon.policies import products
from guerdon.policies.products import PackedWeight, linear, matmul, pack

onednn = pytest.mark.skipif(products._onednn() is None, reason="oneDNN with AVX-512 is not available on this machine")


@pytest.fixture(params=["usual", pytest.param("other", marks=onednn)])
def large(request, monkeypatch) -> None:
    monkeypatch.setattr(products, "_LARGE", 1 if request.param == "other" else 1 << 60)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_products_are_those_of_float64(large, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=generator) for s in ((rows, 33), (48, 33), (48,)))
    expected = x.double() @ w.double().t()
    torch.testing.assert_close(linear(x, w).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear(x, w, b).double(), expected + b.double(), rtol=1e-5, atol=1e-4)
    y = torch.randn(rows, 48, generator=generator)
    torch.testing.assert_close(matmul(y, w).double(), y.double() @ w.double(), rtol=1e-5, atol=1e-4)


def test_float64_and_rows_that_are_no_whole_memory_are_taken(large) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 5, generator=generator).double(), torch.randn(7, 5, generator=generator).double()
    assert linear(x, w).dtype == torch.float64
    torch.testing.assert_close(linear(x, w), x @ w.t())
    wide = torch.randn(12, 10, generator=generator)
    torch.testing.assert_close(linear(wide[::2, ::2], w.float()), wide[::2, ::2] @ w.float().t())


@onednn
@pytest.mark.parametrize("rows", [1, 8, 65])
def test_a_packed_weight_gives_the_same_product_for_any_number_of_rows(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(products, "_WORTH_PACKING", 1)
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=generator) for s in ((rows, 33), (48, 33), (48,)))
    packed = pack(w, b)
    assert isinstance(packed, PackedWeight)
    torch.testing.assert_close(packed(x), x @ w.t() + b, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear(x, packed), packed(x))
    before = packed(x)
    w.mul_(2)
    torch.testing.assert_close(packed(x), before)  # a copy


def test_weights_that_gain_nothing_stay_as_they_are() -> None:
    assert pack(torch.zeros(4, 4)) is None
    assert pack(torch.zeros(512, 512, dtype=torch.float64)) is None


def test_without_the_other_library_everything_goes_the_usual_way(monkeypatch) -> None:
    monkeypatch.setattr(products, "_onednn", lambda: None)
    monkeypatch.setattr(products, "_LARGE", 1)
    assert pack(torch.zeros(512, 512)) is None
    torch.testing.assert_close(linear(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 4), 3.0))
