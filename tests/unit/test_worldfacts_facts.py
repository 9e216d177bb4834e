"""Facts and questions: checked by hand, disjoint between splits, consistent along a chain."""

from __future__ import annotations

import sys

import pytest

from guerdon.environments.worldfacts import (
    BASIC_RELATIONS,
    CORE_DOMAINS,
    DOMAINS,
    RELATIONS,
    Fact,
    World,
    load_world,
    make_tasks,
    split_entities,
)
from guerdon.environments.worldfacts import facts as facts_module
from guerdon.environments.worldfacts.facts import KINDS
from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.rewards.answer import exact_match, normalise_answer

SPLITS = ("train", "validation", "test")
ALL = tuple(RELATIONS)


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


# Looked up by hand, not in the packages.
@pytest.mark.parametrize(
    ("relation", "subject", "answer"),
    [
        ("capital", "France", "Paris"),
        ("country", "Paris", "France"),
        ("continent", "Kenya", "Africa"),
        ("currency", "France", "Euro"),
        ("currency", "United States", "US Dollar"),
        ("currency", "Japan", "Yen"),
        ("issuer", "Baht", "Thailand"),
        ("language", "France", "French"),
        ("language", "Brazil", "Portuguese"),
        ("homeland", "Hungarian", "Hungary"),
        ("neighbour", "Portugal", "Spain"),
        ("neighbour", "Canada", "United States"),
        ("least-neighbour", "Switzerland", "Liechtenstein"),
        ("widest-neighbour", "Mongolia", "Russia"),
        ("population", "China", "above 100 million"),
        ("population", "Iceland", "below 1 million"),
        ("code", "Germany", "DEU"),
        ("holder", "DEU", "Germany"),
        ("tld", "Spain", ".es"),
        ("prefix", "Italy", "39"),
        ("capital", "Kazakhstan", "Astana"),
        ("symbol", "Iron", "Fe"),
        ("bearer", "Au", "Gold"),
        ("number", "Iron", "26"),
        ("element", "26", "Iron"),
        ("successor", "Hydrogen", "Helium"),
        ("predecessor", "Iron", "Manganese"),
    ],
)
def test_facts_looked_up_by_hand(world: World, relation: str, subject: str, answer: str) -> None:
    fact = world.get(relation, subject)
    assert fact is not None and fact.objects[0] == answer


@pytest.mark.parametrize("name", ["United States", "USA", "the usa", "United States of America", "U.S.A."])
def test_a_country_is_known_by_each_of_its_names(world: World, name: str) -> None:
    fact = world.get("capital", name)
    assert fact is not None and fact.entity == "US"


def test_aliases_are_gold_answers_too(world: World) -> None:
    neighbour = world.get("neighbour", "Canada")
    assert neighbour is not None
    assert all(
        exact_match(name, neighbour.objects) for name in ("USA", "the United States", "united states of america")
    )
    assert exact_match("Aluminium", world.get("element", "13").objects)  # type: ignore[union-attr]


def test_a_name_shared_by_many_currencies_is_no_gold_answer(world: World) -> None:
    for country in ("United States", "Canada", "Australia"):
        assert not exact_match("Dollar", world.get("currency", country).objects)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("relation", "subject"),
    [("capital", "Israel"), ("capital", "South Africa"), ("continent", "Russia"), ("language", "India")],
)
def test_disputed_values_are_left_out(world: World, relation: str, subject: str) -> None:
    assert world.get(relation, subject) is None


def test_dependent_territories_are_no_countries(world: World) -> None:
    assert not any(world.get("code", name) for name in ("Greenland", "Hong Kong", "Puerto Rico", "Gibraltar"))


def test_every_fact_has_answers_of_its_kind_and_a_stated_domain(world: World) -> None:
    assert set(RELATIONS) == set(KINDS) == {f.relation for f in world.facts}
    assert set(BASIC_RELATIONS) <= set(RELATIONS) and set(CORE_DOMAINS) <= set(DOMAINS)
    for fact in world.facts:
        assert fact.objects and all(o.strip() == o and o for o in fact.objects), fact
        # The protocol splits NAME:QUERY at a colon, and tags must not appear in a fact.
        assert not any(c in text for text in (fact.subject, *fact.objects) for c in ":<>\n"), fact


def test_inverse_relations_agree(world: World) -> None:
    for forth, back in (("capital", "country"), ("code", "holder"), ("symbol", "bearer"), ("number", "element")):
        for fact in (f for f in world.facts if f.relation == forth):
            inverse = world.get(back, fact.objects[0])
            if inverse is None and forth == "code":
                assert fact.objects == ("USA",), "a code that is also a name answers itself, and is not asked"
                continue
            assert inverse is not None and inverse.objects[0] == fact.subject, fact
    for back, forth in (("issuer", "currency"), ("homeland", "language")):
        for fact in (f for f in world.facts if f.relation == back):
            users = [f.subject for f in world.facts if f.relation == forth and f.objects[0] == fact.subject]
            assert users == [fact.objects[0]], fact


