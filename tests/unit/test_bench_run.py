"""The benchmark as a whole: the rows it must have, what it may look at, failures inside the means, output."""

from __future__ import annotations

import json

import numpy as np
import pytest

from guerdon.errors import ConfigError, DataError
from guerdon.report import markdown_table, plain_table, plot_frontier
from guerdon.routing.bench import run as run_module
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.bench.run import misspell, run_bench, run_bench_from_files
from guerdon.routing.routers import ROUTERS, KnnRegression, Ridge, Router, load_router

FAST = {"resamples": 50, "perturb": False}


class Topics:
    name = None

    def encode(self, texts):
        return np.array([[float("sum" in t), float("code" in t)] for t in texts])


def topics(n=90, *, failed=0.0, missing=0.0, seed=0):
    rng = np.random.default_rng(seed)
    queries = [f"{'sum the numbers' if i % 2 else 'code the function'} of case {i}" for i in range(n)]
    able = np.array([[0.8 * (i % 2) + 0.1, 0.9 - 0.8 * (i % 2), 0.75] for i in range(n)])
    scores = (rng.random((n, 3)) < able).astype(float)
    scores[rng.random((n, 3)) < missing] = np.nan
    broke = (rng.random((n, 3)) < failed) & ~np.isnan(scores)
    return ScoreMatrix(
        queries, ("maths", "coder", "big"), scores, np.tile([1e-3, 1e-3, 9e-3], (n, 1)), broke, name="toy"
    )


def test_the_rows_that_must_stand_beside_every_router():
    result = run_bench(topics(), ["ridge"], encoder=Topics(), **FAST)
    names = [r.name for r in result.rows]
    assert names == [
        "maths",
        "coder",
        "big",
        "best single",
        "cheapest",
        "dearest",
        "largest",
        "random",
        "ridge",
        "oracle",
    ]
    assert [r.role for r in result.rows[-2:]] == ["router", "bound"]
    assert result["best single"].shares == {result.reference: 1.0}
    assert result["best single"].figures["gain"].value == 0.0
    assert result["best single"].figures["cost_share"].value == 1.0


def test_specialists_beat_the_best_single_member_at_less_than_half_its_cost():
    result = run_bench(topics(300), ["ridge"], encoder=Topics(), **FAST)
    assert result.reference == "big"
    row = result["ridge"]
    assert row.figures["gain"].value > 0 and row.figures["cost_share"].value < 0.5
    assert row.quality <= result["oracle"].quality


@pytest.mark.parametrize("seed", range(5))
def test_oracle_bounds_every_row_and_has_perfect_figures(seed):
    result = run_bench(topics(failed=0.1, seed=seed), ["ridge", "knn", "elo"], encoder=Topics(), seed=seed, **FAST)
    best = result["oracle"]
    assert all(best.quality >= r.quality for r in result.rows)
    for name in ("opt_sel", "opt_cost", "opt_acc", "best_pick", "cost_ratio", "quality_ratio"):
        assert best.figures[name].value == pytest.approx(1.0)


def test_figures_are_the_plain_means_over_the_test_part():
    m = topics(100, failed=0.2)
    result = run_bench(m, ["elo"], **FAST)
    test = m.take(m.split((0.6, 0.2, 0.2), 0)[2])
    row = result["maths"]
    worth = np.where(test.fails[:, 0], 0.0, test.scores[:, 0])
    assert row.quality == pytest.approx(worth.mean())
    assert row.usd_per_1000 == pytest.approx(1.0)
    assert row.failed == test.fails[:, 0].sum() > 0
    assert row.covered == len(test)
    assert row.figures["quality"].ci_low <= row.quality <= row.figures["quality"].ci_high


def test_what_was_not_run_is_left_out_and_counted():
    m = topics(100, missing=0.3)
    result = run_bench(m, ["ridge"], encoder=Topics(), **FAST)
    test = m.take(m.split((0.6, 0.2, 0.2), 0)[2])
    row = result["big"]
    ran = test.ran[:, 2]
    assert row.covered == ran.sum() < len(test)
    assert row.figures["quality"].denominator == row.covered
    assert row.quality == pytest.approx(test.scores[ran, 2].mean())


def test_test_labels_decide_nothing():
    m = topics(100)
    rows = m.split((0.6, 0.2, 0.2), 0)[2]
    scores = m.scores.copy()
    scores[rows] = 1 - scores[rows]
    other = ScoreMatrix(m.queries, m.members, scores, m.cost)
    a, b = (run_bench(x, ["ridge", "knn"], encoder=Topics(), **FAST) for x in (m, other))
    assert a.reference == b.reference
    for name in ("ridge", "knn", "best single", "random"):
        assert (a[name].alpha, a[name].shares, a[name].validation) == (
            b[name].alpha,
            b[name].shares,
            b[name].validation,
        )


def test_same_seed_same_numbers():
    def stable(result):
        out = result.to_dict()
        for row in out["rows"]:
            for k in ("router_seconds", "router_usd_per_1000", "total_usd_per_1000"):
                row.pop(k)
        return out

    runs = [run_bench(topics(), ["knn"], encoder=Topics(), seed=s, resamples=50) for s in (0, 0, 1)]
    assert stable(runs[0]) == stable(runs[1])
    assert stable(runs[0]) != stable(runs[2])


