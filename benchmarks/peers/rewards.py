"""TRL's, math-verify's and verifiers' side of ``rewards.py``; runs in an interpreter that has them, and imports nothing of ours.

Told what to do by lines of JSON on stdin (``{"check": ..., "file": ...}``), answers with one line each: wall and CPU seconds, and
the values. Each project is used as its users use it; parsing of its own input is part of its time, reading the file is not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

logging.disable(logging.WARNING)


def trl_think(items: dict[str, list[Any]]) -> list[Any]:
    from trl.rewards import think_format_reward

    return think_format_reward(items["completions"])


def trl_overlong(items: dict[str, list[Any]]) -> list[Any]:
    from trl.rewards import get_soft_overlong_punishment

    return get_soft_overlong_punishment(256, 64)(items["completion_ids"])


def trl_accuracy(items: dict[str, list[Any]]) -> list[Any]:
    from trl.rewards import accuracy_reward

    return accuracy_reward(items["completions"], [f"${g}$" for g in items["golds"]])


def math_verify_direct(items: dict[str, list[Any]]) -> list[Any]:
    from math_verify import parse, verify

    made = zip(items["completions"], items["golds"], strict=True)
    return [float(verify(parse(f"${gold}$"), parse(c[0]["content"]))) for c, gold in made]


_RUBRICS: dict[str, Any] = {}
_LOOP = asyncio.new_event_loop()


def _rubric(name: str) -> Any:
    if name not in _RUBRICS:
        import verifiers as vf

        if name == "think":
            parser: Any = vf.ThinkParser()
            _RUBRICS[name] = vf.Rubric(funcs=[parser.get_format_reward_func()], parser=parser)
        elif name == "exact":
            parser = vf.XMLParser(["think", "answer"])

            def right(parser: Any, completion: Any, answer: str, **more: Any) -> float:
                return float((parser.parse_answer(completion) or "") == answer)

            _RUBRICS[name] = vf.Rubric(funcs=[right], parser=parser)
        else:
            _RUBRICS[name] = vf.MathRubric()
    return _RUBRICS[name]


def _scored(name: str, items: dict[str, list[Any]]) -> list[Any]:
    rubric = _rubric(name)

    async def every() -> list[float]:
        states = [
            {
                "prompt": p, "completion": c, "answer": a, "task": "default", "info": {}, "trajectory": [],
                "timing": {"scoring_ms": 0.0, "total_ms": 0.0},
            }
            for p, c, a in zip(items["prompts"], items["completions"], items["golds"], strict=True)
        ]  # fmt: skip
        await asyncio.gather(*(rubric.score_rollout(s) for s in states))
        return [float(s["reward"]) for s in states]

    return _LOOP.run_until_complete(every())


CHECKS: dict[str, Callable[[dict[str, list[Any]]], list[Any]]] = {
    "trl.think_format_reward": trl_think,
    "trl.soft_overlong_punishment": trl_overlong,
    "trl.accuracy_reward": trl_accuracy,
    "math_verify": math_verify_direct,
    "verifiers.ThinkParser": lambda items: _scored("think", items),
    "verifiers.XMLParser": lambda items: _scored("exact", items),
    "verifiers.MathRubric": lambda items: _scored("maths", items),
}


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # what the projects print is no answer
    loaded: dict[str, Any] = {}
    for line in sys.stdin:
        job = json.loads(line)
        answer: dict[str, Any]
        if job.get("quit"):
            break
        if job.get("versions"):
            answer = {name: version(name) for name in ("trl", "math-verify", "verifiers")}
        else:
            if job["file"] not in loaded:
                with open(job["file"], encoding="utf-8") as file:
                    loaded[job["file"]] = json.load(file)
            items = loaded[job["file"]]
            try:
                wall, cpu = time.perf_counter(), time.process_time()
                values = CHECKS[job["check"]](items)
                answer = {
                    "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "values": list(values)
                }  # fmt: skip
            except Exception as error:  # noqa: BLE001  said to the other side
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
