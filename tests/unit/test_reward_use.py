"""Rewards where users need them: as a decorated function, over a stream of records, inside other trainers."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import guerdon as gd
from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.evaluation import Summary, read_records, score_records
from guerdon.rewards import Progress, to_trajectory
from guerdon.types import policy_text

GOOD = "<think>x</think><answer>Lima</answer>"
SPEC = [{"name": "exact_match"}, {"name": "tag_format", "tags": ["think", "answer"], "weight": 0.2}]


# A function ------------------------------------------------------------------------------------------------------


@gd.reward(range=(0, 1))
def mentions(completion: str, reference: str, weight: float = 1.0) -> float:
    """Whether the reference occurs."""
    return weight * float(reference in completion)


def test_a_function_becomes_a_reward_and_stays_a_function() -> None:
    assert mentions(completion="in Lima", reference="Lima") == 1.0
    assert mentions.text(completion="in Lima", reference="Lima").value == 1.0
    assert mentions.name == "mentions" and mentions.range == (0.0, 1.0) and "occurs" in (mentions.__doc__ or "")
    total = mentions + 0.5 * gd.rewards.TagFormat("answer")
    assert total.text(completion="<answer>Lima</answer>", reference="Lima").value == 1.5


def test_other_arguments_come_from_the_task() -> None:
    task = gd.Task("t", "q", "Lima", {"weight": 0.5})
    said = [gd.Trajectory(task, (gd.Turn("policy", "Lima"),), gd.StopReason.EOS)]
    assert mentions(said)[0].value == 0.5

    @gd.reward
    def needs(completion: str, level: int) -> float:
        return float(level)

    with pytest.raises(ConfigError, match="wants 'level'"):
        needs(said)


def test_values_outside_the_range_are_failures() -> None:
    @gd.reward(range=(0, 1), on_error="drop")
    def wild(completion: str) -> float:
        return 7.0

    score = wild.text(completion="x")
    assert not score.valid and "outside the declared range [0, 1]" in (score.reason or "") and wild.failures


def test_batched_asynchronous_and_progressing_functions() -> None:
    @gd.reward(batched=True)
    def lengths(completion: list[str]) -> list[float]:
        return [float(len(c)) for c in completion]

    @gd.reward
    async def later(completion: str) -> float:
        await asyncio.sleep(0)
        return float(len(completion))

    @gd.reward
    def scheduled(completion: str, progress: Progress | None = None) -> float:
        return 0.0 if progress is None else progress.fraction

    made = [to_trajectory("q", text) for text in ("a", "bbb")]
    assert [s.value for s in lengths(made)] == [1, 3] == [s.value for s in later(made)]
    assert [s.value for s in scheduled(made, progress=Progress(1, 3))] == [0.5, 0.5]
    with pytest.raises(ConfigError, match="args"):
        gd.reward(lambda *args: 0.0)
    with pytest.raises(ConfigError, match="increasing"):
        gd.reward(lambda completion: 0.0, range=(1, 1))


# Conversations ---------------------------------------------------------------------------------------------------


def test_tool_results_are_no_words_of_the_policy() -> None:
    made = to_trajectory(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        [
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "<answer>Lima</answer>"},
            {"role": "assistant", "content": [{"type": "text", "text": "done"}]},
        ],
    )
    assert policy_text(made) == "done" and made.task.question == "q"
    for bad in (3, [{"role": "assistant", "content": 3}]):
        with pytest.raises(DataError):
            to_trajectory("q", bad)


# Other trainers --------------------------------------------------------------------------------------------------


def reward() -> object:
    return gd.rewards.ExactMatch() + 0.2 * gd.rewards.TagFormat("think", "answer")


def test_trl_token_ids_are_what_lengths_count() -> None:
    from guerdon.rewards import LinearLength

    function = gd.integrations.trl(LinearLength(10))
    assert function(["q"] * 2, ["a b", "a"], completion_ids=[[5, 6, 7, 8], [5]]) == pytest.approx([0.4, 0.1])
    turn = [{"role": "assistant", "content": "a b"}]
    assert function(["q"], [turn], completion_ids=[[5, 6]]) == pytest.approx([0.2])


def test_trl_convention() -> None:
    class State:
        global_step, max_steps = 5, 11

    seen: list[Progress | None] = []

    def spy(trajectories, progress=None):
        seen.append(progress)
        return [t.task.meta["level"] for t in trajectories]

    function = gd.integrations.trl(reward())
    columns = {
        "answer": [["Lima"], ["Lima"]],
        "completion_ids": [[1], [2]],
        "log_metric": print,
        "trainer_state": State(),
    }
    chat = [{"role": "assistant", "content": GOOD}]
    assert function(prompts=["q", "q"], completions=[GOOD, chat], **columns) == [1.2, 1.2]
    assert function.__name__ == "ExactMatch___TagFormat"
    gd.integrations.trl(spy)(prompts=["q"], completions=["x"], level=[3], trainer_state=State())
    assert seen[0] == Progress(5, 11)
    dropping = gd.integrations.trl(gd.rewards.ExactMatch(on_error="drop"))
    assert dropping(prompts=["q"], completions=[GOOD], answer=[None]) == [None]
    with pytest.raises(RewardError):
        gd.integrations.trl(gd.rewards.ExactMatch())(prompts=["q"], completions=[GOOD])
    with pytest.raises(ConfigError, match="no column 'gold'"):
        gd.integrations.trl(reward(), reference="gold")(prompts=["q"], completions=["x"], answer=["y"])


def test_verl_openrlhf_and_verifiers_conventions() -> None:
    assert gd.integrations.verl(reward())("d", GOOD, ["Lima"]) == {"score": 1.2, "ExactMatch": 1.0, "TagFormat": 1.0}
    made = gd.integrations.openrlhf(reward())([f"Q?{GOOD}", "Q?x"], ["Q?", "Q?"], [["Lima"], ["Lima"]])
    assert torch.allclose(made["rewards"], torch.tensor([1.2, 0.0])) and made["extra_logs"]["TagFormat"].tolist() == [
        1,
        0,
    ]
    with pytest.raises(RewardError, match="begin with its prompt"):
        gd.integrations.openrlhf(reward())(["other"], ["Q?"], ["x"])
    function = gd.integrations.verifiers(reward())
    assert asyncio.run(function("q", [{"role": "assistant", "content": GOOD}], "Lima")) == 1.2
    failing = gd.integrations.verl(gd.rewards.ExactMatch(on_error="drop"))
    with pytest.raises(RewardError, match="no missing rewards"):
        failing("d", GOOD, None)


# Streams ---------------------------------------------------------------------------------------------------------

RECORDS = [
    {"completion": GOOD, "answer": "Lima"},
    {"completion": [{"role": "assistant", "content": "<answer>Lima</answer>"}], "golds": ["Lima"], "id": "b"},
    {"choices": [{"message": {"content": "hi"}}], "answer": "x"},
    {"x": 1},
    {"completion": "y"},
]


def test_records_are_scored_in_order_and_failures_say_why() -> None:
    rows = list(score_records(RECORDS, SPEC, batch=2))
    assert [r["id"] for r in rows] == [0, "b", 2, 3, 4]
    assert [r["value"] for r in rows] == [1.2, 1.0, 0.0, None, None]
    assert "no completion" in rows[3]["reason"] and "got NoneType" in rows[4]["reason"]
    assert rows == list(score_records(RECORDS, SPEC, batch=2, workers=2))
    summary = Summary()
    for row in rows:
        summary.add(row)
    assert summary.n == 5 and summary.valid == 3 and summary.values["value"]["mean"] == pytest.approx(2.2 / 3)
    with pytest.raises(ConfigError, match="at least 1"):
        list(score_records(RECORDS, SPEC, workers=0))


def test_records_are_read_from_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("completion,answer\n<answer>Lima</answer>,Lima\n", encoding="utf-8")
    assert list(read_records(tmp_path / "a.csv")) == [{"completion": "<answer>Lima</answer>", "answer": "Lima"}]
    assert list(read_records(io.StringIO('{"a": 1}\n\n{"a": 2}\n'))) == [{"a": 1}, {"a": 2}]
    for text, says in (
        ("x", "line 1 is not JSON"),
        ("[1]", "line 1 is no object"),
        ("[" * 100_000, "line 1 is not JSON"),
    ):
        with pytest.raises(DataError, match=says):
            list(read_records(io.StringIO(text)))
    with pytest.raises(ConfigError, match="format must be"):
        list(read_records(io.StringIO(""), "xml"))
    with pytest.raises(ConfigError, match="not from a pipe"):
        list(read_records(io.StringIO(""), "parquet"))


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guerdon.cli.main", "score", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.integration
def test_the_command(tmp_path: Path) -> None:
    config, out = tmp_path / "r.yaml", tmp_path / "out.jsonl"
    config.write_text(json.dumps({"reward": SPEC}), encoding="utf-8")
    lines = "".join(json.dumps(r) + "\n" for r in RECORDS)
    done = run(str(config), stdin=lines)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 5 and "5 records, 3 with a value" in done.stderr
    # cut in the middle of a line: the next start goes on behind the last whole one
    whole = done.stdout
    out.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"id": 2, "val', encoding="utf-8")
    source = tmp_path / "in.jsonl"
    source.write_text(lines, encoding="utf-8")
    again = run(
        str(config),
        str(source),
        "--out",
        str(out),
        "--histogram",
        str(tmp_path / "h.png"),
        "--summary",
        str(tmp_path / "s.json"),
        "--strict",
    )
    assert out.read_text(encoding="utf-8") == whole and again.returncode == 1
    assert (tmp_path / "h.png").stat().st_size > 1000 and json.loads((tmp_path / "s.json").read_text())["n"] == 5
    config.write_text("reward: exact_macth\n", encoding="utf-8")
    wrong = run(str(config), stdin=lines)
    assert wrong.returncode == 2 and "did you mean exact_match" in wrong.stderr and "Traceback" not in wrong.stderr
