"""Tests written as assert statements, run where the tested code cannot reach them.

The tested code and the tests never share a process. A first job executes the code and makes the calls that the tests
need; a second one runs the tests against those answers. What can be read off the tests (calls with literal arguments)
is asked for at once; a call that only turns up while a test runs costs another round. So a program that ends its
process, patches builtins or returns objects that equal everything changes no verdict.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.sandbox.codec import Unsupported, encode
from guerdon.sandbox.limits import Call, Job, Limits, Result, Sandbox, Status

__all__ = ["run_asserts"]

_ROUNDS = 16

_HARNESS = """
import builtins, codec, copy, json

class _Missing(BaseException):
    pass

def _run(tests, setup, names, memo):
    known = {json.dumps(codec.encode([n, list(a), dict(k)])): (ok, v) for n, a, k, ok, v in memo}
    needed = []

    def proxy(name):
        def call(*args, **kwargs):
            try:
                key = json.dumps(codec.encode([name, list(args), dict(kwargs)]))
            except codec.Unsupported as error:
                raise TypeError(f"cannot call {name} from a test: {error}") from None
            if key not in known:
                needed.append([name, list(args), dict(kwargs)])
                raise _Missing
            ok, value = known[key]
            if ok:
                return copy.deepcopy(value)
            kind, _, text = value.partition(": ")
            found = getattr(builtins, kind, None)
            if isinstance(found, type) and issubclass(found, Exception):
                raise found(text)
            raise RuntimeError(value)
        call.__name__ = name.rpartition(".")[2]
        return call

    out = []
    for test in tests:
        space = {alias: proxy(name) for alias, name in names.items()}
        try:
            exec(compile(setup, "setup.py", "exec"), space)
            space.update({alias: proxy(name) for alias, name in names.items()})
            exec(compile(test, "test.py", "exec"), space)
            out.append("")
        except _Missing:
            out.append(None)
        except BaseException as error:
            out.append(f"{type(error).__name__}: {error}"[:300])
    return out, needed
"""


def run_asserts(
    sandbox: Sandbox,
    code: str,
    tests: Sequence[str],
    names: Sequence[str] | Mapping[str, str],
    *,
    setup: str = "",
    limits: Limits | None = None,
) -> tuple[list[str], Result]:
    """Run tests against functions that untrusted code defines.

    Args:
        sandbox: runs both.
        code: defines the functions.
        tests: Python snippets that raise where the code is wrong, each one verdict.
        names: the functions that tests call, or what tests call them by (``{"candidate": "f"}``).
        setup: run before each test (helpers, imports); not shown to the code.
        limits: of each job.

    Returns:
        For each test ``""`` where it passed, else one line that says why not; and the last run of the code.
    """
    limits = limits or Limits()
    aliases = dict(names) if isinstance(names, Mapping) else {n: n for n in names}
    memo: dict[str, tuple[Call, bool, Any]] = {}
    wanted = _literal_calls([setup, *tests], aliases)
    last = Result(Status.OK)
    verdicts: list[str | None] = [None] * len(tests)
    for _ in range(_ROUNDS):
        fresh = [c for c in wanted if _key(c) not in memo]
        if fresh:
            calls = [c for c, _, _ in memo.values()] + fresh
            last = sandbox.run(Job(code, "calls", calls=tuple(calls), limits=limits))
            why = last.error or "it ended before it answered"
            for k, call in enumerate(calls):
                ok, value = last.values[k] if k < len(last.values) else (False, why)
                memo.setdefault(_key(call), (call, ok, value if ok else str(value)))
        rows = [[c.name, list(c.args), dict(c.kwargs), ok, value] for c, ok, value in memo.values()]
        judged = sandbox.run(
            Job(_HARNESS, "calls", calls=(Call("_run", (list(tests), setup, aliases, rows)),), limits=limits)
        )
        if not judged.ok or not judged.values or not judged.values[0][0]:
            why = judged.error or (judged.values[0][1] if judged.values else "the tests did not end")
            return [f"the tests could not be run: {why}"] * len(tests), judged
        verdicts, needed = judged.values[0][1]
        wanted = [Call(str(n), tuple(a), dict(k)) for n, a, k in needed]
        if not wanted:
            break
    if not memo and tests and not last.values:
        # No test called the code: it still has to run.
        last = sandbox.run(Job(code, "calls", limits=limits))
        if not last.ok:
            verdicts = [last.error or "the code does not run"] * len(tests)
    return [v if v is not None else f"needs more than {_ROUNDS} rounds of calls" for v in verdicts], last


def _key(call: Call) -> str:
    return json.dumps(encode([call.name, list(call.args), dict(call.kwargs)]))


def _literal_calls(sources: Sequence[str], aliases: Mapping[str, str]) -> list[Call]:
    out: list[Call] = []
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in aliases):
                continue
            if any(k.arg is None for k in node.keywords):
                continue
            try:
                args = tuple(ast.literal_eval(a) for a in node.args)
                kwargs = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
                call = Call(aliases[node.func.id], args, kwargs)
                _key(call)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, Unsupported):
                continue
            out.append(call)
    return out
