"""Is the response written in the wanted language, and in the wanted script?"""

from __future__ import annotations

import functools
from typing import Any

import regex

from guerdon.errors import ConfigError, DataError, MissingDependency, nearest
from guerdon.rewards.base import OnError, Reward
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["LanguageMatch", "ScriptShare", "language_of", "script_share"]


class LanguageMatch(Reward):
    """1 where the response is in the wanted language, else 0.

    Args:
        language: ISO 639-1 code, for example ``"en"``; ``"prompt"`` is the language of the task's question; None reads
            ``task.meta["language"]``.
        among: codes of the languages that may occur: fewer are told apart better, above all in short texts.
        probability: give the classifier's probability of the wanted language instead of 1 or 0.

    Told by py3langid, a naive Bayes classifier of 70 languages with its model inside; a sentence or more is needed
    for it to be right. A response without letters gives 0 and the part ``letters`` 0.

    Raises:
        ConfigError: a code that the classifier does not know.
        MissingDependency: py3langid is not installed.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        language: str | None = None,
        *,
        among: tuple[str, ...] | list[str] | None = None,
        probability: bool = False,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        known = _classifier(None).labels
        for code in [*(among or ()), *([language] if language not in (None, "prompt") else [])]:
            if code not in known:
                raise ConfigError(f"unknown language {code!r}{nearest(str(code), known)}; known are {', '.join(known)}")
        if among is not None and (len(among) < 2 or (language not in (None, "prompt") and language not in among)):
            raise ConfigError(f"among must name two languages or more, the wanted one with them, got {list(among)}")
        self.language, self.probability = language, probability
        self.among = None if among is None else tuple(sorted(set(among)))

    def score_one(self, trajectory: Trajectory) -> Score:
        wanted = self._wanted(trajectory)
        text = policy_text(trajectory)
        if not _LETTER.search(text):
            return Score(0.0, parts={"letters": 0.0})
        ranks = dict(_classifier(self.among).rank(text))
        best = max(ranks, key=lambda code: ranks[code])
        value = ranks.get(wanted, 0.0) if self.probability else float(best == wanted)
        return Score(min(1.0, max(0.0, float(value))), parts={"letters": 1.0})

    def _wanted(self, trajectory: Trajectory) -> str:
        if self.language == "prompt":
            question = trajectory.task.question
            if not _LETTER.search(question):
                raise DataError(f"the question of task {trajectory.task.id!r} has no letters, so no language")
            return language_of(question, self.among)
        wanted = self.language if self.language is not None else trajectory.task.meta.get("language")
        if not isinstance(wanted, str) or wanted not in _classifier(None).labels:
            raise DataError(
                f"task {trajectory.task.id!r} has meta['language'] = {wanted!r}; an ISO 639-1 code is needed"
            )
        return wanted


class ScriptShare(Reward):
    """Share of the response's letters that belong to a script, in [0, 1]: 1 for pure text, however short.

    Args:
        script: by its Unicode name, for example ``"Latin"``, ``"Cyrillic"``, ``"Han"``, ``"Arabic"``; several may be given, as for
            Japanese ``["Han", "Hiragana", "Katakana"]``. None reads ``task.meta["script"]``.

    Digits, punctuation and emoji belong to all scripts and do not count. A response without letters gives 0; the part
    ``letters`` is their number.

    Raises:
        ConfigError: no such script.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self, script: str | list[str] | None = "Latin", *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.script = script if script is None else _scripts(script)

    def score_one(self, trajectory: Trajectory) -> Score:
        script = self.script
        if script is None:
            given = trajectory.task.meta.get("script")
            try:
                script = _scripts(given)
            except ConfigError as error:
                raise DataError(f"task {trajectory.task.id!r}, meta['script']: {error}") from error
        share, letters = script_share(policy_text(trajectory), script)
        return Score(share, parts={"letters": float(letters)})


_LETTER = regex.compile(r"\p{L}")


def language_of(text: str, among: tuple[str, ...] | None = None) -> str:
    """ISO 639-1 code of the likeliest language of a text."""
    return str(_classifier(among).classify(text)[0])


def script_share(text: str, scripts: tuple[str, ...]) -> tuple[float, int]:
    """Share of the letters of a text that belong to the scripts, 0 without letters; and the number of letters."""
    letters = len(_LETTER.findall(text))
    return (len(_of_scripts(scripts).findall(text)) / letters if letters else 0.0), letters


def _scripts(given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else ()
    if not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"script must be a Unicode script's name, or several, got {given!r}")
    _of_scripts(names)
    return names


@functools.lru_cache(maxsize=100)
def _of_scripts(names: tuple[str, ...]) -> Any:
    for name in names:
        # Checked one by one: a name goes into a pattern only if it is a name.
        if not name.replace("_", "").isalpha():
            raise ConfigError(f"script must be a Unicode script's name, got {name!r}")
    try:
        return regex.compile(r"(?V1)[\p{L}&&[" + "".join(f"\\p{{Script={n}}}" for n in names) + "]]")
    except regex.error as error:
        raise ConfigError(
            f"unknown script in {', '.join(names)}; give Unicode names such as Latin, Han, Arabic"
        ) from error


@functools.lru_cache(maxsize=8)
def _classifier(among: tuple[str, ...] | None) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingDependency("languages are told by py3langid: pip install 'guerdon[text]'") from error
    made = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if among is not None:
        made.set_languages(list(among))
    return made
