"""What the router is told: the task, the protocol and the pool, in one user message.

Two registers. ``router_prompt`` is the full text for real language models; its required content is
that of Router-R1's training prompt (arXiv 2506.09033), in our words. ``compact_prompt`` holds the same
facts in a few dozen tokens for policies of a million parameters, which learn the protocol by
supervision and cannot read English.
"""

from __future__ import annotations

from collections.abc import Iterable

from guerdon.routing.member import Member

__all__ = ["HELPER_PROMPT", "compact_member", "compact_prompt", "member_lines", "router_prompt", "with_question_mark"]

HELPER_PROMPT = (
    "You are a helper in a process in which several models work on one larger problem. Another model asks "
    "you the question below.\n"
    "- Answer it briefly, or give context that helps to answer it.\n"
    "- If you can do neither, say so and advise to ask another model.\n"
    "- Stay on the topic and below 512 tokens.\n\n"
    "Question: {query}"
)
"""Wrapper sent to a member; ``{query}`` is replaced by the router's sub-question."""

_ROUTER_PROMPT = """\
Answer the question at the end. Whenever you get new information, first reason about it between <think> and </think>.
If you lack knowledge, you may ask a specialised language model: write <search> LLM-Name:Your-Query </search>.

Rules for this tag:
1. Replace LLM-Name by the exact name of one of these models: {names}.
2. Replace Your-Query by a concrete question that helps to answer the original one.
3. Never copy a model's description into the tag, and never write the words LLM-Name or Your-Query literally.
4. Write one ':' and no more, between the name and the query.

Before each call, reason between <think> and </think> about why you need outside information and which model \
fits best, judging by its description.
The reply comes back between <information> and </information>; never write these two tags yourself.
Do not keep asking the same model unless it is consistently the best. You are encouraged to try several models, \
and to ask several of them the same question.

The models:
{members}
{budget}
When you need nothing more, write the answer and nothing else between <answer> and </answer>, for example \
<answer> Beijing </answer>. Never leave the answer empty.

Question: {question}"""


def with_question_mark(question: str) -> str:
    """Strip the question and make it end in ``?``."""
    stripped = question.strip()
    return stripped if stripped.endswith("?") else f"{stripped}?"


def member_lines(members: Iterable[Member], *, prices: bool = True) -> str:
    """One line per member: name, descriptor, and the optional price, latency and example scores.

    ``prices=False`` renders descriptors alone, as the released training data did.
    """
    lines = []
    for m in members:
        extras = []
        if prices:
            extras.append(f"${m.input_price:g} in, ${m.output_price:g} out per million tokens")
            if m.latency_s is not None:
                extras.append(f"about {m.latency_s:g} s")
            extras += [f"{name} {score:g}" for name, score in m.example_scores.items()]
        shown = f" ({'; '.join(extras)})" if extras else ""
        lines.append(f"{m.name}: {m.descriptor.strip()}{shown}")
    return "\n".join(lines)


def router_prompt(
    question: str, members: Iterable[Member], *, prices: bool = True, budget_usd: float | None = None
) -> str:
    """The full user message for one question and one pool.

    Args:
        question: stripped, and given a ``?`` where it has none.
        members: the pool, in the order in which it is listed.
        prices: show prices, latencies and example scores beside the descriptors.
        budget_usd: the money cap of this question; ``None`` leaves the sentence out.
    """
    pool = list(members)
    budget = (
        ""
        if budget_usd is None
        else f"\nYou may spend at most ${budget_usd:.6f} on calls; each reply tells what is left.\n"
    )
    return _ROUTER_PROMPT.format(
        names=", ".join(m.name for m in pool),
        members=member_lines(pool, prices=prices),
        budget=budget,
        question=with_question_mark(question),
    )


def compact_member(member: Member, *, prices: bool = True) -> str:
    """``- PRICE SKILL NAME , PRICE SKILL NAME``: every skill stands between what it costs and who has it.

    A tiny policy finds what follows a word far sooner than what stands at the head of the word's line. The price
    is the output price, rounded to whole USD per million tokens.
    """
    head = f"{member.output_price:.0f} " if prices else ""
    return "- " + " , ".join(f"{head}{skill} {member.name}" for skill in member.descriptor.split(" , "))


def compact_prompt(
    question: str, members: Iterable[Member], *, prices: bool = True, budget_usd: float | None = None
) -> str:
    """The same content for a tiny policy: one line per member, then the question."""
    lines = [compact_member(m, prices=prices) for m in members]
    if budget_usd is not None:
        lines.append(f"budget : $ {budget_usd:.6f}")
    return "\n".join([*lines, f"Question: {with_question_mark(question)}"])
