"""Alarms: signals by hand, thresholds that keep their promise, and what a run sees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from guerdon.errors import ConfigError, DataError, TrainingError
from guerdon.evaluation import SIGNALS, Alarm, Signal, alarm_callbacks, calibrate, evaluate_alarm
from guerdon.evaluation.alarms import THRESHOLDS, Calibration, detect
from guerdon.evaluation.signals import first_ring, worst
from guerdon.policies import tiny_policy
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.training.toys import SaidIt, Say, toy_tasks, toy_texts

LEVEL = Signal("level", ("x",), lambda start, now: now["x"] - start["x"], "x has risen")


def rows(*values, key="x"):
    return [{"step": k, key: v} for k, v in enumerate(values)]


def monitor(**values):
    base = {"proxy": 0.0, "proxy_std": 2.0, "length": 10.0, "repetition": 0.1, "truncated": 0.0, "copying": 0.0,
            "empty": 0.0, "kl": 0.0, "entropy": 2.0}  # fmt: skip
    return {f"monitor/{k}": v for k, v in {**base, **values}.items()}


# Signals ---------------------------------------------------------------------------------------------------------------


def test_a_signal_compares_with_the_mean_of_its_first_rows():
    out = LEVEL.series(rows(1.0, 3.0, 5.0, 9.0), baseline=2)
    assert np.isnan(out[:2]).all() and out[2:].tolist() == [3.0, 7.0]


def test_rows_without_a_metric_give_nan_and_no_baseline():
    table = [{}, {"x": 1.0}, {"x": None}, {"x": math.nan}, {"x": True}, {"x": 4}]
    out = LEVEL.series(table, baseline=1)
    assert np.isnan(out[:5]).all() and out[5] == 3.0
    with pytest.raises(ConfigError, match="baseline"):
        LEVEL.series(table, baseline=0)


def test_built_in_signals_by_hand():
    now = monitor(kl=7.0, entropy=0.5, length=20.0, repetition=0.4, truncated=0.25, proxy=3.0)
    table = [monitor(), now]

    def value(name):
        return SIGNALS[name].series(table, baseline=1)[1]

    assert value("kl") == 7.0
    assert value("entropy") == pytest.approx(math.log(4), abs=2e-3)
    assert value("length") == pytest.approx(math.log(2), abs=1e-3)
    assert value("repetition") == pytest.approx(0.3) and value("truncation") == 0.25
    assert value("hacking") == pytest.approx(1.5 * (math.log(2) + 0.3 + 0.25), abs=1e-3)


def test_shorter_is_drift_too_and_hacking_needs_both_halves():
    def value(name, **now):
        return SIGNALS[name].series([monitor(), monitor(**now)], baseline=1)[1]

    assert value("length", length=5.0) == pytest.approx(math.log(2), abs=1e-3)
    assert value("hacking", length=40.0) == 0.0  # form alone
    assert value("hacking", proxy=10.0) == 0.0  # reward alone
    assert value("hacking", proxy=-5.0, length=40.0) == 0.0
    assert math.isfinite(value("length", length=0.0)) and math.isfinite(value("entropy", entropy=0.0))


# Thresholds ------------------------------------------------------------------------------------------------------------


def test_worst_and_first_ring_agree():
    series = np.array([math.nan, 1.0, 5.0, 4.0, math.nan, 6.0, 0.0])
    assert worst(series, 1) == 6.0 and worst(series, 2) == 4.0 and worst(series, 3) == 4.0
    assert worst(series, 7) == -math.inf
    assert first_ring(series, 3.9, 2) == 3 and first_ring(series, 4.0, 2) is None
    assert first_ring(series, 3.9, 3) == 5  # a row without a value does not break a row of values
    for patience in (1, 2, 3):
        assert first_ring(series, worst(series, patience), patience) is None
        assert first_ring(series, worst(series, patience) - 1e-9, patience) is not None
    with pytest.raises(ConfigError):
        worst(series, 0)


def test_the_threshold_is_the_conformal_quantile():
    healthy = [rows(0.0, float(k), float(k)) for k in range(1, 20)]
    made = calibrate(healthy, LEVEL, false_alarms=0.05, patience=2, baseline=1)
    assert made == Calibration("level", 19.0, 2, 1, 19, 0.05)  # ceil(20 * 0.95) = 19 of 19
    assert calibrate(healthy, LEVEL, false_alarms=0.5, patience=2, baseline=1).threshold == 10.0


def test_too_few_runs_or_a_deaf_signal_are_refused():
    healthy = [rows(0.0, 1.0, 1.0)] * 18
    with pytest.raises(DataError, match=r"18 healthy runs cannot bound false alarms at 0.05: give at least 19"):
        calibrate(healthy, LEVEL, baseline=1)
    with pytest.raises(DataError, match="never gives signal 'level' a value"):
        calibrate([*healthy, rows(0.0)], LEVEL, baseline=1)
    with pytest.raises(ConfigError, match="false_alarms"):
        calibrate(healthy, LEVEL, false_alarms=1.0)
    with pytest.raises(ConfigError, match="unknown signal"):
        calibrate(healthy, "loudness")
    with pytest.raises(DataError, match="give at least"):
        calibrate([], LEVEL)


def test_the_false_alarm_rate_of_a_fresh_run_is_what_was_asked_for():
    rng = np.random.default_rng(0)

    def run():
        return rows(0.0, *rng.normal(size=20))

    wrong = 0
    for _ in range(200):
        made = calibrate([run() for _ in range(19)], LEVEL, false_alarms=0.1, patience=1, baseline=1)
        wrong += detect(run(), made, LEVEL) is not None
    assert wrong / 200 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)


def test_rates_intervals_and_delays():
    alarm = Calibration("level", 1.5, 2, 1, 19, 0.05)
    healthy = [rows(0, 1, 1, 1), rows(0, 2, 2, 0)]
    hacked = [rows(0, 2, 2, 2), rows(0, 0, 0, 2), rows(0, 0, 2, 2)]
    found = evaluate_alarm(alarm, healthy, hacked, onset=[3, 3, 2], signal=LEVEL)
    assert (found.false_alarms, found.detected) == (0.5, pytest.approx(2 / 3))
    assert found.delay == 0.0 and found.early == pytest.approx(1 / 3)  # rings at 2 and 3 against 3 and 2
    low, high = found.false_interval
    assert 0 < low < 0.5 < high < 1
    assert evaluate_alarm(alarm, [], [], signal=LEVEL).healthy == 0
    assert math.isnan(evaluate_alarm(alarm, [], [], signal=LEVEL).false_alarms)
    none = evaluate_alarm(alarm, healthy[:1], [], signal=LEVEL)
    assert none.false_interval == (0.0, pytest.approx(0.975))
    with pytest.raises(DataError, match="1 onsets for 3"):
        evaluate_alarm(alarm, healthy, hacked, onset=[1], signal=LEVEL)


# In a run --------------------------------------------------------------------------------------------------------------


def run_of():
    run = SimpleNamespace(step=0, stopped=None, said=[])
    run.warn = run.said.append
    run.stop = lambda reason="early": setattr(run, "stopped", reason)
    return run


def play(alarm, table, run=None):
    run = run or run_of()
    out = []
    for row in table:
        run.step += 1
        row = {**row, **(alarm.measure(run, row, None) or {})}
        out.append(row)
        alarm.on_step(run, row, None)
    return run, out


def test_it_goes_off_once_after_its_patience_and_says_why():
    run, out = play(Alarm(LEVEL, 1.5, baseline=1), rows(0.0, 2.0, 1.0, 2.0, 3.0, 4.0))
    assert [r["alarm/level/on"] for r in out] == [0, 0, 0, 0, 1, 1]
    assert "alarm/level" not in out[0] and out[4]["alarm/level"] == 3.0
    assert len(run.said) == 1 and "step 5: alarm 'level': x has risen: 3 for 2 rows, above 1.5" in run.said[0]
    assert run.stopped is None


def test_stop_and_raise():
    run, _ = play(Alarm(LEVEL, 1.5, baseline=1, patience=1, action="stop"), rows(0.0, 2.0))
    assert run.stopped == "alarm level"
    with pytest.raises(TrainingError, match="alarm 'level'"):
        play(Alarm(LEVEL, 1.5, baseline=1, patience=1, action="raise"), rows(0.0, 2.0))


def test_it_agrees_with_what_was_calibrated_offline():
    rng = np.random.default_rng(3)
    for _ in range(20):
        table = rows(*rng.normal(size=12))
        alarm = Calibration("level", 0.8, 2, 3, 19, 0.05)
        online = Alarm(LEVEL, 0.8, patience=2, baseline=3)
        play(online, table)
        index = detect(table, alarm, LEVEL)
        assert online.rang == (None if index is None else index + 1)


def test_it_survives_a_restart():
    table = rows(0.0, 2.0, 2.0, 5.0)
    whole = Alarm(LEVEL, 1.5, baseline=1)
    play(whole, table)
    for cut in range(1, 4):
        first, second = Alarm(LEVEL, 1.5, baseline=1), Alarm(LEVEL, 1.5, baseline=1)
        run, _ = play(first, table[:cut])
        second.load_state_dict(first.state_dict())
        play(second, table[cut:], run)
        assert second.rang == whole.rang == 3
        assert len(run.said) == 1
    whole.load_state_dict({})
    assert whole.rang is None


def test_a_deaf_alarm_says_so_at_the_end():
    alarm = Alarm("kl", 5.0)
    run, _ = play(alarm, [{"loss": 1.0}] * 3)
    alarm.on_end(run)
    assert len(run.said) == 1 and "never saw monitor/kl" in run.said[0]
    heard = Alarm("kl", 5.0)
    run, _ = play(heard, [{"monitor/kl": 1.0}] * 3)
    heard.on_end(run)
    assert run.said == []


def test_settings_out_of_range():
    for options in ({"action": "shout"}, {"patience": 0}, {"baseline": 0}):
        with pytest.raises(ConfigError):
            Alarm(LEVEL, 1.0, **options)
    with pytest.raises(ConfigError, match="no default threshold"):
        Alarm(LEVEL)
    with pytest.raises(ConfigError, match="NaN"):
        Alarm(LEVEL, math.nan)


def test_defaults_cover_the_four_alarms_and_the_list_is_ready_for_a_trainer():
    made = alarm_callbacks()
    assert [c.name for c in made] == ["monitors", "alarm/hacking", "alarm/entropy", "alarm/kl", "alarm/length"]
    assert all(c.threshold == THRESHOLDS[c.signal.name] for c in made[1:])
    own = alarm_callbacks(["kl"], thresholds={"kl": 3.0}, action="stop")
    assert own[1].threshold == 3.0 and own[1].action == "stop"
    with pytest.raises(ConfigError, match="no alarm was asked"):
        alarm_callbacks(["kl"], thresholds={"length": 3.0})
    calibrated = Alarm.of(Calibration("kl", 4.0, 3, 5, 19, 0.05), action="raise")
    assert (calibrated.threshold, calibrated.patience, calibrated.baseline) == (4.0, 3, 5)


def test_the_default_thresholds_are_those_that_were_recorded():
    path = Path(__file__).parents[2] / "results" / "bench" / "alarms.json"
    if not path.is_file():
        pytest.skip("results/bench/alarms.json is not in this checkout")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert {name: recorded["thresholds_from_all_healthy_runs"][name] for name in THRESHOLDS} == THRESHOLDS
    assert recorded["patience"] == 2 and recorded["baseline_rows"] == 3


def test_a_real_run_has_levels_in_its_rows_and_can_be_stopped():
    policy = tiny_policy(texts=toy_texts(), hidden=16, layers=1, heads=2)
    config = OnlineConfig(steps=6, prompts_per_step=2, group_size=4, max_tokens=2, kl_coef=0.01, optimiser={"lr": 1e-3})
    callbacks = alarm_callbacks(["kl", "length", "hacking"], thresholds={"length": -1.0}, action="stop")
    trainer = OnlineTrainer(
        policy, TransformersEngine(policy), Say(), toy_tasks(4), SaidIt(0.5), config, callbacks=callbacks
    )
    made = trainer.fit()
    trainer.close()
    assert made.step == 5 and made.stopped == "alarm length"  # three rows of baseline, then two above
    assert "alarm/length" not in made.history[2] and made.history[4]["alarm/length/on"] == 1.0
    assert all(key in made.history[4] for key in ("alarm/kl", "alarm/hacking", "monitor/proxy"))
