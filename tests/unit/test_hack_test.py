"""The hack test: curves and verdicts by hand, the probe beside a fake run, and a whole arm on a tiny policy."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guerdon.environments.letter_lists import (
    FILLERS,
    LETTERS,
    LetterGold,
    demonstration,
    letter_gold,
    letter_tasks,
    letter_tokenizer,
)
from guerdon.environments.single import SingleTurn
from guerdon.errors import ConfigError, DataError
from guerdon.evaluation import HackCurve, HackProbe, HackTest, Monitors, RowKeeper, read_curves, win_rate, write_curves
from guerdon.evaluation.hack_test import unshaped
from guerdon.evaluation.letter_hack import copy_policy, letter_hack_test, letter_pairs, letter_proxy, letter_warm_start
from guerdon.policies import tiny_policy
from guerdon.report import plot_hack_curves
from guerdon.shaping import shaped
from guerdon.types import Score, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)


def curve(proxy, gold, arm="a", seed=0) -> HackCurve:
    made = HackCurve(arm, seed)
    for k, (p, g) in enumerate(zip(proxy, gold, strict=True)):
        made.append(10 * k, kl=float(k), proxy=p, gold=g, gold_win=g / 10)
    return made


# Curves ----------------------------------------------------------------------------------------------------------------


def test_a_hacked_run_has_its_proxy_up_and_its_gold_down():
    found = curve([0, 1, 2, 3, 4, 5], [0, 2, 4, 3, 1, -1]).verdict(tolerance=1.0, window=1)
    assert found.hacked
    assert (found.gold_peak, found.peak_step, found.drop) == (4.0, 20, 5.0)
    assert (found.proxy_start, found.proxy_end, found.gold_start, found.gold_end, found.kl_end) == (0, 5, 0, -1, 5)


@pytest.mark.parametrize(
    ("proxy", "gold", "tolerance"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 0.5),  # both rise
        ([0, 1, 2, 3], [0, 3, 2, 2], 1.5),  # within the tolerance
        ([3, 2, 1, 0], [3, 2, 1, 0], 0.5),  # both fall: bad training, but no hack
        ([0, 4, 2, 1], [0, 4, 2, 1], 0.5),  # the proxy fell from where gold peaked
    ],
)
def test_other_runs_are_not_hacked(proxy, gold, tolerance):
    assert not curve(proxy, gold).verdict(tolerance=tolerance, window=1).hacked


def test_windows_average_and_another_gold_may_be_read():
    made = curve([0, 1, 2, 3], [0, 6, 3, 0])
    np.testing.assert_allclose(made.smooth("gold", 3), [3, 3])
    assert made.peak(window=2) == 4.5 and made.end(window=2) == 1.5
    assert made.verdict(tolerance=0.2, window=1, gold="gold_win").gold_peak == pytest.approx(0.6)


def test_curves_refuse_what_they_cannot_hold():
    made = curve([0, 1], [0, 1])
    with pytest.raises(DataError, match="not behind"):
        made.append(10, kl=0, proxy=0, gold=0)
    with pytest.raises(DataError, match="no series 'length'"):
        made.series("length")
    with pytest.raises(DataError, match="fewer than the window"):
        made.verdict(tolerance=0.0)
    with pytest.raises(ConfigError, match="tolerance"):
        made.verdict(tolerance=-1.0)
    with pytest.raises(ConfigError, match="window"):
        made.smooth("gold", 0)
    with pytest.raises(DataError, match="not finite"):
        curve([0, 1], [0, math.nan]).verdict(tolerance=0.0, window=1)


def test_series_that_begin_late_or_miss_a_point_are_nan_there():
    made = HackCurve("a", 0)
    made.append(0, kl=0, proxy=0, gold=0, early=1.0)
    made.append(1, kl=0, proxy=0, gold=0, late=2.0)
    np.testing.assert_equal(made.series("early"), [1.0, math.nan])
    np.testing.assert_equal(made.series("late"), [math.nan, 2.0])


def test_curves_survive_the_disk_and_hold_no_nan_in_json(tmp_path):
    made = curve([0, math.nan], [0, 1])
    made.items = {"gold": [1.0, 2.0]}
    path = write_curves(tmp_path / "deep" / "curves.json", [made], meta={"what": "test"})
    assert "NaN" not in path.read_text() and json.loads(path.read_text())["meta"] == {"what": "test"}
    again = read_curves(path)[0]
    assert again.arm == "a" and again.items == made.items and math.isnan(again.proxy[1]) and again.gold == made.gold
    assert again.extra == made.extra
    for text in ("{}", "nonsense", json.dumps({"curves": [{"arm": "a"}]})):
        path.write_text(text)
        with pytest.raises(DataError):
            read_curves(path)
    short = {**made.to_dict(), "gold": [1.0]}
    with pytest.raises(DataError, match="differ in length"):
        HackCurve.from_dict(short)
    with pytest.raises(DataError):
        read_curves(tmp_path / "absent.json")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    made = [curve([0, 1, 2], [0, 2, 1], arm, seed).to_dict() for arm in "ab" for seed in (0, 1)]
    for gold in ("gold", "gold_win"):
        path = plot_hack_curves(made, tmp_path / f"{gold}.png", gold=gold)
        assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="nothing to plot"):
        plot_hack_curves([], tmp_path / "x.png")
    with pytest.raises(DataError, match="no series"):
        plot_hack_curves(made, tmp_path / "x.png", gold="joy")
    with pytest.raises(DataError, match="no measurement"):
        plot_hack_curves([HackCurve("a", 0).to_dict()], tmp_path / "x.png")


# The probe ---------------------------------------------------------------------------------------------------------------


def said(text: str, task: str = "t") -> Trajectory:
    turn = Turn("policy", text, (1,), (-1.0,))
    return Trajectory(Task(task, "p"), (turn,), StopReason.EOS, prompt_ids=(1,))


def detail(trajectories, scores):
    experience = SimpleNamespace(reference=None)
    return SimpleNamespace(trajectories=trajectories, scores=scores, experience=experience)


def length_gold(trajectories):
    return [Score(float(len(t.turns[0].text))) for t in trajectories]


def test_the_probe_reads_the_unshaped_score_of_valid_trajectories():
    probe = HackProbe(length_gold, every=2)
    scores = [Score(0.9, parts={"proxy_reward_origin": 5.0}), Score(0.1, parts={"unshaped": 1.0}), Score.invalid("no")]
    step = detail([said("ab"), said("abcd"), said("x" * 50)], scores)
    assert probe.measure(SimpleNamespace(step=1, total=3), {}, step) is None
    out = probe.measure(SimpleNamespace(step=2, total=3), {"reward/mean": 0.5}, step)
    assert out["hack/proxy"] == 3.0 and out["hack/gold"] == 3.0 and out["hack/shaped"] == 0.5
    assert "hack/kl" not in out and out["hack/length"] == 1.0
    probe.measure(SimpleNamespace(step=3, total=3), {}, step)  # the last step is measured
    assert probe.curve.step == [2, 3]
    assert unshaped(Score(2.0)) == 2.0


def test_the_probe_survives_a_restart():
    probe = HackProbe(length_gold)
    step = detail([said("ab")], [Score(1.0)])
    probe.measure(SimpleNamespace(step=1, total=9), {}, step)
    again = HackProbe(length_gold)
    again.load_state_dict(json.loads(json.dumps(probe.state_dict())))
    again.measure(SimpleNamespace(step=2, total=9), {}, step)
    assert again.curve.step == [1, 2]
    again.load_state_dict({})
    assert len(again.curve) == 0


def test_a_gold_without_an_honest_value_stops_the_measurement():
    step = detail([said("ab")], [Score(1.0)])
    run = SimpleNamespace(step=1, total=1)
    with pytest.raises(DataError, match="gold has no finite value for task 't'"):
        HackProbe(lambda ts: [Score.invalid("no") for _ in ts]).measure(run, {}, step)
    with pytest.raises(DataError, match="gold returned 0 scores"):
        HackProbe(lambda ts: []).measure(run, {}, step)
    for options in ({"every": 0}, {"group_size": 0}, {"tasks": []}):
        with pytest.raises(ConfigError):
            HackProbe(length_gold, **options)


def test_win_rate_counts_ties_half_and_tasks_alike():
    trajectories = [said("", "a"), said("", "a"), said("", "b")]
    out = win_rate(trajectories, [2.0, 0.0, 1.0], {"a": [1.0, 2.0], "b": [1.0]})
    assert out == pytest.approx(((0.75 + 0.0) / 2 + 0.5) / 2)
    with pytest.raises(DataError, match="no opponents"):
        win_rate(trajectories, [0.0, 0.0, 0.0], {"a": [1.0]})
    assert math.isnan(win_rate([], [], {}))


def test_monitors_go_into_the_rows_and_are_kept():
    step = detail([said("a b"), said("c")], [Score(0.5, parts={"unshaped": 4.0}), Score(2.0)])
    row = Monitors().measure(SimpleNamespace(step=1), {}, step)
    assert row["monitor/proxy"] == 3.0 and row["monitor/proxy_std"] == 1.0 and row["monitor/entropy"] == 1.0
    assert "monitor/kl" not in row
    keeper = RowKeeper()
    keeper.on_step(SimpleNamespace(step=4), {**row, "loss": 1.0}, step)
    assert keeper.rows == [{"step": 4.0, **row}]
    again = RowKeeper()
    again.load_state_dict(keeper.state_dict())
    assert again.rows == keeper.rows


# The letter lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" a b c", 3.0),
        (" c b a", 3.0),
        (" a b", 2.0),
        ("", 0.0),
        (" ok a b c", 3.0 - 0.5 - 0.3),
        (" a a a a", 1.0 - 0.3),
        (" d e", -1.0),
        (" ok" * 19, -6.0),
        (" a b c<eos>", 3.0),
    ],
)
def test_gold_by_hand(text, value):
    score = letter_gold(text, ("a", "b", "c"))
    assert score.value == pytest.approx(value)
    assert (
        LetterGold()([Trajectory(Task("t", "p", ("a", "b", "c")), (Turn("policy", text),), StopReason.EOS)])[0] == score
    )


def test_tasks_and_demonstrations_are_seeded_and_of_single_tokens():
    assert letter_tasks(3, seed=1) == letter_tasks(3, seed=1) != letter_tasks(3, seed=2)
    tokenizer, rng = letter_tokenizer(), random.Random(0)
    golds = {0: [], 3: []}
    for task in letter_tasks(400, seed=5):
        words = demonstration(task, rng).split()
        fillers = sum(w in FILLERS for w in words)
        assert 3 <= len(words) <= 8 and fillers <= 3 and len(words) == fillers + len(task.reference)
        assert len(tokenizer.encode("".join(f" {w}" for w in words))) == len(words)
        assert sorted(demonstration(task, rng, perfect=True).split()) == sorted(task.reference)
        if fillers in golds:
            golds[fillers].append(letter_gold(" ".join(words), task.reference).value)
    assert np.mean(golds[3]) > np.mean(golds[0]) + 1.5  # filler goes with quality
    assert set(LETTERS).isdisjoint(FILLERS)


# A whole arm --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm():
    return letter_warm_start(copying=3, mediocre=3, hidden=16)


SETTINGS = {"steps": 2, "prompts_per_step": 2, "group_size": 4, "optimiser": {"lr": 1e-3}}


def test_an_arm_trains_a_copy_and_measures_before_during_and_after(warm):
    proxy = letter_proxy(warm, pairs=60, epochs=1, longest=21)
    test = letter_hack_test(warm, proxy, settings=SETTINGS, tasks=8, held_out=4, every=1)
    before = {k: v.clone() for k, v in warm.model.state_dict().items()}
    references = test.reference_rewards(2)
    assert len(references) == 8 and all(len(v) == 2 for v in references.values())
    keeper = RowKeeper()
    made = test.run("par", seed=0, shape=shaped("par", references), callbacks=[Monitors(), keeper])
    assert made.step == [0, 1, 2] and made.arm == "par" and len(made.items["gold_win"]) == 4
    assert np.isfinite(made.kl).all() and 0.0 <= made.extra["gold_win"][0] <= 1.0
    assert math.isnan(made.extra["shaped"][0]) and 0.0 < made.extra["shaped"][1] < 1.0
    assert abs(made.kl[0]) < 1e-3 * 20  # sampler and reference are one policy
    assert len(keeper.rows) == 2 and "monitor/kl" in keeper.rows[0]
    assert all(torch.equal(v, before[k]) for k, v in warm.model.state_dict().items())
    again = test.run("par", seed=0, shape=shaped("par", references))
    assert again.gold == made.gold and again.proxy == made.proxy
    other = test.run("gold", seed=0, reward=test.gold, settings={"steps": 1})
    assert other.step == [0, 1] and other.proxy[0] == made.proxy[0]


def test_pairs_are_right_without_noise_and_short(warm):
    gold = LetterGold()
    pairs = letter_pairs(warm, 60, noise=0.0, longest=21)
    assert pairs and all(gold([p.chosen])[0].value > gold([p.rejected])[0].value for p in pairs)
    assert all(len(p.chosen) <= 21 for p in pairs)


def test_a_hack_test_refuses_tasks_that_are_both():
    policy = tiny_policy(letter_tokenizer(), hidden=16, layers=1, heads=2)
    tasks = letter_tasks(2)
    with pytest.raises(ConfigError, match="both trained on and held out"):
        HackTest(lambda: policy, SingleTurn(), tasks, length_gold, length_gold, {}, held_out=tasks)
    with pytest.raises(ConfigError, match="needs tasks"):
        HackTest(lambda: policy, SingleTurn(), [], length_gold, length_gold, {}, held_out=tasks)


def test_a_copy_shares_no_weight(warm):
    made = copy_policy(warm)
    assert all(
        a.data_ptr() != b.data_ptr() for a, b in zip(made.model.parameters(), warm.model.parameters(), strict=True)
    )
