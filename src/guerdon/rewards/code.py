"""Code by its tests: programs over standard input, functions by their values, asserts; in a sandbox.

Nothing that a completion says is executed here: code runs in :mod:`guerdon.sandbox`, expected values never enter the
process that runs it, and a program that crashes, hangs, exits early or patches its surroundings is a failed program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import fences
from guerdon.sandbox import Call, Job, Limits, Result, Sandbox, default_sandbox, make_sandbox
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["CodeTests", "TestSuite", "equal_output", "equal_value", "extract_code", "read_suite"]


def extract_code(text: str, language: str = "python", *, bare: bool = True) -> str | None:
    """The last fenced block marked ``language`` (or ``py`` for Python), else the last unmarked one.

    Args:
        text: a response.
        language: its mark.
        bare: take the whole text where it holds no fence at all.

    Returns:
        The code, or None where there is none.
    """
    found = fences(text)
    for mark in (language, "py", "python3", "") if language == "python" else (language, ""):
        marked = [content for written, content in found if written == mark]
        if marked:
            return marked[-1]
    if found:
        return found[-1][1]
    return text if bare and text.strip() and "```" not in text else None


@dataclass(frozen=True, slots=True)
class TestSuite:
    """What a program is held against; each entry is one test.

    Args:
        stdin: ``(input, expected output)`` of whole programs.
        calls: ``(function, args, kwargs, expected value)``.
        asserts: snippets that raise where the code is wrong.
        names: functions that the asserts call; ``{"candidate": "f"}`` renames.
        setup: run before each assert.
    """

    __test__ = False

    stdin: tuple[tuple[str, str], ...] = ()
    calls: tuple[tuple[str, tuple[Any, ...], Mapping[str, Any], Any], ...] = ()
    asserts: tuple[str, ...] = ()
    names: Mapping[str, str] | tuple[str, ...] = ()
    setup: str = ""

    def __len__(self) -> int:
        return len(self.stdin) + len(self.calls) + len(self.asserts)


def read_suite(reference: Any, task_id: str = "") -> TestSuite:
    """Read the tests of a task.

    Understood are a :class:`TestSuite`; ``{"inputs": [...], "outputs": [...]}`` with an optional ``"fn_name"`` (inputs are
    then lists of arguments); a list of ``{"input", "output"}`` or ``{"call", "args", "kwargs", "expected"}``; and
    ``{"asserts": [...], "names": [...], "setup": "..."}``. ``{"tests": ...}`` holds any of these.

    Raises:
        DataError: anything else, or no test at all.
    """
    where = f"task {task_id!r}: " if task_id else ""
    suite = _suite(reference, where)
    if not len(suite):
        raise DataError(f"{where}the reference holds no test; a program without tests cannot be scored")
    return suite


def _suite(reference: Any, where: str) -> TestSuite:
    if isinstance(reference, TestSuite):
        return reference
    if isinstance(reference, Mapping):
        if "tests" in reference:
            return _suite(reference["tests"], where)
        if "inputs" in reference and "outputs" in reference:
            inputs, outputs = list(reference["inputs"]), list(reference["outputs"])
            if len(inputs) != len(outputs):
                raise DataError(f"{where}{len(inputs)} inputs for {len(outputs)} outputs")
            name = reference.get("fn_name")
            if name is None:
                return TestSuite(stdin=tuple((str(i), str(o)) for i, o in zip(inputs, outputs, strict=True)))
            return TestSuite(calls=tuple((str(name), tuple(i), {}, o) for i, o in zip(inputs, outputs, strict=True)))
        if "asserts" in reference:
            given = reference["asserts"]
            names = reference.get("names", ())
            asserts = (given,) if isinstance(given, str) else tuple(given)
            if not names:
                raise DataError(f"{where}asserts need names: the functions that they call")
            return TestSuite(
                asserts=asserts,
                names=dict(names)
                if isinstance(names, Mapping)
                else (names,)
                if isinstance(names, str)
                else tuple(names),
                setup=str(reference.get("setup", "")),
            )
        reference = [reference]
    if isinstance(reference, Sequence) and not isinstance(reference, str):
        stdin: list[tuple[str, str]] = []
        calls: list[tuple[str, tuple[Any, ...], Mapping[str, Any], Any]] = []
        for k, test in enumerate(reference):
            if isinstance(test, Mapping) and "input" in test and "output" in test:
                stdin.append((str(test["input"]), str(test["output"])))
            elif isinstance(test, Mapping) and "call" in test and "expected" in test:
                calls.append(
                    (str(test["call"]), tuple(test.get("args", ())), dict(test.get("kwargs", {})), test["expected"])
                )
            else:
                raise DataError(f"{where}test {k} needs input and output, or call and expected")
        return TestSuite(tuple(stdin), tuple(calls))
    raise DataError(f"{where}the reference of a code reward holds tests, got {type(reference).__name__}")


def equal_output(got: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether two outputs agree: line by line without trailing blanks, and numbers within ``tolerance``."""
    a = [line.split() for line in got.rstrip().splitlines()]
    b = [line.split() for line in expected.rstrip().splitlines()]
    if len(a) != len(b):
        return False
    return all(
        len(x) == len(y) and all(_equal_word(u, v, tolerance) for u, v in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z")


def _equal_word(got: str, expected: str, tolerance: float) -> bool:
    if got == expected:
        return True
    if tolerance <= 0 or not (_NUMBER.match(got) and _NUMBER.match(expected)):
        return False
    return math.isclose(float(got), float(expected), rel_tol=tolerance, abs_tol=tolerance)


def equal_value(got: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether two plain values agree; lists and tuples of equal entries do, ``True`` and ``1`` do not."""
    if isinstance(got, bool) or isinstance(expected, bool):
        return type(got) is type(expected) and got == expected
    if isinstance(got, int | float) and isinstance(expected, int | float):
        if isinstance(got, float) and isinstance(expected, float) and math.isnan(got) and math.isnan(expected):
            return True
        return got == expected or (tolerance > 0 and math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance))
    if isinstance(got, list | tuple) and isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(
            equal_value(a, b, tolerance) for a, b in zip(got, expected, strict=True)
        )
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(equal_value(got[k], expected[k], tolerance) for k in expected)
    return type(got) is type(expected) and got == expected


class CodeTests(Reward):
    """Share of a task's tests that the response's program passes, in [0, 1].

    Args:
        partial: False gives 1 only where every test passes.
        language: mark of the fence that the code is read from.
        bare: read a response without any fence as code.
        limits: of each program run (one per input, or one for all calls).
        tolerance: relative and absolute, for numbers in outputs and values.
        sandbox: where programs run: an object, a name, or a mapping with ``name`` and settings (see
            :func:`guerdon.sandbox.make_sandbox`); the process's own by default.
        extract: reads the code out of the policy's text instead of :func:`extract_code`.

    The task's reference holds the tests, see :func:`read_suite`. A response without code gets 0. Parts: ``passed``,
    ``tests``, ``ran`` (1 where the code ran at all).
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        partial: bool = True,
        language: Literal["python"] = "python",
        bare: bool = True,
        limits: Limits | None = None,
        tolerance: float = 0.0,
        sandbox: Sandbox | str | Mapping[str, Any] | None = None,
        extract: Callable[[str], str | None] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if language != "python":
            raise ConfigError(f"language must be 'python', got {language!r}; plug in a sandbox for others")
        if not 0 <= tolerance < math.inf:
            raise ConfigError(f"tolerance must be finite and >= 0, got {tolerance!r}")
        self.partial, self.tolerance = partial, float(tolerance)
        self.limits = limits or Limits()
        self._sandbox = None if sandbox is None else make_sandbox(sandbox)
        self._extract = extract or (lambda text: extract_code(text, language, bare=bare))

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score a batch; programs run on all workers of the sandbox at once."""
        suites = [read_suite(t.task.reference, t.task.id) for t in trajectories]
        codes = [self._extract(policy_text(t)) for t in trajectories]
        jobs: list[tuple[int, Job]] = []
        for k, (code, suite) in enumerate(zip(codes, suites, strict=True)):
            if code is not None:
                jobs += [(k, job) for job in self._jobs(code, suite)]
        sandbox = self._sandbox or default_sandbox()
        run_all = getattr(sandbox, "map", None)
        results = run_all([j for _, j in jobs]) if run_all else [sandbox.run(j) for _, j in jobs]
        mine: list[list[Result]] = [[] for _ in trajectories]
        for (k, _), result in zip(jobs, results, strict=True):
            mine[k].append(result)
        return [
            self._judge(sandbox, code, suite, found) for code, suite, found in zip(codes, suites, mine, strict=True)
        ]

    def _jobs(self, code: str, suite: TestSuite) -> list[Job]:
        jobs = [Job(code, "program", stdin, limits=self.limits) for stdin, _ in suite.stdin]
        if suite.calls:
            calls = tuple(Call(name, args, kwargs) for name, args, kwargs, _ in suite.calls)
            jobs.append(Job(code, "calls", calls=calls, limits=self.limits))
        return jobs

    def _judge(self, sandbox: Sandbox, code: str | None, suite: TestSuite, results: Sequence[Result]) -> Score:
        total = float(len(suite))
        if code is None:
            return Score(0.0, parts={"passed": 0.0, "tests": total, "ran": 0.0})
        passed, ran = 0, False
        for result, (_, expected) in zip(results, suite.stdin, strict=False):
            ran = ran or result.ok
            passed += result.ok and equal_output(result.stdout, expected, self.tolerance)
        if suite.calls:
            # Values count up to where the program ended: later calls were not answered.
            values = results[len(suite.stdin)].values
            for k, (_, _, _, expected) in enumerate(suite.calls):
                ok, value = values[k] if k < len(values) else (False, None)
                ran = ran or ok
                passed += ok and equal_value(value, expected, self.tolerance)
        if suite.asserts:
            from guerdon.sandbox.asserts import run_asserts

            verdicts, last = run_asserts(
                sandbox, code, suite.asserts, suite.names, setup=suite.setup, limits=self.limits
            )
            ran = ran or last.ok
            passed += sum(not v for v in verdicts)
        share = passed / total
        value = share if self.partial else float(passed == total)
        return Score(value, parts={"passed": float(passed), "tests": total, "ran": float(ran)})