def test_each_rule_of_selection():
    goal = run_module._Goal
    curve = [(0.9, 10.0), (0.8, 4.0), (0.8, 3.0), (0.5, 1.0), (float("nan"), float("nan"))]
    assert goal("budget", 5.0, 0).pick(curve) == 2
    assert goal("budget", 0.5, 0).pick(curve) == 3
    assert goal("match", 0, 0.75).pick(curve) == 2
    assert goal("match", 0, 0.95).pick(curve) == 0
    assert goal("quality", 0, 0).pick(curve) == 0
    assert goal("arena", 0, 0).pick([(0.75, 0.1), (0.75, 100.0)]) == 0
    assert goal("quality", 0, 0).pick([(float("nan"), float("nan"))]) == 0


def test_a_single_member_and_all_calls_failed():
    one = ScoreMatrix([f"q{i}" for i in range(30)], ("only",), np.ones((30, 1)), np.ones((30, 1)))
    result = run_bench(one, ["elo"], **FAST)
    assert {r.quality for r in result.rows} == {1.0}
    assert result.settings["apgr_pair"] is None
    down = ScoreMatrix(one.queries, ("a", "b"), np.ones((30, 2)), np.zeros((30, 2)), np.ones((30, 2), bool))
    result = run_bench(down, [], **FAST)
    assert {r.quality for r in result.rows} == {0.0}
    assert {r.failed for r in result.rows} == {6}


def test_settings_that_make_no_sense():
    with pytest.raises(ConfigError, match="select"):
        run_bench(topics(), [], select="best")
    with pytest.raises(ConfigError, match="alphas"):
        run_bench(topics(), [], alphas=[2])
    with pytest.raises(ConfigError, match="usd_per_hour"):
        run_bench(topics(), [], usd_per_hour=-1)
    with pytest.raises(DataError, match="'ridge'"):
        run_bench(topics(), [Ridge(1.0, encoder=Topics()), Ridge(2.0, encoder=Topics())], **FAST)


def test_a_router_from_outside_joins_by_name():
    class Longest(Router):
        kind = "longest-name"

        def _fit(self, matrix):
            self._order = np.array([len(m) for m in matrix.members], dtype=float)

        def _predict(self, queries):
            return np.tile(self._order, (len(queries), 1))

    ROUTERS.register("longest-name", Longest)
    assert run_bench(topics(), ["longest-name"], **FAST)["longest-name"].role == "router"


def test_robustness_of_a_constant_is_perfect_and_misspelling_is_mild():
    result = run_bench(topics(), ["tfidf-ridge"], resamples=50)
    assert result["big"].figures["robustness"].value == 1.0
    text = "the quick brown foxes jumped over several sleeping dogs"
    other = misspell(text, 1)
    assert other != text and sorted(other) == sorted(text) and other == misspell(text, 1)
    assert sum(a != b for a, b in zip(text.split(), other.split(), strict=True)) == 1
    assert misspell("a b") == "a b"


def test_json_table_and_files(tmp_path):
    path = tmp_path / "toy.csv"
    m = topics(60)
    lines = ["query,member,score,cost"]
    for i, q in enumerate(m.queries):
        lines += [f"{q},{name},{m.scores[i, j]},{m.cost[i, j]}" for j, name in enumerate(m.members)]
    path.write_text("\n".join(lines))
    result = run_bench_from_files(path, out=tmp_path / "out", routers=["tfidf-ridge"], **FAST)
    text = (tmp_path / "out" / "bench.json").read_text()
    assert json.loads(text) == json.loads(result.to_json()) and "NaN" not in text and str(tmp_path) not in text
    assert result.dataset["train"] + result.dataset["validation"] + result.dataset["test"] == 60
    headers, rows = result.table()
    assert all(len(r) == len(headers) for r in rows) and len(rows) == len(result.rows)
    assert plain_table(headers, rows).splitlines()[2].startswith("maths")
    saved = result.fitted["tfidf-ridge"].save(tmp_path / "router.npz")
    assert load_router(saved).alpha == result["tfidf-ridge"].alpha


def test_router_time_is_priced():
    cheap, dear = (
        run_bench(topics(), [KnnRegression(5, encoder=Topics())], usd_per_hour=u, **FAST) for u in (0.0, 3600.0)
    )
    assert cheap["knn-regression"].router_usd_per_1000 == 0.0
    row = dear["knn-regression"]
    assert row.router_usd_per_1000 == pytest.approx(1000 * row.router_seconds) and row.router_seconds > 0


def test_plain_table_aligns_and_numbers_are_flush_right():
    text = plain_table(["name", "x"], [["a", "1.5"], ["long\nname", "-"], ["b", "10.25"]])
    assert text.splitlines() == ["name      x", "----  -----", "a       1.5", "long      -", "name", "b     10.25"]
    assert plain_table(["a"], []) == "a\n-"
    with pytest.raises(DataError, match="row 1 of the table has 2 cells for 1 headers"):
        plain_table(["a"], [["1", "2"]])
    with pytest.raises(DataError):
        plain_table([], [])


def test_markdown_table_escapes():
    assert markdown_table(["a", "n"], [["x|y\nz", "1"]]) == "| a | n |\n|---|---:|\n| x\\|y<br>z | 1 |"


def test_frontier_figure(tmp_path):
    pytest.importorskip("matplotlib")
    points = [("a", 1.0, 0.5), ("sweep", 1.0, 0.6), ("sweep", 2.0, 0.7)]
    one, two = (plot_frontier(points, tmp_path / f"{k}.png", title="t", log_cost=True).read_bytes() for k in "ab")
    assert one[:4] == b"\x89PNG" and one == two
    for bad in ([], [("a", float("nan"), 1.0)]):
        with pytest.raises(DataError):
            plot_frontier(bad, tmp_path / "c.png")
    with pytest.raises(DataError, match="logarithmic"):
        plot_frontier([("a", 0.0, 1.0)], tmp_path / "c.png", log_cost=True)
    assert not (tmp_path / "c.png").exists()
