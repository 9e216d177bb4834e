"""``guerdon train``: one YAML file, checked as a whole before a model loads; one command that resumes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guerdon.cli.main import app
from guerdon.errors import ConfigError, DataError
from guerdon.training import read_tasks
from guerdon.training.job import JobConfig, make_reward

YAML = """
policy: tiny
tasks: train.jsonl
reward:
  - exact_match
  - {name: tag_format, tags: [think, answer], weight: 0.2, on_error: drop, label: form}
steps: 3
prompts_per_step: 2
group_size: 4
max_tokens: 4
save_every: 1
optimiser: {lr: 1e-3}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, prefix in (("train", "t"), ("test", "h")):
        rows = [{"prompt": f"say {k}", "reference": str(k), "id": f"{prefix}{k}", "level": k} for k in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["train", *(str(a) for a in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_run_is_checked_trained_saved_and_resumed_by_the_same_command(folder: Path) -> None:
    out = folder / "out"
    arguments = (folder / "run.yaml", f"held_out={folder / 'test.jsonl'}", "eval_every=2", "--out", out)
    code, printed, said = run(*arguments, "--dry-run")
    assert code == 0 and not out.exists() and "3 steps of 8 trajectories" in said
    resolved = json.loads(printed)
    assert resolved["resolved"] == {
        "credit": "group_relative", "objective": "ppo_clip", "reward": "ExactMatch + form", "tasks": 4, "held_out": 4,
    }  # fmt: skip
    assert resolved["optimiser"]["lr"] == 1e-3 and resolved["clip_high"] == 0.2

    code, printed, said = run(*arguments, "--json")
    assert code == 0 and json.loads(printed)["step"] == 3 and "done after step 3" in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3] and "eval/reward/mean" in rows[1] and "reward/form" in rows[0]
    assert (out / "policy" / "config.json").exists() and (out / "config.json").exists()
    code, printed, _ = run(*arguments)  # nothing is left to do
    assert code == 0 and printed.strip() == str(out / "policy")
    code, _, said = run(*arguments, "save_every=2", "--json")  # a setting that may change
    assert code == 0


def test_another_configuration_is_refused_and_nothing_of_the_first_is_lost(folder: Path) -> None:
    out = folder / "out"
    assert run(folder / "run.yaml", "--out", out)[0] == 0
    kept = (out / "config.json").read_text()
    for change, words in (
        ("optimiser.lr=2e-3", "optimiser.lr (was 0.001, is 0.002)"),
        ("reward=exact_match", "reward (was"),
        ("policy=smollm2", "policy (was"),
    ):
        code, _, said = run(folder / "run.yaml", change, "--out", out)
        assert code == 2 and words in said and "another folder or the old settings" in said
    assert (out / "config.json").read_text() == kept


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stepz=3"], "stepz: unknown setting; did you mean steps"),
        (["algorithm=gpro"], "algorithm"),
        (["credit=process_relative"], "reads steps, and reward 'ExactMatch + form' gives outcome only"),
        (["reward=exact_mach"], "unknown reward 'exact_mach'; did you mean exact_match"),
        (["reward={name: exact_match, segmenter: lines}"], "scores no steps, so it takes no segmenter"),
        (["reward={name: exact_match, wait: 3}"], "has no setting 'wait'"),
        (["reward={name: exact_match, timeout: -1}"], "timeout must be a positive number, got -1"),
        (["reward={name: exact_match, weight: heavy}"], "weighted by a finite number"),
        (["reward={name: exact_match, on_error: ignore}"], "on_error must be"),
        (["reward=[]"], "empty list"),
        (["environment=maze"], "unknown environment 'maze'"),
        (["eval_every=2"], "held_out and eval_every belong together"),
        (["tasks=absent.jsonl"], "absent.jsonl: cannot be read"),
        (["held_out=train.jsonl", "eval_every=1"], "cannot be read"),
        (["prompts_per_step=9"], "exceeds the 4 tasks"),
        (["trackers=[tensorbord]"], "unknown tracker 'tensorbord'; did you mean tensorboard"),
        (["trackers=[{name: tensorboard, dir: x}]"], "tracker 'tensorboard'"),
        (["optimiser.warmup=3", "optimiser.schedule=linear"], "must be shorter than the run"),
        (["policy={base: tiny, lora: {rank: 3}}"], "policy.lora.rank: unknown setting"),
        (["steps"], "write key=value"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_a_model_loads(folder: Path, overrides: list[str], words: str) -> None:
    code, printed, said = run(folder / "run.yaml", *overrides, "--out", folder / "out")
    assert code == 2 and not printed and words in said and len(said.strip().splitlines()) == 1
    assert "loading" not in said and not (folder / "out").exists()


def test_a_run_that_has_nothing_to_learn_from_exits_with_1(folder: Path) -> None:
    code, _, said = run(
        folder / "run.yaml", "reward=exact_match", "no_signal_steps=2", "steps=9", "--out", folder / "out"
    )
    assert code == 1 and "no group had any variance for 2 steps" in said


def test_a_missing_file_and_help() -> None:
    assert run("absent.yaml")[0] == 2
    code, printed, _ = run("--help")
    assert code == 0 and "Example: guerdon train run.yaml" in printed


@pytest.mark.integration
def test_ctrl_c_saves_and_the_same_command_goes_on(folder: Path) -> None:
    import signal

    out = folder / "out"
    command = [sys.executable, "-m", "guerdon.cli.main", "train", str(folder / "run.yaml"), "steps=100000",
               "save_every=1", "no_signal_steps=null", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "finishing this step, then saving" in errors and "start the same command again" in errors
    done = len((out / "metrics.jsonl").read_text().splitlines())
    # A constant learning rate and no schedule: a run may be given another length.
    code, _, _ = run(folder / "run.yaml", f"steps={done + 1}", "save_every=1", "no_signal_steps=null", "--out", out)
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and rows == list(range(1, done + 2))


def test_tasks_are_read_with_everything_beside_the_prompt(folder: Path) -> None:
    first = read_tasks(folder / "train.jsonl")[0]
    assert (first.id, first.question, first.reference, first.meta["level"]) == ("t0", "say 0", "0", 0)
    path = folder / "more.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "hi"}], "meta": {"a": 1}, "b": 2}\n')
    (one,) = read_tasks(path)
    assert one.id == "more:1" and one.meta == {"a": 1, "b": 2} and one.reference is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no tasks"),
        ('{"prompt": ""}', "line 1: prompt must be a text"),
        ('{"prompt": [{"role": "user"}]}', "line 1: prompt must be"),
        ("[1]", "line 1: an object is expected, got list"),
        ('{"prompt": "a", "meta": 3}', "meta must be an object"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "line 2: id '1' is that of line 1"),
        ("{\n{\n{\n{", "and 1 more"),
    ],
)
def test_lines_that_are_no_tasks_are_named(tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError) as caught:
        read_tasks(path)
    assert words in str(caught.value)


def test_a_task_may_not_be_trained_on_and_measured(folder: Path) -> None:
    (folder / "both.jsonl").write_text('{"prompt": "x", "id": "t1"}')
    job = JobConfig.from_yaml(folder / "run.yaml", [f"held_out={folder / 'both.jsonl'}", "eval_every=1"])
    with pytest.raises(ConfigError, match="task 't1' is in tasks and in held_out"):
        job.read()


def test_rewards_of_yaml_are_those_of_code() -> None:
    reward = make_reward([{"name": "exact_match", "weight": 2}, {"name": "tag_format", "tags": ["think", "answer"]}])
    score = reward.text(completion="<think>x</think><answer>Lima</answer>", reference="Lima")
    assert score.value == 3.0
    one = make_reward({"name": "exact_match", "timeout": 3, "workers": 2, "on_error": 0.0, "label": "em"})
    assert (one._timeout, one._workers, one.on_error, one.name) == (3, 2, 0.0, "em")
