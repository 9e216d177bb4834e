"""Router-R1 over recorded replies: what is replayed, what is billed, what is a miss, and a run of a few steps."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from guerdon.errors import DataError
from guerdon.rewards import RouterFormat
from guerdon.routing.bench.formats import estimate_tokens, read_gsm8k
from guerdon.routing.bench.multi_round import (
    RecordedTestbed,
    final_number,
    gsm8k_golds,
    rounds_table,
    run_multi_round,
)
from guerdon.routing.bench.recorded import gsm8k_members

BIG, MIX = "gpt-4-1106-preview", "mistralai/Mixtral-8x7B-Instruct-v0.1"
OTHERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    rng = np.random.default_rng(0)
    rows, lines = [], []
    for k in range(60):
        a, b = (int(x) for x in rng.integers(2, 60, 2))
        question, gold = f"Tom has {a} apples and buys {b} more. How many has he? ({k})", a + b
        said = {BIG: gold, MIX: gold if k % 3 else gold + 1}
        rows.append(
            {"prompt": question}
            | {m: str(v == gold) for m, v in said.items()}
            | {f"{m}_response": f"He has {a} + {b} = {v}. The answer is {v}." for m, v in said.items()}
        )
        answers = {
            m: {"is_correct": bool(j % 2), "solution": f"{a}+{b}\n#### {gold + (1 - j % 2)}"}
            for j, m in enumerate(OTHERS)
        }
        lines.append({"question": question, "ground_truth": f"Sum.\n#### {gold}"} | answers)
    first, second = folder / "responses.csv", folder / "solutions.jsonl"
    with first.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    second.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return first, second


@pytest.fixture(scope="module")
def testbed(files):
    return RecordedTestbed(read_gsm8k(*files), gsm8k_golds(files[1]), gsm8k_members())


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 1,234", "1234"),
        ("so 2.50 dollars", "2.5"),
        ("-7", "-7"),
        ("$ 18 per day", "18"),
        ("first 3, then 4", "4"),
        ("none", None),
        ("007", "7"),
        (".5", "0.5"),
    ],
)
def test_the_last_number_is_the_answer(text, number):
    assert final_number(text) == number


def test_a_line_without_a_gold_number_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "one?", "ground_truth": "#### 1"}\n{"question": "two?", "ground_truth": "none"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2"):
        gsm8k_golds(path)


def test_parts_are_disjoint_and_hold_every_question(testbed):
    parts = [{t.question for t in part} for part in (testbed.train, testbed.validation, testbed.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_a_question_without_a_gold_answer_is_refused(files):
    with pytest.raises(DataError, match="no gold answer"):
        RecordedTestbed(read_gsm8k(*files), {}, gsm8k_members())


def test_scores_alone_cannot_be_replayed(files):
    from dataclasses import replace

    with pytest.raises(DataError, match="scores only"):
        RecordedTestbed(replace(read_gsm8k(*files), replies=None), gsm8k_golds(files[1]), gsm8k_members())


def test_scripts_are_valid_in_form_and_random_in_choice(testbed):
    policy = testbed.policy()
    scripts = testbed.scripts(policy, 240, seed=1)
    members = [m.name for m in testbed.members]
    assert all(s.value == 0.0 for s in RouterFormat(members=members)(scripts))
    calls = [sum(t.speaker == "environment" for t in s.turns) for s in scripts]
    assert set(calls) == {1, 2, 3}
    text = "".join(t.text for s in scripts for t in s.turns)
    asked = [text.count(f"<search> {name} :") for name in members]
    assert min(asked) > 0.6 * max(asked)
    # Scripts of one question come together, so that its computation is shared.
    assert all(len({s.prompt_ids for s in scripts[k : k + 4]}) == 1 for k in range(0, 240, 4))


def test_a_run_of_two_steps_reports_members_misses_and_money(files):
    said: list[str] = []
    result = run_multi_round(
        *files, alphas=(0.0, 0.9), rollouts=48, sft_steps=2, steps=2, prompts=2, group=2, say=said.append
    )
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[-3:] == ["Router-R1, warm start only", "Router-R1, alpha = 0", "Router-R1, alpha = 0.9"]
    assert rows[f"constant: {BIG}"]["em"] == 1.0
    assert 0.4 < rows[f"constant: {MIX.rpartition('/')[2]}"]["em"] < 0.95
    assert all(0 <= row["em"] <= 1 and row["usd_per_1000"] >= 0 for row in rows.values())
    headers, cells = rounds_table(result)
    assert len(headers) == len(cells[0]) and len(cells) == len(rows)
    assert result["settings"]["parameters"] > 100_000


def test_the_price_of_a_constant_row_is_the_recorded_replys(testbed, files):
    from guerdon.routing.bench.multi_round import _constant

    big = next(m for m in testbed.members if m.name == BIG)
    texts = dict(zip(testbed.matrix.queries, testbed.matrix.replies[BIG], strict=True))
    tokens = [(estimate_tokens(t.question), estimate_tokens(texts[t.question])) for t in testbed.test]
    expected = np.mean([i * big.input_price + o * big.output_price for i, o in tokens]) / 1e6 * 1000
    assert _constant(testbed, BIG)["usd_per_1000"] == pytest.approx(expected)


def test_the_command_refuses_other_formats(tmp_path):
    from guerdon.cli.main import app

    path = tmp_path / "x.csv"
    path.write_text("query,member,score,cost\nq,m,1,0\n")
    done = CliRunner().invoke(app, ["route", "bench", str(path), "--router-r1"])
    assert done.exit_code != 0
    assert "--format gsm8k" in (done.output + str(done.exception))
