"""Six real models' recorded answers to GSM8K, as members of a pool that costs nothing to ask.

Each member's replies fit :class:`~guerdon.routing.backends.RecordedBackend`. Nobody counted the tokens:
they are estimated at four characters each (:func:`~guerdon.routing.bench.formats.estimate_tokens`).
"""

from __future__ import annotations

from pathlib import Path

from guerdon.routing.bench.formats import ASSUMED_PRICES, LISTED_PRICES, Prices, estimate_tokens, read_gsm8k
from guerdon.routing.member import Member

__all__ = ["gsm8k_correct", "gsm8k_members", "gsm8k_recorded"]

_DESCRIPTORS = {
    "gpt-4-1106-preview": "GPT-4 Turbo of November 2023: a large general model, strong at reasoning.",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "Mixtral 8x7B Instruct: an open mixture of experts for general tasks.",
    "6b_finetuning": "A 6B model fine-tuned on grade-school mathematics; writes one solution.",
    "6b_verification": "A 6B model fine-tuned on grade-school mathematics; a verifier picks one of many solutions.",
    "175b_finetuning": "A 175B model fine-tuned on grade-school mathematics; writes one solution.",
    "175b_verification": "A 175B model fine-tuned on grade-school mathematics; a verifier picks one of many solutions.",
}
_SIZES = {"6b_finetuning": 6.0, "6b_verification": 6.0, "175b_finetuning": 175.0, "175b_verification": 175.0}


def gsm8k_recorded(responses_csv: str | Path, solutions_jsonl: str | Path) -> dict[str, dict[str, tuple[str, int]]]:
    """Read what each member replied.

    Returns:
        Member to question to ``(reply, output_tokens)``; a blank reply is left out, so that asking for it
        is a miss and not an empty answer.

    Raises:
        DataError: see :func:`~guerdon.routing.bench.formats.read_gsm8k`.
    """
    matrix = read_gsm8k(responses_csv, solutions_jsonl)
    assert matrix.replies is not None
    return {
        member: {q: (r, estimate_tokens(r)) for q, r in zip(matrix.queries, replies, strict=True) if r and r.strip()}
        for member, replies in matrix.replies.items()
    }


def gsm8k_correct(responses_csv: str | Path, solutions_jsonl: str | Path) -> dict[str, dict[str, bool]]:
    """Read which replies were right, as the source judged them: member to question to verdict."""
    matrix = read_gsm8k(responses_csv, solutions_jsonl)
    return {
        member: {q: bool(matrix.quality[i, j] == 1) for i, q in enumerate(matrix.queries)}
        for j, member in enumerate(matrix.members)
    }


def gsm8k_members(prices: Prices | None = None) -> list[Member]:
    """Describe the six members.

    Args:
        prices: overrides the defaults. Only GPT-4's is a published price; the others are assumptions, each
            named in ``price_date``.
    """
    out = []
    for name, (price_in, price_out, source) in {**LISTED_PRICES, **ASSUMED_PRICES}.items():
        given = (prices or {}).get(name)
        usd_in, usd_out = given or (price_in, price_out)
        why = "given by the caller" if given else source
        out.append(Member(name, _DESCRIPTORS[name], usd_in, usd_out, price_date=why, size_b=_SIZES.get(name)))
    return out
