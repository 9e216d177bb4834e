"""A short run of ``benchmarks/fuzz_grammar.py``, whose 100,000 cases are recorded, and of the same checks under hypothesis."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.rewards import BoxedMatch, ExactMatch, TokenF1, to_trajectory
from guerdon.types import policy_text

pytestmark = pytest.mark.property
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_grammar.py"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_grammar", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = _load()
REWARDS = [ExactMatch(), ExactMatch(tag=None), TokenF1(tag=None), BoxedMatch()]


def test_a_thousand_random_conversations() -> None:
    found = fuzz.fuzz(1000, seed=12)
    assert found["crashes"] == found["differences_from_slow_readers"] == 0, found["found"]
    assert found["prompt_or_tool_text_read_as_answer"] == 0, found["found"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(fuzz.PIECES), st.text(max_size=5)), max_size=25).map("".join),
    st.sampled_from(fuzz.WRAPPINGS),
)
def test_no_text_breaks_the_readers_or_lets_a_tool_answer(text: str, wrapping: str) -> None:
    text = text.replace(fuzz.SECRET, "")
    secret = wrapping.format(fuzz.SECRET)
    made = to_trajectory(
        secret, [{"role": "assistant", "content": text}, {"role": "tool", "content": secret}, {"role": "assistant", "content": text}],
        fuzz.SECRET,
    )  # fmt: skip
    whole = policy_text(made)
    read = {name: reader(whole) for name, reader in fuzz.READERS.items()}
    assert fuzz.wrong(whole, read) == [] and fuzz.leaks(made, read, REWARDS) == []
