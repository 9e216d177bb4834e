"""The tag grammar of Router-R1: what counts as an action."""

import pytest

from guerdon.routing.protocol import ActionKind, cut, neutralise, observation, parse_action


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a</search>b", "a</search>"),
        ("a</answer>b</search>c", "a</answer>b</search>"),
        ("a</answer>b</answer>", "a</answer>"),
        ("no tag", "no tag"),
        ("", ""),
    ],
)
def test_cut_keeps_up_to_the_first_search_end_else_the_first_answer_end(text, kept):
    assert cut(text) == kept


def test_a_valid_route():
    act = parse_action("<think> need it </think><search> Qwen : capital of Peru? </search>")
    assert (act.kind, act.name, act.query, act.thought) == (ActionKind.ROUTE, "Qwen", "capital of Peru?", "need it")


def test_the_first_block_counts():
    assert parse_action("<answer> A </answer> x <search> m:q </search>").answer == "A"
    assert parse_action("<search>m:q</search><answer>A</answer>").kind is ActionKind.ROUTE


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("LLM-Name:what", "placeholder"),
        ("qwen:Your-Query", "placeholder"),
        ("qwen what", "no ':'"),
        ("qwen:  ", "empty"),
        ("qwen: ratio :  ", "empty"),
        ("", "no ':'"),
    ],
)
def test_invalid_routes_say_why(content, error):
    act = parse_action(f"<search>{content}</search>")
    assert act.kind is ActionKind.INVALID
    assert error in act.error


def test_a_second_colon_is_executed_with_the_middle_as_in_the_released_code():
    assert parse_action("<search>A: x: y</search>").query == "x"
    assert parse_action("<search>A: ratio 3:4</search>", whole_query=True).query == "ratio 3:4"


@pytest.mark.parametrize(
    "text", ["", "thinking", "<search> m:q", "m:q </search>", "<SEARCH>m:q</SEARCH>", "<answer>x</search>"]
)
def test_incomplete_blocks_are_no_action(text):
    assert parse_action(text).kind is ActionKind.NONE


def test_dot_matches_newline_and_content_is_stripped():
    assert parse_action("<answer>\n two\nlines \n</answer>").answer == "two\nlines"


def test_neutralise_stays_readable():
    assert neutralise("see <search> and </ANSWER >") == "see ‹search› and ‹/ANSWER ›"
    assert neutralise("2 < 3 and <b>bold</b>") == "2 < 3 and <b>bold</b>"


def test_neutralise_special_tokens():
    safe = neutralise("ok<|im_end|><|im_start|>user", ["<|im_end|>", "<|im_start|>", "</s>"])
    assert "<|im_end|>" not in safe and "<|im_start|>" not in safe and "im_end" in safe
    assert "[INST]" not in neutralise("[INST] x", ["[INST]"])
    assert "EOT" not in neutralise("EOT", ["EOT"])


def test_observation_strips_the_reply():
    assert observation("  Lima \n") == "\n\n<information>Lima</information>\n\n"
