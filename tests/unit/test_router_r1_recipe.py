"""The Router-R1 recipe: what each arm trains on, and what the claims compare."""

import numpy as np
import pytest

from guerdon.papers.router_r1 import ARMS, FIRST_SEED_ONLY, SIZES, _judge, config


@pytest.mark.parametrize("scale", SIZES)
@pytest.mark.parametrize("arm", ARMS)
def test_arms_differ_in_the_reward_alone(scale, arm):
    usual, changed = config(scale), config(scale, arm)
    assert changed.model_copy(update={"reward": usual.reward}) == usual
    assert changed.reward.alpha == ARMS[arm]["alpha"]
    assert (changed.reward.alpha_after, changed.reward.alpha_ramp) == (0, 0)  # the paper's price holds from the start
    assert changed.online.steps == SIZES[scale]["steps"] > changed.online.optimiser.warmup


def row(em, calls, cost, hops, fmt=0.0):
    n = len(hops)
    items = {
        "em": list(em), "calls": list(calls), "raw_cost": list(cost), "hops": list(hops), "format_error": [fmt] * n,
    }  # fmt: skip
    by_hops = {h: {"em": float(np.mean(em)), "calls": float(np.mean(calls))} for h in ("1", "2")}
    keys = ("f1", "usd_per_1000", "valid_route_rate", "format_error_rate", "competent_rate")
    return {"items": items, "by_hops": by_hops, "em": 1.0, "raw_cost": 1.0, "calls": 1.0} | dict.fromkeys(keys, 0.5)


def test_claims_hold_where_they_should_and_arms_of_the_first_seed_alone_are_no_gap():
    rng = np.random.default_rng(0)
    hops = [1, 2] * 100
    chance = lambda p: (rng.random(200) < p).astype(float)  # noqa: E731
    calls = [1.0 if h == 1 else 2.0 for h in hops]
    results = {}
    for seed in (0, 1):
        for name in ARMS:
            if seed and name in FIRST_SEED_ONLY:
                continue
            dear = name in ("alpha 0", "no format reward")
            good = row(
                chance(0.9 if dear else 0.5), calls if dear else [1.0] * 200, [50.0 if dear else 5.0] * 200, hops
            )
            if name.endswith("paid when wrong"):
                good = row([0.0] * 200, [0.0] * 200, [0.0] * 200, hops)
            broken = row(chance(0.9), calls, [50.0] * 200, hops, fmt=float(name == "no format reward"))
            results[name, seed] = {"greedy": good, "sampled": broken, "unseen": good, "seconds": 1.0}
    single = {"name": "KNN, one call"} | row([1.0, 0.0] * 100, [1.0] * 200, [10.0] * 200, hops)
    dearest = {"name": "largest*, decomposed"} | row(chance(0.4), calls, [400.0] * 200, hops)
    claims, measured = _judge(results, [[single, dearest]] * 2, [0, 1], asserted=True)
    assert {c.name: c.holds for c in claims} == dict.fromkeys((c.name for c in claims), True)
    assert measured["alpha 0.8"]["greedy"]["em"] == 1.0
    claims, _ = _judge(results, [[single, dearest]] * 2, [0, 1], asserted=False)
    assert all(c.holds is None for c in claims)
