"""Specialists, pools and scripted rollouts: stated competence, fair shuffling, valid form."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from guerdon.environments.worldfacts import (
    CORE_DOMAINS,
    DOMAINS,
    NAMES,
    RELATIONS,
    PoolSampler,
    Skill,
    Specialist,
    World,
    chain_accuracy,
    descriptor,
    held_out_names,
    held_out_pairs,
    informative,
    is_generalist,
    load_world,
    make_tasks,
    parse,
    practice_task,
    read_answer,
    read_descriptor,
    scripted_rollout,
    split_entities,
    sub_question,
    text_corpus,
    vocabulary,
)
from guerdon.errors import ConfigError
from guerdon.rewards import RouterFormat
from guerdon.rewards.answer import exact_match

REGISTERS = ("compact", "natural")


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


def _wrap(reply: str) -> str:
    return f"\n\n<information>{reply}</information>\n\n"


# Specialists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domains", "accuracy", "outside"),
    [
        (("geography",), 0.95, 0.05),
        (("economy", "borders"), 0.95, 0.05),
        (("geography", "economy", "language"), 0.85, 0.05),
        (("codes",), 0.5, 0.2),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_competence_is_as_stated(
    world: World, domains: tuple[str, ...], accuracy: float, outside: float, seed: int
) -> None:
    member = Specialist(Skill(domains, accuracy, outside), world, seed=seed)
    for inside, stated in ((True, accuracy), (False, outside)):
        facts = [f for f in world.facts if (f.domain in domains) == inside]
        right = sum(exact_match(member.reply(f), f.objects) for f in facts)
        # A true rate of `stated` leaves this interval once in 10,000 draws.
        assert binomtest(int(right), len(facts), stated).pvalue > 1e-4, (right / len(facts), stated)


def test_certain_members_are_certain(world: World) -> None:
    always, never = Specialist(Skill(DOMAINS, 1.0), world), Specialist(Skill(DOMAINS, 0.0), world)
    for fact in world.facts:
        assert always.reply(fact) == fact.objects[0]
        wrong = never.reply(fact)
        assert not exact_match(wrong, fact.objects) and wrong in world.objects(fact.relation)


def test_a_reply_depends_on_seed_skill_and_question_alone(world: World) -> None:
    queries = [sub_question(f.relation, f.subject, "compact") for f in world.facts]
    first = [Specialist(Skill(("geography", "economy")), world)(q) for q in queries]
    again = Specialist(Skill(("economy", "geography")), world)
    assert [again(q) for q in reversed(queries)] == first[::-1]
    assert [Specialist(Skill(("geography", "economy")), world, seed=1)(q) for q in queries] != first


def test_noise_by_call_draws_anew(world: World) -> None:
    member = Specialist(Skill(("geography",), 0.5), world, noise="call")
    replies = [member("capital of France")[0] for _ in range(400)]
    right = sum(read_answer(r) == "Paris" for r in replies)
    assert binomtest(right, 400, 0.5).pvalue > 1e-4 and len(set(replies)) > 50
    with pytest.raises(ConfigError, match="noise"):
        Specialist(Skill(("geography",)), world, noise="never")  # type: ignore[arg-type]


@pytest.mark.parametrize("register", REGISTERS)
@pytest.mark.parametrize("verbosity", [5, 6, 8, 14, 40])
def test_replies_are_as_long_as_stated_and_give_the_answer_back(world: World, register: str, verbosity: int) -> None:
    member = Specialist(Skill(DOMAINS, 1.0, verbosity=verbosity), world, register)  # type: ignore[arg-type]
    for fact in world.facts:
        text, tokens = member(sub_question(fact.relation, fact.subject, register))  # type: ignore[arg-type]
        words = len(fact.objects[0].split()) + (1 if register == "compact" else 3)
        assert tokens == len(text.split()) == max(verbosity, words)
        assert read_answer(text) == fact.objects[0] and informative(text)


@pytest.mark.parametrize("register", REGISTERS)
@pytest.mark.parametrize(
    "query",
    [
        "currency of country of Paris",
        "What is the currency of the country whose capital is Paris?",
        "colour of France",
        "capital of Atlantis",
        "",
        "?!",
        "of of of",
    ],
)
def test_what_is_no_one_hop_question_gets_no_answer_and_is_billed(world: World, register: str, query: str) -> None:
    text, tokens = Specialist(Skill(DOMAINS, 1.0), world, register)(query)  # type: ignore[arg-type]
    assert not informative(text) and tokens >= 5


def test_no_two_hop_question_is_answered_in_one_call(world: World) -> None:
    for register in REGISTERS:
        for task in make_tasks(
            world, "train", register=register, domains=DOMAINS, relations=tuple(RELATIONS), hops=(2,)
        ):  # type: ignore[arg-type]
            assert parse(task.question, world) is None, task.question


@pytest.mark.parametrize(
    "wrong",
    [
        {"domains": ()},
        {"accuracy": 1.5},
        {"outside": -0.1},
        {"price": -1.0},
        {"price": float("nan")},
        {"verbosity": 4},
        {"verbosity": 41},
    ],
)
def test_impossible_skills_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Skill(**({"domains": ("geography",)} | wrong))  # type: ignore[arg-type]


# Pools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("domains", [CORE_DOMAINS, DOMAINS[:5], DOMAINS[:6], DOMAINS])
def test_every_pool_can_answer_everything_and_shows_no_reserved_thing(domains: tuple[str, ...], held_out: bool) -> None:
    sampler = PoolSampler(domains, held_out=held_out)
    reserved = {frozenset(p) for p in held_out_pairs(domains)}
    rng = np.random.default_rng(0)
    for _ in range(200):
        pool = sampler.sample(rng)
        experts = [e.skill for e in pool if not is_generalist(e.skill)]
        general = [e.skill for e in pool if is_generalist(e.skill)]
        assert len(pool) == 6 and len(general) == 1
        assert {d for s in experts for d in s.domains} == set(domains)
        assert len({frozenset(s.domains) for s in experts}) == len(experts)
        assert general[0].price > max(s.price for s in experts)
        assert general[0].verbosity > max(s.verbosity for s in experts)
        assert len(general[0].domains) == len(domains) - len(domains) // 4
        assert len({e.name.partition("-")[0] for e in pool}) == 6
        assert all((e.name in held_out_names()) == held_out for e in pool)
        pairs = {frozenset(s.domains) for s in experts if len(s.domains) == 2}
        assert (reserved <= pairs) if held_out else not (reserved & pairs)


def test_held_out_names_are_new_combinations_of_seen_pieces() -> None:
    seen = set(NAMES) - set(held_out_names())
    assert len(held_out_names()) >= 2 and set(held_out_names()) < set(NAMES)
    for name in held_out_names():
        first, _, second = name.partition("-")
        assert any(n.startswith(f"{first}-") for n in seen) and any(n.endswith(f"-{second}") for n in seen)


def test_names_say_nothing_about_skills() -> None:
    rng = np.random.default_rng(3)
    where = Counter()
    position = Counter()
    for _ in range(4000):
        pool = PoolSampler().sample(rng)
        k = next(k for k, e in enumerate(pool) if is_generalist(e.skill))
        position[k] += 1
        where[pool[k].name.partition("-")[0]] += 1
    assert chisquare([position[k] for k in range(6)]).pvalue > 1e-3
    assert chisquare(list(where.values())).pvalue > 1e-3 and len(where) == 8


def test_the_generalist_knows_what_is_needed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        needs = rng.permutation(CORE_DOMAINS)[:2].tolist()
        general = next(e.skill for e in PoolSampler().sample(rng, needs) if is_generalist(e.skill))
        assert set(needs) <= set(general.domains)
    with pytest.raises(ConfigError, match="knows 3 of"):
        PoolSampler().sample(rng, CORE_DOMAINS)


def test_pools_are_drawn_by_the_seed_alone() -> None:
    draw = lambda seed: PoolSampler().sample(np.random.default_rng(seed))  # noqa: E731
    assert draw(5) == draw(5) != draw(6)


@pytest.mark.parametrize("register", REGISTERS)
def test_descriptors_can_be_read_back(register: str) -> None:
    rng = np.random.default_rng(1)
    for sampler in (PoolSampler(), PoolSampler(DOMAINS), PoolSampler(held_out=True)):
        for entry in sampler.sample(rng):
            text = descriptor(entry.skill, register)  # type: ignore[arg-type]
            assert read_descriptor(text) == entry.skill.domains
            assert ":" not in text
    line = re.fullmatch(
        r"(\w+-\d) : (.+) ; \$ (\d+)", "nova-3 : " + descriptor(Skill(("geography", "economy")), "compact") + " ; $ 2"
    )
    assert line is not None and line.group(2) == "geography , economy"


@pytest.mark.parametrize(
    "wrong",
    [
        {"domains": DOMAINS[:3]},
        {"domains": (*DOMAINS[:3], "cooking")},
        {"domains": (*DOMAINS[:3], DOMAINS[0])},
        {"specialists": 8},
        {"domains": DOMAINS, "specialists": 3},
        {"general_price": 4.0},
    ],
)
def test_impossible_pools_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PoolSampler(**wrong)  # type: ignore[arg-type]


def test_accuracy_of_a_chain_by_hand() -> None:
    one, two, all_but = Skill(("geography",)), Skill(("economy",)), Skill(("geography", "economy", "language"), 0.85)
    pick = {"geography": one, "economy": two}.__getitem__
    assert chain_accuracy(["geography", "economy"], pick) == pytest.approx(0.9025)
    assert chain_accuracy(["geography", "economy"], lambda d: all_but) == pytest.approx(0.7225)
    assert chain_accuracy(["geography", "borders"], lambda d: one) == pytest.approx(0.0475)


def test_simulated_chains_reach_the_stated_accuracy(world: World) -> None:
    """Asking the right specialists hop by hop ends right at the analytic rate, or a little above (lucky bridges)."""
    tasks = make_tasks(world, "train", relations=tuple(RELATIONS), hops=(2,))
    experts = {d: Specialist(Skill((d,)), world) for d in CORE_DOMAINS}
    right = 0.0
    for task in tasks:
        subject = task.meta["chain"][0].subject
        for hop in task.meta["chain"]:
            subject = read_answer(experts[hop.domain](f"{hop.relation} of {subject}")[0])
        right += exact_match(subject, task.reference)
    # Errors are fixed per sub-question, and several chains share one: the tolerance is wider than binomial.
    assert 0.9025 - 0.03 < right / len(tasks) < 0.9025 + 0.05


# Scripts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("register", REGISTERS)
def test_scripts_are_valid_and_choose_uniformly(world: World, register: str) -> None:
    tasks = make_tasks(world, "train", register=register)  # type: ignore[arg-type]
    rng = np.random.default_rng(11)
    position, calls, general = Counter(), Counter(), 0
    competent: list[tuple[bool, float]] = []
    matched: list[tuple[bool, float]] = []
    one_call: list[tuple[int, bool]] = []
    for k in range(2000):
        task, pool = tasks[k % len(tasks)], PoolSampler().sample(rng)
        members = {e.name: Specialist(e.skill, world, register) for e in pool}  # type: ignore[arg-type]
        asked: list[str] = []

        def ask(name: str, query: str, asked: list[str] = asked, members: dict[str, Specialist] = members) -> str:
            asked.append(name)
            return members[name](query)[0]

        segments = scripted_rollout(task, pool, ask, rng, wrap=_wrap)
        text = "".join(s.text for s in segments)
        assert RouterFormat(members=[e.name for e in pool]).check(text) == [], text
        assert [s.speaker for s in segments] == ["policy", "environment"] * len(asked) + ["policy"]
        calls[len(asked)] += 1
        names = [e.name for e in pool]
        position.update(names.index(n) for n in asked)
        general += sum(is_generalist(pool[names.index(n)].skill) for n in asked)
        # The thought names what the question still needs, and then any skill of the member that is asked.
        domains = task.meta["domains"]
        for k, (segment, name) in enumerate(zip(segments[::2], asked, strict=False)):
            *needed, tried = read_descriptor(segment.text.partition("</think>")[0])
            skill = pool[names.index(name)].skill
            assert tuple(needed) == domains[min(k, len(domains) - 1) :] and skill.knows(tried)
            competent.append((skill.knows(needed[0]), float(np.mean([e.skill.knows(needed[0]) for e in pool]))))
            if skill.knows(needed[0]):
                matched.append((tried == needed[0], 1 / len(skill.domains)))
        one_call.append((len(domains), len(asked) == 1))
        replies = [s.text.strip() for s in segments if s.speaker == "environment"]
        answers = [read_answer(r[len("<information>") : -len("</information>")]) for r in replies]
        told = [
            a
            for a, r in zip(answers, replies, strict=True)
            if informative(r[len("<information>") : -len("</information>")])
        ]
        assert f"<answer> {told[-1]} </answer>" in segments[-1].text
    total = sum(position.values())
    assert chisquare([position[k] for k in range(6)]).pvalue > 1e-3
    assert binomtest(general, total, 1 / 6).pvalue > 1e-3
    # One, two or three calls, whatever the question.
    assert chisquare([calls[k] for k in (1, 2, 3)]).pvalue > 1e-3
    for hops in (1, 2):
        stopped = [one for h, one in one_call if h == hops]
        assert binomtest(sum(stopped), len(stopped), 1 / 3).pvalue > 1e-3
    # The scripts are no more competent than members drawn blindly, and no thought prefers the skill that is needed.
    for pairs in (competent, matched):
        found, by_chance = np.mean(pairs, axis=0)
        spread = np.sqrt(np.mean([p * (1 - p) for _, p in pairs]) / len(pairs))
        assert abs(found - by_chance) < 4 * spread + 1e-12


def test_the_second_sub_question_uses_the_reply_to_the_first(world: World) -> None:
    task = next(
        t for t in make_tasks(world, split_entities(world)["FR"]) if t.question == "currency of country of Paris"
    )
    pool = PoolSampler().sample(np.random.default_rng(0))
    queries: list[str] = []

    def ask(name: str, query: str) -> str:
        queries.append(query)
        return "= Japan . ." if len(queries) == 1 else "= unknown ."

    segments = scripted_rollout(task, pool, ask, np.random.default_rng(0), wrap=_wrap, min_calls=2, max_calls=2)
    assert queries == ["country of Paris", "currency of Japan"]
    assert segments[-1].text.endswith("<answer> Japan </answer>"), "the last reply holds no answer"


def test_without_a_reply_the_script_guesses(world: World) -> None:
    task, pool = make_tasks(world, "train")[0], PoolSampler().sample(np.random.default_rng(0))
    rng = np.random.default_rng(0)
    (only,) = scripted_rollout(
        task, pool, lambda n, q: "", rng, wrap=_wrap, min_calls=0, max_calls=0, guesses=("Peru",)
    )
    assert only.text == "<think> done </think><answer> Peru </answer>"
    with pytest.raises(ConfigError, match="min_calls"):
        scripted_rollout(task, pool, lambda n, q: "", rng, wrap=_wrap, min_calls=4)
    with pytest.raises(ConfigError, match="at least one pool member"):
        scripted_rollout(task, [], lambda n, q: "", rng, wrap=_wrap)


def test_practice_keeps_the_form_and_scrambles_the_facts(world: World) -> None:
    rng = np.random.default_rng(0)
    names = ["Aa", "Bb", "Cc"]
    pool = PoolSampler().sample(rng)
    for task in make_tasks(world, "train", hops=(2,))[:50]:
        scrambled, ask = practice_task(task, names, rng)
        chain = scrambled.meta["chain"]
        assert [h.relation for h in chain] == [h.relation for h in task.meta["chain"]]
        assert all(h.subject in names for h in chain) and chain[0].subject in scrambled.question
        text = "".join(s.text for s in scripted_rollout(scrambled, pool, ask, rng, wrap=_wrap))
        assert RouterFormat(members=[e.name for e in pool]).check(text) == []
        assert re.search(r"<answer> (\w+) </answer>", text).group(1) in names  # type: ignore[union-attr]


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_every_compact_word_is_in_the_vocabulary(world: World) -> None:
    for domains, relations in ((CORE_DOMAINS, None), (DOMAINS, tuple(RELATIONS))):
        kwargs = {} if relations is None else {"relations": relations}
        words = set(vocabulary(world, domains, **kwargs))
        for split in ("train", "validation", "test"):
            for task in make_tasks(world, split, domains=domains, **kwargs):  # type: ignore[arg-type]
                for hop in task.meta["chain"]:
                    assert {f" {hop.relation}", f" {hop.subject}", f" {hop.answer}"} <= words
        assert {f" {name}" for name in NAMES} | {" need", " try", " done", " nothing"} <= words


@pytest.mark.parametrize("register", REGISTERS)
def test_the_corpus_shows_train_entities_only(world: World, register: str) -> None:
    where = split_entities(world)
    text = "\n".join(text_corpus(world, register=register, rollouts=60))  # type: ignore[arg-type]
    facts = [f for f in world.facts if f.relation in ("capital", "country")]
    own = [f.subject for f in facts if where[f.entity] == "train"]
    for fact in facts:
        hidden = where[fact.entity] != "train"
        # Guinea stands in Equatorial Guinea, Niger does not stand in Nigeria.
        if hidden and not any(re.search(rf"\b{re.escape(fact.subject)}\b", name) for name in own):
            assert not re.search(rf"\b{re.escape(fact.subject)}\b", text), fact.subject
    assert all(
        tag in text for tag in ("<think>", "</search>", "<information>", "</answer>", " 17 ", "nova-2", "geography")
    )
    assert not any(name in text for name in held_out_names())
    assert all(n in text for n in set(NAMES) - set(held_out_names()))
