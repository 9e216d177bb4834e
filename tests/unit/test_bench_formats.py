"""Readers of recorded routing outcomes: values, prices, and what they say about broken files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from guerdon.errors import ConfigError, DataError
from guerdon.routing.bench import formats
from guerdon.routing.bench.matrix import ScoreMatrix

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the recorded data lies beside the repository and is absent"
)
PRICES = {"a": (1.0, 2.0), "b": (10.0, 30.0)}


def record(**changes):
    base = {"task_name": "t", "query": "q1", "model_name": "a", "response": "r", "performance": 1.0}
    return {**base, "input_tokens": 100, "output_tokens": 50, "token_num": 150, **changes}


def jsonl(path, rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def table(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_llmrouter_prices_tokens_and_keeps_what_was_not_run_apart(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [record(), record(model_name="b", performance=0.5), record(query="q2")])
    m = formats.read_llmrouter(path, PRICES)
    assert m.members == ("a", "b") and m.queries == ("q1", "q2") and m.tasks == ("t", "t")
    assert m.cost[0] == pytest.approx([(100 * 1 + 50 * 2) / 1e6, (100 * 10 + 50 * 30) / 1e6])
    assert m.scores[0].tolist() == [1.0, 0.5]
    assert np.isnan(m.scores[1, 1]) and np.isnan(m.cost[1, 1]) and not m.fails.any()


@pytest.mark.parametrize("bad", [{"response": "API Error: 503"}, {"performance": None}])
def test_an_outage_is_a_failed_call_and_not_a_score_of_zero(tmp_path, bad):
    rows = [record(), record(query="q2", **bad, input_tokens=None, output_tokens=None)]
    m = formats.read_llmrouter(jsonl(tmp_path / "r.jsonl", rows), PRICES)
    assert m.fails[:, 0].tolist() == [False, True]
    assert np.isnan(m.scores[1, 0]) and m.quality[1, 0] == 0.0 and m.cost[1, 0] == 0.0
    assert m.mean_quality[0] == 0.5


def test_broken_llmrouter_rows_are_named_together(tmp_path):
    rows = [
        record(performance="good"),
        "{not json\n",
        record(model_name="c"),
        record(query=" "),
        record(query="q3", output_tokens=-1),
        record(query="q4", input_tokens=None),
        "[1]\n",
    ]
    with pytest.raises(DataError) as caught:
        formats.read_llmrouter(jsonl(tmp_path / "r.jsonl", rows), PRICES)
    text = str(caught.value)
    assert text.startswith("r.jsonl: row 1, field 'performance'")
    assert "row 2" in text and "row 3, field 'model_name': 'c' has no price" in text and "and 2 more" in text
    assert str(tmp_path) not in text


def test_double_outcomes_are_refused(tmp_path):
    with pytest.raises(DataError, match="row 2, field 'query': is double for member 'a'"):
        formats.read_llmrouter(jsonl(tmp_path / "r.jsonl", [record(), record()]), PRICES)


def test_scores_may_be_a_python_dict_as_text_but_no_program(tmp_path):
    path = tmp_path / "s.json"
    rows = [{"question": "x" * 40, "scores": "{'a': 1.0, 'b': None}"}, {"question": "y", "scores": {"a": 0, "b": 1}}]
    path.write_text(json.dumps(rows))
    m = formats.read_scores_json(path, PRICES, output_tokens=100)
    assert m.scores[0, 0] == 1.0 and np.isnan(m.scores[0, 1])
    assert m.cost[0, 0] == pytest.approx((10 * 1 + 100 * 2) / 1e6)
    assert any("100 out" in note for note in m.notes)
    path.write_text(json.dumps([{"question": "x", "scores": "__import__('os').getcwd()"}]))
    with pytest.raises(DataError, match="row 1, field 'scores'"):
        formats.read_scores_json(path, PRICES)
    path.write_text(json.dumps([{"question": "x", "scores": {"a": float("nan")}}]))
    with pytest.raises(DataError, match=r"field 'scores\[a\]'"):
        formats.read_scores_json(path, PRICES)


def test_routerbench_wide_table(tmp_path):
    header = ["sample_id", "prompt", "eval_name", "m1", "m1|model_response", "m1|total_cost", "m2", "m2|total_cost"]
    header.append("oracle_model_to_route_to")
    path = table(
        tmp_path / "rb.csv",
        header,
        [["1", "p", "e", "1", "yes", "0.002", "", "", "m1"], ["2", "p", "e", "0", "no", "0.001", "1", "0.01", "m2"]],
    )
    m = formats.read_matrix(path)
    assert m.members == ("m1", "m2") and len(m) == 2 and m.tasks == ("e", "e")
    assert np.isnan(m.scores[0, 1]) and m.cost[1].tolist() == [0.001, 0.01]
    assert m.replies["m1"] == ["yes", "no"]


def test_routerbench_without_a_cost_is_an_error(tmp_path):
    path = table(
        tmp_path / "rb.csv", ["prompt", "m1", "m1|total_cost", "m2", "m2|model_response"], [["p", 1, 0.1, 1, "x"]]
    )
    with pytest.raises(DataError, match=r"model 'm2' has no column 'm2\|total_cost'"):
        formats.read_matrix(path)
    path = table(tmp_path / "rb.csv", ["prompt", "m1", "m1|total_cost"], [["p", 1, ""]])
    with pytest.raises(DataError, match=r"row 2, field 'm1\|total_cost'"):
        formats.read_matrix(path)


@pytest.mark.parametrize("name", ["x.pkl", "x.PICKLE"])
def test_a_pickle_is_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for format in ("auto", "routerbench"):
        with pytest.raises(DataError, match="to_csv"):
            formats.read_matrix(tmp_path / name, format=format)


def test_plain_csv_with_a_failed_call(tmp_path):
    header = ["query", "member", "score", "cost", "failed"]
    m = formats.read_matrix(
        table(tmp_path / "p.csv", header, [["q", "a", "1", "0.5", ""], ["q", "b", "", "0.1", "true"]])
    )
    assert m.fails.tolist() == [[False, True]] and m.quality.tolist() == [[1.0, 0.0]]
    with pytest.raises(DataError, match="row 2, field 'cost'"):
        formats.read_csv(table(tmp_path / "p.csv", header, [["q", "a", "1", "", ""]]))
    with pytest.raises(DataError, match="score"):
        formats.read_csv(table(tmp_path / "p.csv", ["query", "member", "cost"], [["q", "a", "1"]]))


def test_pool_prices_come_from_fields_and_must_be_there(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text(json.dumps({"a": {"size": "7B", "feature": "costs $0.30", "input_price": 0.2, "output_price": 0}}))
    pool = formats.read_pool(path)
    assert (pool["a"]["input_price"], pool["a"]["output_price"], pool["a"]["size_b"]) == (0.2, 0.0, 7.0)
    path.write_text(json.dumps({"a": {"input_price": 0.2}}))
    with pytest.raises(DataError, match="row 1, field 'output_price': member 'a' has no price"):
        formats.read_pool(path)


def test_what_cannot_be_read_says_what_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="did you mean llmrouter"):
        formats.read_matrix(tmp_path / "x", format="llmroute")
    with pytest.raises(ConfigError, match="pool="):
        formats.read_matrix(jsonl(tmp_path / "r.jsonl", [record()]))
    with pytest.raises(ConfigError, match="second="):
        formats.read_matrix(tmp_path / "x.csv", format="gsm8k")
    with pytest.raises(DataError, match="no known format"):
        formats.read_matrix(table(tmp_path / "u.csv", ["z"], [["1"]]))
    with pytest.raises(DataError, match="cannot be read"):
        formats.read_matrix(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="holds no outcomes"):
        formats.read_llmrouter(jsonl(tmp_path / "e.jsonl", []), PRICES)


def gsm(tmp_path, solutions):
    header = ["prompt", "big", "big_response"]
    first = table(tmp_path / "g.csv", header, [["one  apple?", "True", "abcdefgh"], ["two?", "False", "abcd"]])
    return first, jsonl(tmp_path / "s.jsonl", solutions)


def test_gsm8k_files_are_joined_by_question(tmp_path):
    small = {"is_correct": True, "solution": "abcd"}
    files = gsm(tmp_path, [{"question": "two?", "small": small}, {"question": "one apple?", "small": small}])
    prices = {"big": (4.0, 8.0), "small": (1.0, 1.0)}
    m = formats.read_gsm8k(*files, prices=prices)
    assert m.scores.tolist() == [[1.0, 1.0], [0.0, 1.0]]
    # 11 characters are 3 tokens, 8 are 2.
    assert m.cost[0] == pytest.approx([(3 * 4 + 2 * 8) / 1e6, (3 + 1) / 1e6])
    with pytest.raises(DataError, match="has no price"):
        formats.read_gsm8k(*files, prices={"big": (1, 1)})


def test_gsm8k_files_that_do_not_match(tmp_path):
    small = {"is_correct": True, "solution": "abcd"}
    with pytest.raises(DataError, match=r"is not in g\.csv"):
        formats.read_gsm8k(*gsm(tmp_path, [{"question": "three?", "small": small}]))
    with pytest.raises(DataError, match=r"1 problems of g\.csv are missing"):
        formats.read_gsm8k(*gsm(tmp_path, [{"question": "two?", "small": small}]))


def test_matrix_refuses_a_missing_cost_and_impossible_shapes():
    with pytest.raises(DataError, match="'b' has no usable cost on query 0"):
        ScoreMatrix(("q",), ("a", "b"), [[1, 1]], [[0.1, np.nan]])
    with pytest.raises(DataError, match="shape"):
        ScoreMatrix(("q",), ("a", "b"), [[1]], [[1]])
    with pytest.raises(DataError, match="same name"):
        ScoreMatrix(("q",), ("a", "a"), [[1, 1]], [[1, 1]])
    with pytest.raises(DataError, match="no member was run"):
        ScoreMatrix(("q",), ("a",), [[np.nan]], [[np.nan]])
    with pytest.raises(DataError, match="needs queries"):
        ScoreMatrix((), ("a",), np.zeros((0, 1)), np.zeros((0, 1)))


def test_split_is_disjoint_complete_stratified_and_seeded():
    n = 1000
    tasks = tuple("x" if i % 4 == 0 else "y" for i in range(n))
    m = ScoreMatrix([str(i) for i in range(n)], ("a",), np.ones((n, 1)), np.ones((n, 1)), tasks=tasks)
    parts = m.split((0.6, 0.2, 0.2), 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert [len(p) for p in parts] == pytest.approx([600, 200, 200], abs=3)
    for p, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        assert sum(tasks[i] == "x" for i in p) == pytest.approx(250 * share, abs=3)
    assert all((a == b).all() for a, b in zip(parts, m.split((0.6, 0.2, 0.2), 0), strict=True))
    assert (parts[2] != m.split((0.6, 0.2, 0.2), 1)[2][: len(parts[2])]).any()
    with pytest.raises(DataError, match="too few"):
        m.take([0]).split((0.6, 0.2, 0.2), 0)
    with pytest.raises(DataError, match="sum to 1"):
        m.split((0.6, 0.2), 0)


@needs_data
def test_nine_llms_file():
    m = formats.read_matrix(SHARED / "routing/nine_llms_train.json", pool=SHARED / "routing/nine_llms_pool.json")
    assert m.scores.shape == (5608, 9) and not m.fails.any()
    best = m.members[int(m.mean_quality.argmax())]
    assert best == "llama-3.1-nemotron-51b-instruct" and m.mean_quality.max() == pytest.approx(0.6213, abs=1e-4)
    assert m.sizes["llama3-chatqa-1.5-70b"] == 70.0


@needs_data
def test_gsm8k_six_models_and_their_recorded_replies():
    from guerdon.routing.bench.recorded import gsm8k_correct, gsm8k_members, gsm8k_recorded

    files = SHARED / "routing/gsm8k_responses.csv", SHARED / "gsm8k/example_model_solutions.jsonl"
    replies, right = gsm8k_recorded(*files), gsm8k_correct(*files)
    assert {m.name for m in gsm8k_members()} == set(replies) == set(right)
    assert {len(r) for r in replies.values()} == {1319}
    assert sum(right["gpt-4-1106-preview"].values()) == 1130
    assert sum(right["mistralai/Mixtral-8x7B-Instruct-v0.1"].values()) == 842
    text, tokens = next(iter(replies["6b_finetuning"].values()))
    assert text.startswith("Janet eats 3 ducks eggs") and tokens == -(-len(text) // 4)


@needs_data
async def test_recorded_replies_fit_the_recorded_backend():
    from guerdon.routing.backends import RecordedBackend
    from guerdon.routing.bench.recorded import gsm8k_recorded

    files = SHARED / "routing/gsm8k_responses.csv", SHARED / "gsm8k/example_model_solutions.jsonl"
    own = gsm8k_recorded(*files)["gpt-4-1106-preview"]
    question, (reply, tokens) = next(iter(own.items()))
    raw = await RecordedBackend(own).complete([{"role": "user", "content": question}])
    assert raw.text == reply and raw.output_tokens == tokens
