"""Single-round routers: what they choose, what money does to it, and that they survive saving."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError, UnknownName
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.routers import (
    ROUTERS,
    Blend,
    Constant,
    Elo,
    Knn,
    KnnRegression,
    Mlp,
    Oracle,
    RandomRouter,
    load_router,
)
from guerdon.routing.routers.base import CachedEncoder


class Topics:
    """Embeds a text by the topic words in it."""

    name = None
    calls = 0

    def encode(self, texts):
        self.calls += len(texts)
        return np.array([[float("sum" in t), float("code" in t), len(t) / 1000] for t in texts])


EMBED = ("blend", "kernel-ridge", "knn", "knn-regression", "mlp", "ridge")
LEARN = (*EMBED, "tfidf-ridge")


def make(kind, **options):
    if kind == "mlp":
        options.setdefault("iterations", 60)
    if kind == "knn-regression":
        options.setdefault("k", 5)
    return ROUTERS.create(kind, **({"encoder": Topics()} if kind in EMBED else {}), **options)


def topics(n=40, members=("maths", "coder", "both"), cost=(1e-3, 1e-3, 9e-3)):
    queries = [f"{'sum the numbers' if i % 2 else 'code the function'} of case {i}" for i in range(n)]
    scores = np.array([[float(i % 2), float(1 - i % 2), 0.9] for i in range(n)])
    return ScoreMatrix(queries, members, scores, np.tile(cost, (n, 1)))


@pytest.mark.parametrize("kind", LEARN)
def test_learned_routers_find_the_specialist(kind):
    router = make(kind).fit(topics())
    assert router.route("please sum the numbers of my case")[0] == "maths"
    assert router.route("please code the function of my case")[0] == "coder"


@pytest.mark.parametrize("kind", LEARN)
def test_all_weight_on_money_takes_the_cheapest(kind):
    m = topics(cost=(3e-3, 2e-3, 9e-3))
    chosen = make(kind).fit(m).choose(m.queries, alpha=1.0)
    assert set(chosen.tolist()) == {1}


@pytest.mark.parametrize("kind", [*LEARN, "elo", "constant", "cheapest", "dearest", "largest", "random"])
def test_saved_router_routes_alike(kind, tmp_path, monkeypatch):
    import guerdon.policies.encoder as home

    monkeypatch.setattr(home, "load_encoder", lambda ref: Topics())
    options = {"encoder": "named"} if kind in EMBED else {}
    if kind == "mlp":
        options["iterations"] = 5
    m = topics()
    router = ROUTERS.create(kind, **options).fit(m)
    router.alpha = 0.25
    again = load_router(router.save(tmp_path / "router.npz"))
    assert type(again) is type(router) and again.members == m.members
    assert again.scores(m.queries) == pytest.approx(router.scores(m.queries), abs=1e-5)
    assert again.route("code the thing") == router.route("code the thing")


def test_an_encoder_without_a_name_cannot_be_saved(tmp_path):
    with pytest.raises(ConfigError, match="encoder has no name"):
        make("ridge").fit(topics()).save(tmp_path / "r.npz")
    with pytest.raises(ConfigError, match="not fitted"):
        make("elo").save(tmp_path / "r.npz")


def test_what_is_no_saved_router_is_refused_and_no_pickle_is_opened(tmp_path):
    path = tmp_path / "r.npz"
    path.write_text("nothing")
    with pytest.raises(DataError, match="no saved router"):
        load_router(path)
    np.savez(path, meta=np.array([{"kind": "elo"}], dtype=object))
    with pytest.raises(DataError, match="no saved router"):
        load_router(path)
    with pytest.raises(DataError, match="no saved router"):
        load_router(tmp_path / "absent.npz")


def test_rules_choose_by_cost_size_and_quality():
    m = ScoreMatrix(
        ("p", "q"), ("a", "b", "c"), [[1, 0, 0.4], [1, 0, 0.4]], [[2, 1, 3], [2, 1, 3]], sizes={"a": 7.0, "b": 70.0}
    )
    picks = {
        k: m.members[int(ROUTERS.create(k).fit(m).choose(["x"])[0])]
        for k in ("constant", "cheapest", "dearest", "largest")
    }
    assert picks == {"constant": "a", "cheapest": "b", "dearest": "c", "largest": "b"}
    with pytest.raises(UnknownName):
        Constant("z").fit(m)


def test_failed_calls_count_against_a_constant_but_teach_a_learner_nothing():
    scores = np.array([[1.0, 0.8]] * 10)
    failed = np.zeros((10, 2), bool)
    failed[:5, 0] = True
    m = ScoreMatrix([f"case {i}" for i in range(10)], ("a", "b"), scores, np.ones((10, 2)), failed)
    assert m.members[Constant().fit(m).index] == "b"
    router = KnnRegression(3, encoder=Topics()).fit(m)
    assert router.scores(["case 1"])[0] == pytest.approx([1.0, 0.8])
    ridge = ROUTERS.create("ridge", encoder=Topics()).fit(m)
    assert ridge.scores(["case 1"])[0] == pytest.approx([1.0, 0.8], abs=1e-9)


def test_a_member_that_always_failed_cannot_be_learned():
    m = ScoreMatrix(("p", "q"), ("a", "b"), [[1, 0], [1, 0]], np.ones((2, 2)), [[False, True], [False, True]])
    with pytest.raises(DataError, match="'b' has no successful call"):
        make("ridge").fit(m)


def test_knn_votes_with_the_first_best_member_on_ties():
    m = ScoreMatrix(("sum 1", "sum 2", "code 3"), ("a", "b"), [[0.5, 0.5], [0, 1], [0, 1]], np.ones((3, 2)))
    router = Knn(2, encoder=Topics()).fit(m)
    assert router.scores(["sum 9"])[0].tolist() == [0.5, 0.5]
    assert router.choose(["sum 9"]).tolist() == [0]
    assert Knn(50, encoder=Topics()).fit(m).scores(["sum 9"])[0] == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(ConfigError):
        Knn(0)


def test_knn_agrees_with_scikit_learn():
    neighbours = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5))
    known = {str(i): x[i] for i in range(80)}

    class Lookup:
        def encode(self, texts):
            return np.stack([known[t] for t in texts])

    scores = rng.random((60, 4))
    m = ScoreMatrix([str(i) for i in range(60)], tuple("abcd"), scores, np.ones((60, 4)))
    other = neighbours.KNeighborsClassifier(5).fit(x[:60], scores.argmax(1))
    ask = [str(i) for i in range(60, 80)]
    assert Knn(5, encoder=Lookup()).fit(m).choose(ask).tolist() == other.predict(x[60:]).tolist()


def test_ridge_agrees_with_the_normal_equations_member_by_member():
    m = topics(12)
    scores = m.scores.copy()
    scores[3, 2] = scores[7, 2] = np.nan
    m = ScoreMatrix(m.queries, m.members, scores, m.cost)
    router = ROUTERS.create("ridge", penalty=0.5, encoder=Topics()).fit(m)
    x = Topics().encode(m.queries)
    centre = x.mean(0)
    for j in range(3):
        ok = np.isfinite(scores[:, j])
        a, y = x[ok] - centre, scores[ok, j]
        w = np.linalg.solve(a.T @ a + 0.5 * np.eye(3), a.T @ (y - y.mean()))
        assert router.scores(m.queries)[:, j] == pytest.approx((x - centre) @ w + y.mean())


def test_mlp_with_one_and_two_classes():
    pytest.importorskip("sklearn")
    one = ScoreMatrix(("p", "q"), ("a", "b"), [[0, 1], [0, 1]], np.ones((2, 2)))
    assert Mlp(encoder=Topics()).fit(one).scores(["x"]).tolist() == [[0.0, 1.0]]
    m = topics().take(range(20))
    two = ScoreMatrix(m.queries, ("a", "b"), m.scores[:, :2], m.cost[:, :2])
    router = Mlp(encoder=Topics(), iterations=60).fit(two)
    assert router.choose(two.queries).tolist() == two.scores.argmax(1).tolist()
    assert router.scores(two.queries).sum(1) == pytest.approx(np.ones(20))


def test_elo_orders_members_and_is_fair_to_equals():
    m = ScoreMatrix(("p", "q"), ("a", "b", "c"), [[0.2, 1, 0.2], [0.2, 1, 0.2]], np.ones((2, 3)))
    router = Elo().fit(m)
    assert router.ratings[1] > router.ratings[0] == pytest.approx(router.ratings[2])
    # One drawn game is added to two won ones: odds of 2.5 to 0.5 against each of the others.
    assert router.ratings[1] - router.ratings[0] == pytest.approx(400 * np.log10(5), abs=1e-3)


def test_random_depends_on_the_question_and_the_seed_only():
    m = topics(30)
    r = RandomRouter(seed=3).fit(m)
    whole = r.choose(m.queries)
    assert [int(r.choose([q])[0]) for q in m.queries] == whole.tolist()
    assert len(set(whole.tolist())) == 3
    assert whole.tolist() != RandomRouter(seed=4).fit(m).choose(m.queries).tolist()


def test_oracle_takes_the_cheapest_of_the_best_and_cannot_route():
    m = ScoreMatrix(("p", "q", "r"), ("a", "b"), [[1, 1], [0, 1], [0, 0]], [[3, 2], [3, 4], [3, 4]])
    oracle = Oracle().fit(m)
    assert oracle.decide(m).tolist() == [1, 1, 0]
    with pytest.raises(ConfigError, match="labels"):
        oracle.route("p")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 12))
def test_oracle_is_at_least_as_good_as_anybody(seed, members, n):
    rng = np.random.default_rng(seed)
    m = ScoreMatrix(
        [f"q {i}" for i in range(n)], [f"m{j}" for j in range(members)], rng.integers(0, 3, (n, members)) / 2,
        rng.random((n, members)), rng.random((n, members)) < 0.1,
    )  # fmt: skip
    rows = np.arange(n)
    top = m.quality[rows, Oracle().fit(m).decide(m)]
    for other in (RandomRouter(seed=seed), Constant()):
        assert (top >= m.quality[rows, other.fit(m).decide(m)]).all()


def test_single_member_is_always_chosen():
    m = ScoreMatrix(("sum 1", "code 2"), ("only",), [[1], [0]], [[0.1], [0.1]])
    for kind in ("knn", "ridge", "kernel-ridge", "elo", "mlp"):
        assert make(kind, alpha=0.5).fit(m).route("sum 3")[0] == "only"


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        make("elo", alpha=alpha)
    with pytest.raises(ConfigError, match="alpha"):
        make("elo").fit(topics()).choose(["x"], alpha=alpha)


def test_unfitted_and_empty():
    with pytest.raises(ConfigError, match="not fitted"):
        make("ridge").scores(["x"])
    assert make("ridge").fit(topics()).choose([]).shape == (0,)
    with pytest.raises(ConfigError, match="blend"):
        Blend([Constant()])


def test_cached_encoder_embeds_once_and_forgets_beyond_its_limit():
    inner = Topics()
    cached = CachedEncoder(inner, limit=2)
    assert cached.encode(["sum", "code", "sum", "other"]).shape == (4, 3)
    assert inner.calls == 3
    cached.encode(["other"])
    assert inner.calls == 3
    cached.encode(["sum"])
    assert inner.calls == 4
