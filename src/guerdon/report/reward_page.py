"""The page of all rewards: its tables are made by running them. ``python -m guerdon.report.reward_page docs/rewards.md``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, GuerdonError
from guerdon.report.reward_examples import Example, examples

__all__ = ["tables", "write_page"]

_BEGIN, _END = "<!-- begin generated -->", "<!-- end generated -->"
_HEAD = (
    "| name | range | what it says | example settings | its value there | blank response | no reference | reference of a wrong type |",
    "|---|---|---|---|---|---|---|---|",
)  # fmt: skip


def tables() -> str:
    """Markdown of every registered reward, by group, and of the others that only Python can make.

    Ranges, values and what happens on a blank response, without a reference and with one of a wrong type are observed.
    """
    from guerdon.parts import REWARDS

    with tempfile.TemporaryDirectory() as folder:
        made = examples(Path(folder))
        lacking = [name for name in REWARDS if name not in made and REWARDS.path(name).startswith("guerdon.")]
        if lacking:
            raise ConfigError(f"give the reward {lacking[0]!r} an example in guerdon.report.reward_examples")
        lines: list[str] = []
        for group in dict.fromkeys(e.group for e in made.values()):
            rows = [_row(name, example) for name, example in made.items() if example.group == group]
            lines += [f"### {group}", "", *_HEAD, *rows, ""]
    lines += ["### Made in Python only", "", "| class | what it says |", "|---|---|", *_others(), ""]
    return "\n".join(lines)


def _row(name: str, example: Example) -> str:
    from guerdon.parts import REWARDS
    from guerdon.training.job import make_reward

    reward = make_reward({"name": name, **example.settings})
    low, high = (f"{x:g}".replace("inf", "∞") for x in reward.range)
    # What a model says depends on the model.
    value = "" if example.group.startswith("Rewards that hold") else _outcome(reward, example)
    wrong = _outcome(reward, example, reference={"wrong": object()})
    cells = [
        f"`{name}`", f"{low} to {high}", _first_sentence(REWARDS[name]), _settings(example), value,
        _outcome(reward, example, completion=""), _outcome(reward, example, reference=None) if example.reference is not None
        else "not read", wrong if example.reference is not None else "not read",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _outcome(reward: Any, example: Example, **changes: Any) -> str:
    try:
        scores, _ = reward.assess([example.trajectory(**changes)])
    except GuerdonError:
        return "failure"
    return f"{scores[0].value:.3g}" if scores[0].valid else "failure"


def _settings(example: Example) -> str:
    text = example.shown
    if text is None:
        text = ", ".join(f"{key}: {_setting(value)}" for key, value in example.settings.items())
    return f"`{text}`" if text else ""


def _setting(value: Any) -> str:
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__)).lstrip("_")
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _first_sentence(thing: Any) -> str:
    """First sentence of a docstring, as Markdown in one cell; of the function that the class puts to use, where it says so."""
    used = re.match(
        r":func:`(\w+)` of (?:the response|a trajectory|what the policy wrote)", inspect.getdoc(thing) or ""
    )
    if used is not None:
        thing = getattr(sys.modules[thing.__module__], used.group(1))
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
    return re.split(r"(?<=[^.])[.;](?:\s|$)", text)[0]


def _others() -> Iterator[str]:
    from guerdon import reward_models, rewards
    from guerdon.parts import REWARDS

    registered = {REWARDS[name] for name in REWARDS}
    for package in (rewards, reward_models):
        for name, module in sorted(package._HOME.items()):
            thing = getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
            abstract = thing in (rewards.Reward, rewards.TextReward, rewards.AnswerReward)
            if (
                inspect.isclass(thing)
                and issubclass(thing, rewards.Reward)
                and thing not in registered
                and not abstract
            ):
                yield f"| `{package.__name__}.{name}` | {_first_sentence(thing)} |"


def write_page(path: Path) -> Path:
    """Put the tables between the marks of a page.

    Raises:
        ConfigError: the page has no marks.
    """
    text = path.read_text(encoding="utf-8")
    if _BEGIN not in text or _END not in text:
        raise ConfigError(f"{path} needs a line {_BEGIN} and a line {_END}")
    before, _, rest = text.partition(_BEGIN)
    path.write_text(f"{before}{_BEGIN}\n\n{tables()}\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write_page(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/rewards.md")))