def test_a_distractor_is_never_a_right_answer(world: World) -> None:
    for fact in world.facts:
        others = world.distractors(fact)
        assert len(others) >= 4, fact
        assert not {normalise_answer(o) for o in others} & {normalise_answer(o) for o in fact.objects}, fact


def test_two_facts_for_one_subject_are_refused() -> None:
    with pytest.raises(DataError, match=r"capital.*two facts"):
        World([Fact("Peru", "capital", ("Lima",), "PE"), Fact("peru", "capital", ("Cusco",), "PE")])
    for objects in ((), ("Lima", "")):
        with pytest.raises(DataError, match="no object"):
            Fact("Peru", "capital", objects, "PE")


def test_an_absent_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycountry", None)
    with pytest.raises(MissingDependency, match=r"pycountry.*pip install 'guerdon\[testbeds\]'"):
        facts_module.load_world.__wrapped__()


# Splits ---------------------------------------------------------------------------------------------------------------


def _names(world: World, split: str, seed: int) -> set[tuple[str, str]]:
    """Kind and name of everything that tasks of a split ask about, pass through or, for entities, answer."""
    out: set[tuple[str, str]] = set()
    for task in make_tasks(world, split, domains=DOMAINS, relations=ALL, seed=seed):  # type: ignore[arg-type]
        for hop in task.meta["chain"]:
            out.add((KINDS[hop.relation][0], hop.subject))
            kind, answer = KINDS[hop.relation][1], hop.answer
            if world.owner(kind, answer) is not None:
                out.add((kind, answer))
    return out


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_entity_of_one_split_occurs_in_another(world: World, seed: int) -> None:
    where = split_entities(world, seed)
    seen = {split: _names(world, split, seed) for split in SPLITS}
    for split, names in seen.items():
        assert {where[world.owner(kind, name) or ""] for kind, name in names} == {split}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_shares_of_the_split_hold_for_countries_and_elements(world: World) -> None:
    where = split_entities(world)
    for is_element in (False, True):
        own = [s for e, s in where.items() if e.startswith("element ") == is_element]
        assert [round(own.count(s) / len(own), 1) for s in SPLITS] == [0.6, 0.1, 0.3]
    assert where == split_entities(world) != split_entities(world, seed=1)
    with pytest.raises(ConfigError, match="sum 1"):
        split_entities(world, shares=(0.5, 0.5, 0.5))


def test_two_hop_chains_are_made_of_single_facts(world: World) -> None:
    for split in SPLITS:
        for task in make_tasks(world, split, domains=DOMAINS, relations=ALL, hops=(2,)):  # type: ignore[arg-type]
            first, second = task.meta["chain"]
            assert second.subject == first.answer
            assert world.get(first.relation, first.subject).objects == first.objects  # type: ignore[union-attr]
            assert world.get(second.relation, second.subject).objects == second.objects  # type: ignore[union-attr]
            assert KINDS[first.relation][1] == KINDS[second.relation][0]
            assert first.domain != second.domain and task.meta["domains"] == (first.domain, second.domain)
            assert task.reference == list(second.objects) and task.reference
            assert not exact_match(first.subject, task.reference), task.id


def test_sizes_of_the_splits(world: World) -> None:
    def count(split: str, hops: int, **kwargs: object) -> int:
        tasks = make_tasks(world, split, hops=(hops,), **kwargs)  # type: ignore[arg-type]
        assert len({t.id for t in tasks}) == len(tasks)
        return len(tasks)

    wide = {"domains": DOMAINS, "relations": ALL}
    assert count("train", 1, **wide) + count("train", 2, **wide) >= 5000
    assert min(count("test", 1, **wide), count("test", 2, **wide)) >= 500
    assert count("test", 2, relations=ALL) >= 500
    assert count("test", 1, register="natural", frames=10) == 10 * count("test", 1)


def test_tasks_carry_what_a_reader_needs(world: World) -> None:
    tasks = {t.question: t for t in make_tasks(world, split_entities(world)["FR"])}
    task = tasks["currency of country of Paris"]
    assert task.meta["hops"] == 2 and task.meta["domains"] == ("geography", "economy") and task.meta["entity"] == "FR"
    assert task.meta["sub_questions"] == ("country of Paris", "currency of France")
    assert [h.answer for h in task.meta["chain"]] == ["France", "Euro"]
    assert make_tasks(world, "test") == make_tasks(world, "test")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domains": ("geography", "cooking")}, "unknown domain 'cooking'"),
        ({"relations": ("capital", "mayor")}, "unknown relation 'mayor'"),
        ({"register": "verbose"}, "register must be"),
        ({"hops": (3,)}, "hops must be"),
        ({"frames": 11}, "frames must be"),
    ],
)
def test_wrong_settings_are_named(world: World, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tasks(world, "test", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="split must be"):
        make_tasks(world, "dev")  # type: ignore[arg-type]


def test_no_question_at_all_is_an_error(world: World) -> None:
    with pytest.raises(DataError, match="no compact question"):
        make_tasks(world, "test", domains=("demography",), hops=(2,))
