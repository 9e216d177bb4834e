"""The arithmetic testbed: chains, scripted styles, the exact checker, and the rewards that know the truth."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.environments.arithmetic import (
    LINES,
    STYLES,
    Chain,
    ChainCorrect,
    Solve,
    Spec,
    StepOracle,
    Style,
    check,
    final_answer,
    make_tasks,
    scripts,
    step_labels,
    words,
    write,
)
from guerdon.errors import ConfigError, DataError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.types import StopReason, Trajectory, Turn

CHAIN = Chain.parse("12+7-5+3")  # 12 19 14 17


def labels(text: str) -> list[bool]:
    return list(check(CHAIN, text).labels)


def kinds(text: str) -> list[str]:
    return [line.kind for line in check(CHAIN, text).lines]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(train_bpe(("0",), 512, atoms=(), words=words(Spec(choices=4))), hidden=32, layers=1, heads=2)


def test_a_chain_is_evaluated_from_left_to_right() -> None:
    assert CHAIN.values == (12, 19, 14, 17) and CHAIN.answer == 17 and str(CHAIN) == "12+7-5+3" and len(CHAIN) == 3
    assert Chain.parse("2+3*4").answer == 20
    with pytest.raises(DataError, match="looks like"):
        Chain.parse("12+")


def test_tasks_are_distinct_repeatable_and_of_disjoint_splits() -> None:
    spec = Spec(operations=(2, 3))
    train, again = make_tasks(200, spec=spec, seed=1), make_tasks(200, spec=spec, seed=1)
    assert train == again and len({t.id for t in train}) == 200
    held = {
        t.id
        for split in ("validation", "test")
        for seed in (0, 1)
        for t in make_tasks(100, split, spec=spec, seed=seed)
    }  # type: ignore[arg-type]
    assert not held & {t.id for seed in (0, 1, 2) for t in make_tasks(200, spec=spec, seed=seed)}
    for task in train:
        chain = task.meta["chain"]
        assert task.reference == str(chain.answer) and task.question == str(chain)
        assert all(0 <= v <= spec.high for v in chain.values) and 2 <= len(chain) <= 3


def test_multiplication_and_choices() -> None:
    tasks = make_tasks(100, spec=Spec(operations=(2, 2), high=30, factor=3, choices=4))
    assert any(sign == "*" for t in tasks for sign, _ in t.meta["chain"].operations)
    for task in tasks:
        options = task.meta["choices"]
        assert list(options) == list("ABCD") and len(set(options.values())) == 4
        assert options[task.reference] == task.meta["chain"].answer
    assert len({t.reference for t in tasks}) == 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"operations": (0, 2)}, "operations"), ({"operations": (3, 2)}, "operations"), ({"factor": 1}, "factor"),
     ({"high": 0}, "high"), ({"choices": 1}, "choices"), ({"high": 2, "choices": 4}, "choices")],
)  # fmt: skip
def test_specs_without_sense_are_refused(settings, match) -> None:
    with pytest.raises(ConfigError, match=match):
        Spec(**settings)


def test_more_tasks_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="ask for fewer"):
        make_tasks(500, "test", spec=Spec(operations=(1, 1), high=3, operand=1))
    with pytest.raises(ConfigError, match="split"):
        make_tasks(1, "dev")  # type: ignore[arg-type]


def test_a_right_solution() -> None:
    report = check(CHAIN, "12+7=19\n19-5=14\n14+3=17\nanswer 17")
    assert report.labels == (True,) * 4 and report.right and report.answer == "17" and report.first_wrong is None
    assert [line.kind for line in report.lines] == ["step"] * 3 + ["answer"]
    assert (report.steps, report.share_right, report.coverage, report.share_filler) == (3, 1.0, 1.0, 0.0)
    assert "".join(line.text for line in report.lines) == "12+7=19\n19-5=14\n14+3=17\nanswer 17"


def test_an_error_is_the_fault_of_one_line() -> None:
    report = check(CHAIN, "12+7=18\n18-5=13\n13+3=16\nanswer 16")
    assert report.labels == (False, True, True, False) and report.first_wrong == 0
    assert report.share_right == pytest.approx(2 / 3) and report.coverage == pytest.approx(2 / 3) and not report.right


def test_errors_may_cancel_and_answers_may_be_lucky() -> None:
    report = check(CHAIN, "12+7=18\n18-5=14\n14+3=17\nanswer 17")
    assert report.labels == (False, False, True, True) and report.right and report.first_wrong == 0
    assert labels("12+7=18\n18-5=13\n13+3=16\nanswer 17") == [False, True, True, True]
    # Going back to the true value without a word: the line itself is right.
    assert labels("12+7=18\n19-5=14\n14+3=17\nanswer 17") == [False, True, True, True]


def test_skipped_and_merged_lines() -> None:
    report = check(CHAIN, "19-5=14\n14+3=17\nanswer 17")
    assert report.labels == (True,) * 3 and report.lines[0].skipped == 1 and report.coverage == pytest.approx(2 / 3)
    merged = check(CHAIN, "12+7-5=14\n14+3=17\nanswer 17")
    assert merged.labels == (True,) * 3 and merged.lines[0].operations == 2 and merged.coverage == 1.0


def test_filler_is_harmless_and_counted() -> None:
    text = "12+7=19\ncheck ok\n0+0=0\n12+7=19\n12+7-5+3\nwait\ntherefore\n19+0=19\n19-5=14\n14+3=17\nanswer 17"
    report = check(CHAIN, text)
    assert report.labels == (True,) * 11 and report.share_filler == pytest.approx(7 / 11) and report.coverage == 1.0
    # Saying a wrong line again is as wrong as it was.
    assert labels("12+7=18\n12+7=18") == [False, False] and kinds("12+7=18\n12+7=18") == ["step", "filler"]


def test_a_later_step_that_looks_like_an_earlier_one_is_a_step() -> None:
    report = check("3+2-2+2", "3+2=5\n5-2=3\n3+2=5\nanswer 5")
    assert [line.kind for line in report.lines] == ["step"] * 3 + ["answer"] and report.coverage == 1.0


def test_unrelated_and_unreadable_lines() -> None:
    assert kinds("5+5=10") == ["filler"] and labels("5+5=10") == [True]
    assert kinds("5+5=11") == ["step"] and labels("5+5=11") == [False]
    assert kinds("12+7=\n=19\n12+7=19=19\nblah") == ["noise"] * 4
    assert labels("999999999999999999999+1=2") == [False]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("answer 17", "17"), ("the answer is: 17.", "17"), (r"\boxed{17}", "17"), (r"so \boxed{ 17 }", "17"), ("answer 3\nanswer 17", "17"),
     (r"answer 3" + "\n" + r"\boxed{17}", "17"), ("first, answer 17", "17"), (r"\boxed{17", None), ("boxed 17}", None), ("answer", None),
     ("17", None), ("", None), (r"answer 17" + "\n" + r"\boxed{1", "17")],
)  # fmt: skip
def test_the_final_answer(text, answer) -> None:
    assert final_answer(text) == answer
    assert check(CHAIN, text).right == (answer == "17")


def test_an_answer_of_a_choice_is_a_letter() -> None:
    task = make_tasks(1, spec=Spec(choices=4))[0]
    assert check(task, f"answer {task.reference}").right and check(task, f"answer {task.reference.lower()}").right
    assert not check(task, f"answer {task.meta['chain'].answer}").right


def test_marker_words_count_and_change_nothing_else() -> None:
    report = check(CHAIN, "first, 12+7=19\nNext, 19-5=14\ntherefore carry 14+3=17\nanswer 17")
    assert report.labels == (True,) * 4 and report.markers == 4 and report.coverage == 1.0


def test_empty_solutions_have_no_lines() -> None:
    report = check(CHAIN, "")
    assert (
        report.lines == () and not report.right and report.share_right == report.share_filler == report.coverage == 0.0
    )
    assert check(CHAIN, "\n\n").right is False


def test_a_task_of_another_kind_is_refused() -> None:
    from guerdon.types import Task

    with pytest.raises(DataError, match="no arithmetic task"):
        check(Task("x", "12+7"), "answer 19")


@pytest.mark.parametrize("name", sorted(STYLES))
def test_scripts_say_of_their_lines_what_the_checker_says(name) -> None:
    rng = np.random.default_rng(0)
    for task in make_tasks(60) + make_tasks(60, spec=Spec(choices=4)):
        script = write(task, rng, name)
        assert check(task, script.text).labels == script.labels, script


def test_styles_do_what_they_say() -> None:
    rng = np.random.default_rng(0)
    tasks = make_tasks(300)

    def reports(style):
        return [check(t, write(t, rng, style).text) for t in tasks]

    assert all(r.right and r.first_wrong is None for r in reports("right"))
    assert all(
        r.first_wrong is not None and sum(x.kind == "step" and not x.correct for x in r.lines) == 1
        for r in reports("wrong")
    )
    assert all(r.right and r.first_wrong is None for r in reports("skipped"))
    assert np.mean([r.coverage for r in reports("skipped")]) < 0.8
    assert np.mean([r.right for r in reports("guess")]) == pytest.approx(0.4, abs=0.1)
    assert all(r.steps == 0 for r in reports("guess"))
    assert np.mean([r.right for r in reports(Style(wrong_lines=1, lucky=0.5))]) == pytest.approx(0.5, abs=0.1)
    slips = reports(Style(slip=0.5))
    assert all(r.coverage == 1.0 for r in slips) and np.mean([r.right for r in slips]) == pytest.approx(0.5, abs=0.1)
    cancelled = reports(Style(error=0.3, cancel=1.0))
    assert any(r.right and r.first_wrong is not None for r in cancelled)
    assert all(r.boxed for r in reports("boxed")) and not any(r.boxed or r.right for r in reports("malformed"))
    assert all(r.answer is None for r in reports("no answer")) and not write(tasks[0], rng, "ramble").ended
    with pytest.raises(ConfigError, match=r"unknown style .rigth.*right"):
        write(tasks[0], rng, "rigth")
    with pytest.raises(ConfigError, match="filler=1"):
        Style(filler=1.0)


def test_numbers_and_words_are_single_tokens(policy) -> None:
    for text in ("19", "7", "answer ", "check ok", "first, ", "\\boxed{", " A:"):
        assert len(policy.encode(text)) == 1, text
    assert [policy.decode([i]) for i in policy.encode("12+7=19\n")] == ["12", "+", "7", "=", "19", "\n"]


def test_scripted_trajectories_can_be_cut_and_scored(policy) -> None:
    made = scripts(policy, 40, {"right": 0.5, "ramble": 0.5}, max_tokens=48, seed=3)
    assert made == scripts(policy, 40, {"right": 0.5, "ramble": 0.5}, max_tokens=48, seed=3)
    for t in made:
        ramble = t.info["style"] == 1
        assert t.stop is (StopReason.LENGTH if ramble else StopReason.DONE)
        assert (t.turns[0].token_ids[-1] == policy.tokenizer.eos_token_id) != ramble and len(t) <= 48
        assert policy.decode([i for i in t.turns[0].token_ids if i != policy.tokenizer.eos_token_id]) == t.turns[0].text
        if not ramble:
            assert len(LINES.spans(t)) == len(t.info["labels"])
    tasks = make_tasks(3)
    assert {t.task.id for t in scripts(policy, 30, tasks=tasks)} <= {t.id for t in tasks}
    with pytest.raises(ConfigError, match="shares"):
        scripts(policy, 3, {"right": 0.0})


def test_gold_rewards(policy) -> None:
    made = scripts(policy, 30, Style(error=0.3, filler=0.3), seed=1)
    outcomes, steps = ChainCorrect()(made), StepOracle(right=1.0, wrong=-1.0, filler=0.5)(made)
    for t, outcome, score in zip(made, outcomes, steps, strict=True):
        report = check(t.task, t.turns[0].text)
        assert outcome.value == score.value == float(report.right)
        assert score.step_spans == tuple(LINES.spans(t))
        wanted = [(0.5 if x.kind == "filler" else 1.0) if x.correct else -1.0 for x in report.lines]
        assert list(score.steps or ()) == wanted
        assert outcome.parts["coverage"] == report.coverage and outcome.parts["share_filler"] == report.share_filler
    boxed = ChainCorrect(boxed=True)
    task = made[0].task
    plain = Trajectory(task, (Turn("policy", f"answer {task.reference}"),), StopReason.DONE)
    box = Trajectory(task, (Turn("policy", f"\\boxed{{{task.reference}}}"),), StopReason.DONE)
    assert [s.value for s in boxed([plain, box])] == [0.0, 1.0]
    only_end = Trajectory(
        task, (Turn("policy", "", (policy.tokenizer.eos_token_id,)),), StopReason.DONE, prompt_ids=(1,)
    )
    assert StepOracle()([only_end])[0].steps == (0.0,) and step_labels(only_end) == (False,)
    assert all(step_labels(t) == t.info["labels"] for t in made)


def test_a_completion_that_is_cut_off_ends_its_trajectory_with_length(policy) -> None:
    from guerdon.training.arithmetic import solve

    groups = solve(policy, make_tasks(8), max_tokens=2, seed=0)
    stops = {g.trajectories[0].stop for g in groups}
    assert StopReason.LENGTH in stops and stops <= {StopReason.LENGTH, StopReason.DONE}
    assert isinstance(Solve(), Solve)


def test_a_warm_start_is_made_once_and_shared(tmp_path) -> None:
    import torch

    from guerdon.training.arithmetic import warm_start

    settings = {"examples": 40, "steps": 2, "hidden": 32, "layers": 1, "heads": 2, "batch_size": 8}
    first = warm_start({"right": 0.5, Style(filler=0.2): 0.5}, folder=tmp_path, **settings)
    second = warm_start({"right": 0.5, Style(filler=0.2): 0.5}, folder=tmp_path, **settings)
    assert sum(p.is_dir() for p in tmp_path.iterdir()) == 1
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    warm_start({"right": 1.0}, folder=tmp_path, **settings)
    assert sum(p.is_dir() for p in tmp_path.iterdir()) == 2
