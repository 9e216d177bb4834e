"""Packing loses and invents nothing; text survives a tokenizer; blocks of attention cover their segments."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.policies import make_batches, tiny_policy, token_logprobs

pytestmark = pytest.mark.property

lengths = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 12), st.lists(st.integers(0, 9), max_size=15)), max_size=14
)


@cache
def policy() -> Any:
    return tiny_policy(hidden=16, layers=1, heads=2, max_context=64, init_std=0.3)


def build(drawn: list[tuple[int, int, list[int]]]) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    return [([g + 20] * p, r) for g, p, r in drawn], [g for g, _, _ in drawn]


@given(drawn=lengths, max_tokens=st.integers(1, 80), share=st.booleans())
def test_every_response_token_occurs_once_behind_its_own_context(
    drawn: list[tuple[int, int, list[int]]], max_tokens: int, share: bool
) -> None:
    items, groups = build(drawn)
    seen: dict[tuple[int, int], int] = {}
    for batch in make_batches(items, groups=groups, max_tokens=max_tokens, share_prompt=share):
        rows, width = batch.input_ids.shape
        assert rows * width <= max_tokens or rows == 1
        mask = batch.attention_mask
        if mask is None:
            mask = torch.ones(width, width, dtype=torch.bool).tril_().expand(rows, 1, width, width)
        for s, y, k, j in zip(
            *(x.tolist() for x in (batch.source, batch.targets, batch.trajectory, batch.position)), strict=True
        ):
            assert (k, j) not in seen
            seen[k, j] = y
            r, t = divmod(s, width)
            visible = mask[r, 0, t]
            prompt, response = items[k]
            assert batch.input_ids[r][visible].tolist() == prompt + response[:j]
            assert batch.position_ids[r][visible].tolist() == list(range(len(prompt) + j))
    assert seen == {(k, j): y for k, (_, response) in enumerate(items) for j, y in enumerate(response)}


@settings(max_examples=25, deadline=None)
@given(drawn=lengths, max_tokens=st.integers(20, 200))
def test_sharing_never_changes_a_logprob(drawn: list[tuple[int, int, list[int]]], max_tokens: int) -> None:
    items, groups = build(drawn)
    found: list[np.ndarray] = []
    for share in (True, False):
        flat = np.full((len(items), 16), np.nan)
        for batch in make_batches(items, groups=groups, max_tokens=max_tokens, share_prompt=share):
            with torch.no_grad():
                flat[batch.trajectory.numpy(), batch.position.numpy()] = token_logprobs(
                    policy(), batch
                ).logprobs.numpy()
        found.append(flat)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_encoding(text: str) -> None:
    assert policy().decode(policy().encode(text)) == text.encode("utf-8", "replace").decode()
