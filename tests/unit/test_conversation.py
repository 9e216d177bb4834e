"""What other projects hand over as a completion: text, messages, replies in OpenAI's format; and what they get back."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guerdon as gd
from guerdon.errors import DataError, RewardError
from guerdon.evaluation import read_records, score_records
from guerdon.rewards import to_trajectory
from guerdon.rewards.conversation import after_prompt
from guerdon.types import StopReason, policy_text

GOOD = "<think>x</think><answer>Lima</answer>"
SAID = {"role": "assistant", "content": GOOD}
REPLY = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": SAID, "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}  # fmt: skip
PARTS = [{"type": "text", "text": GOOD}]

FORMS: dict[str, Any] = {
    "text": GOOD,
    "messages": [SAID],
    "one message": SAID,
    "parts": [{"role": "assistant", "content": PARTS}],
    "reply": REPLY,
    "one choice": REPLY["choices"][0],
    "text completion": {"object": "text_completion", "choices": [{"index": 0, "text": GOOD, "finish_reason": "stop"}]},
    "batch line": {"status_code": 200, "request_id": "r", "body": REPLY},
    "response": {
        "object": "response",
        "output": [
            {"type": "reasoning", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": GOOD}]},
        ],
    },
    "no role in a choice": {"choices": [{"message": {"content": GOOD}}]},
    "attributes": SimpleNamespace(
        choices=[SimpleNamespace(message=SimpleNamespace(role="assistant", content=GOOD), finish_reason="stop")]
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_a_completion_says_the_same(form: Any) -> None:
    made = to_trajectory("q", form, "Lima")
    assert policy_text(made) == GOOD and made.stop is StopReason.DONE
    assert gd.integrations.trl(gd.rewards.ExactMatch())(prompts=["q"], completions=[form], answer=["Lima"]) == [1.0]
    assert gd.integrations.verl(gd.rewards.ExactMatch())("d", form, "Lima") == {"score": 1.0}


@pytest.mark.parametrize("name", [n for n in FORMS if n != "attributes"])
def test_every_form_is_a_record_of_guerdon_score(name: str) -> None:
    lines = [
        {"completion": FORMS[name], "answer": "Lima"},
        {"custom_id": "b", "messages": [{"role": "user", "content": "q"}], "response": FORMS[name], "answer": "Lima"},
    ]
    read = read_records(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
    rows = list(score_records(read, "exact_match"))
    assert [(r["id"], r["value"]) for r in rows] == [(0, 1.0), ("b", 1.0)]


def test_objects_of_the_official_client() -> None:
    chat = pytest.importorskip("openai.types.chat", reason="openai is not installed")
    made = to_trajectory("q", chat.ChatCompletion.model_validate(REPLY), "Lima")
    assert policy_text(made) == GOOD


def test_what_stands_beside_the_text_is_kept_and_is_no_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "<answer>x</answer>"}
    cut = to_trajectory("q", {"choices": [{"message": message, "finish_reason": "length"}]})
    assert policy_text(cut) == "" and cut.stop is StopReason.LENGTH and cut.stop.truncated
    assert cut.turns[0].meta == {"tool_calls": [call], "reasoning": "<answer>x</answer>"}
    refused = to_trajectory("q", {"choices": [{"message": {"content": None, "refusal": "I cannot."}}]})
    assert policy_text(refused) == "I cannot."


@pytest.mark.parametrize(
    ("completion", "says"),
    [
        (3, "text, chat messages or an OpenAI-format reply, got int"),
        (None, "got NoneType"),
        (b"<answer>Lima</answer>", "got bytes"),
        ({}, "got dict"),
        ({"choices": []}, "one choice, got 0"),
        ({"choices": [REPLY["choices"][0]] * 3}, "one choice, got 3; give one completion per choice"),
        ({"choices": "x"}, "one choice, got str"),
        ([{"content": GOOD}], "message 0 of the completion has no role"),
        (["a"], "message 0 of the completion has no role"),
        ([SAID, None], "message 1 of the completion has no role"),
        ([{"role": "assistant", "content": 3}], "must be text or a list of parts, got int"),
        ({"body": {"body": {"body": {"body": {"body": {}}}}}}, "got dict"),
    ],
)
def test_anything_else_is_one_clear_error(completion: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        to_trajectory("q", completion, task_id="item 7")
    (row,) = score_records([{"completion": completion, "answer": "Lima"}], "exact_match")
    assert row["value"] is None and not row["valid"] and row["reason"].startswith("record: ")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "choices", "message", "body", "text", "output", "type", "refusal"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.property
@given(_JSON)
def test_no_value_crashes_the_reader(value: Any) -> None:
    try:
        made = to_trajectory("q", value)
    except DataError:
        return
    assert all(isinstance(turn.text, str) for turn in made.turns)


@pytest.mark.parametrize(
    ("query", "strip", "rest"),
    [
        ("Q?yes", (), "yes"),
        ("Q?yes<|im_end|>\n", ("<|im_end|>",), "yes"),
        ("Q?yes<eos></s> ", ("</s>", "<eos>"), "yes"),
        ("Q?<|im_end|>yes ", ("<|im_end|>",), "<|im_end|>yes "),
        ("Q?", ("",), ""),
    ],
)
def test_only_what_follows_the_prompt_is_the_policys(query: str, strip: tuple[str, ...], rest: str) -> None:
    assert after_prompt(query, "Q?", strip) == rest
    with pytest.raises(RewardError, match="begin with its prompt"):
        after_prompt("?" + query, "Q?", strip)


def test_openrlhf_strips_the_end_of_a_turn() -> None:
    function = gd.integrations.openrlhf(gd.reward(lambda completion: float(len(completion)), name="n"), strip=("<e>",))
    assert function(["Q?abc<e>"], ["Q?"], [None])["rewards"].tolist() == [3.0]


def test_verl_gets_the_same_names_for_every_sample() -> None:
    """verl takes the names of the first sample and fails where a later one lacks one."""
    reward = gd.rewards.ExactMatch(on_error=0.0) + gd.rewards.TagFormat("answer")
    compute = gd.integrations.verl(reward)
    failed, good = compute("d", "x", None), compute("d", GOOD, "Lima")
    assert failed.keys() == good.keys() == {"score", "ExactMatch", "TagFormat"}
    named = gd.integrations.verl(gd.rewards.ExactMatch(on_error=0.0), parts=("ExactMatch/failed",))
    assert named("d", "x", None) == {"score": 0.0, "ExactMatch/failed": 1.0}
    assert math.isnan(named("d", GOOD, "Lima")["ExactMatch/failed"])


def test_one_failure_of_a_function_is_not_the_batchs() -> None:
    @gd.reward(on_error="drop")
    def inverse(completion: str) -> float:
        return 1 / int(completion)

    scores = inverse([to_trajectory("q", text) for text in ("2", "0", "x", "4")])
    assert [s.value if s.valid else None for s in scores] == [0.5, None, None, 0.25]
    assert "ZeroDivisionError" in (scores[1].reason or "") and inverse.failures["exception"] == 2
