"""The check that a compiled model computes what its source model computes, at sizes it was not traced at too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from seqc.compare import DEFAULT_TOLERANCE, Array, Comparison, compare_all
from seqc.errors import VerificationError
from seqc.frontend.signature import Signature

Tensors = dict[str, torch.Tensor]
Arrays = dict[str, Array]

# Up to this size the check looks at both sides of a branch that Python took on a size; beyond, the user is told.
LONGEST_BRANCH = 1100

_BATCHES = (1, 3)
# Primes above the sizes that models are traced at, so that a size frozen during tracing cannot go unseen.
_PRIME_ABOVE = 17


@dataclass(frozen=True)
class CheckCase:
    """The outcome at one set of dimension sizes.

    ``comparisons`` has one entry per output unless a model raised: ``refusal`` is what the source model said (no
    failure of the compiled one), ``failure`` what the compiled model said where the source did not object. The inputs
    are ``case_inputs(signature, case.sizes, case.seed)``. ``source_error`` is set where the source model in float64 was
    compared with, see :func:`check`: the error of the source model itself.
    """

    sizes: Mapping[str, int]
    seed: int | None
    comparisons: tuple[Comparison, ...] = ()
    refusal: str = ""
    failure: str = ""
    source_error: float | None = None

    @property
    def ok(self) -> bool:
        return not self.failure and all(c.ok for c in self.comparisons)

    @property
    def error(self) -> float:
        """The largest relative error; infinite where the compiled model raised, 0 where the source did."""
        return math.inf if self.failure else max((c.relative for c in self.comparisons), default=0.0)

    @property
    def worst(self) -> Comparison | None:
        """The failing comparison with the largest error; of none fails, the one with the largest error."""
        return max(self.comparisons, key=lambda c: (not c.ok, c.relative), default=None)

    def __str__(self) -> str:
        where = _spell(self.sizes) + (" (example inputs)" if self.seed is None else "")
        if self.refusal:
            return f"{where}: the source model refuses: {self.refusal}"
        if self.failure:
            return f"{where}: FAILED, the compiled model raises: {self.failure}"
        own = "" if self.source_error is None else f" against the source in float64; its own is {self.source_error:.2g}"
        return f"{where}: {'ok' if self.ok else 'FAILED'}, {self.worst or 'no outputs'}{own}"


@dataclass(frozen=True)
class CheckReport:
    """All cases of a check.

    ``example`` are the sizes of the example inputs, ``lengths`` the dimensions not taken for a batch, and
    ``deterministic`` is False where the source model gave two answers to the same failing inputs.
    """

    cases: tuple[CheckCase, ...]
    example: Mapping[str, int]
    lengths: tuple[str, ...]
    deterministic: bool = True

    @property
    def compared(self) -> tuple[CheckCase, ...]:
        """The cases that the source model accepted."""
        return tuple(case for case in self.cases if not case.refusal)

    @property
    def ok(self) -> bool:
        """Every accepted case agrees, and there is at least one."""
        return bool(self.compared) and all(case.ok for case in self.cases)

    @property
    def error(self) -> float:
        """The largest relative error of all cases."""
        return max((case.error for case in self.cases), default=0.0)

    def lines(self) -> list[str]:
        """One line per case and a summary."""
        refused = len(self.cases) - len(self.compared)
        note = f", {refused} refused by the source model" if refused else ""
        summary = f"{len(self.compared)} sizes compared{note}: largest error {self.error:.2g} of an output's scale"
        return [*map(str, self.cases), summary]

    def to_json(self) -> dict[str, Any]:
        """The report as strict JSON data; an infinite error becomes the string ``"inf"``."""
        return {
            "ok": self.ok,
            "error": _number(self.error),
            "deterministic": self.deterministic,
            "example": dict(self.example),
            "cases": [
                {
                    "sizes": dict(case.sizes),
                    "seed": case.seed,
                    "ok": case.ok,
                    "refusal": case.refusal,
                    "failure": case.failure,
                    "source_error": None if case.source_error is None else _number(case.source_error),
                    "outputs": [
                        {
                            "name": c.name,
                            "max_abs": _number(c.max_abs),
                            "relative": _number(c.relative),
                            "ok": c.ok,
                            "tolerance": c.tolerance,
                            "where": None if c.where is None else list(c.where),
                            "detail": c.detail,
                        }
                        for c in case.comparisons
                    ],
                }
                for case in self.cases
            ],
        }

    def raise_if_failed(self) -> None:
        """Raise unless ``ok``.

        Raises:
            VerificationError: one line with the size, output, error and tolerance of the worst case, and what sets the
                failing sizes apart; or, where the source model refused every size, its message.
        """
        if self.ok:
            return
        if not self.compared:
            raise VerificationError(
                f"nothing could be checked: the source model refuses all {len(self.cases)} sizes, "
                f"{_spell(self.cases[0].sizes)} with {self.cases[0].refusal}"
            )
        case = max(self.compared, key=lambda c: (not c.ok, c.error))
        if case.failure:
            what = f"the compiled model raises where the source does not, at {_spell(case.sizes)}: {case.failure}"
        else:
            what = f"the compiled model differs from the source at {_spell(case.sizes)}: {case.worst}"
        raise VerificationError(f"{what} ({self._pattern()})")

    def _pattern(self) -> str:
        if not self.deterministic:
            return "the source model itself gives two answers to the same inputs: is dropout on? call .eval() first"
        failing = [case for case in self.compared if not case.ok]
        agreeing = [case for case in self.compared if case.ok]
        if not agreeing:
            return "every size fails"

        def beyond(case: CheckCase) -> bool:
            return any(case.sizes[d] > self.example[d] for d in self.lengths)

        spelled = _spell({d: self.example[d] for d in self.lengths})
        if all(map(beyond, failing)) and not any(map(beyond, agreeing)):
            return f"exactly the sizes beyond the example's {spelled} fail"
        if all(map(beyond, failing)):
            return f"only sizes beyond the example's {spelled} fail, {len(failing)} of {len(self.compared)}"
        if all(dict(case.sizes) != dict(self.example) for case in failing):
            return f"the example's sizes agree, {len(failing)} of {len(self.compared)} fail"
        return f"{len(failing)} of {len(self.compared)} sizes fail, the example's among them"


def check(
    source: Callable[[Tensors], Mapping[str, Array]],
    compiled: Callable[[Arrays], Mapping[str, Array]],
    signature: Signature,
    extra_lengths: Iterable[int] = (),
    tolerance: float | Mapping[str, float] = DEFAULT_TOLERANCE,
    seed: int = 0,
    exact: Callable[[Tensors], Mapping[str, Array]] | None = None,
) -> CheckReport:
    """Compare ``compiled`` with ``source`` at the example inputs and, with random inputs, at :func:`plan_sizes`.

    A source may lose digits that the compiled model keeps, as (exp(z) - 1) / z does for small z. So where the two differ,
    ``exact``, the source in float64, decides: the compiled model is right if it agrees with that within the same
    tolerance, and is nearer to it than the source is. Such a case says so.

    Args:
        source: the source model, from tensors by input name to arrays by output name.
        compiled: the compiled model, from arrays to arrays.
        extra_lengths: further sizes for all dimensions that are not a batch.
        tolerance: largest error relative to an output's scale, one for all outputs or by name.
        seed: of the random inputs; the n-th size uses ``seed + n``.
        exact: the source in float64; None, or one that raises, leaves the verdict as it is.
    """
    example = signature.example_sizes()
    cases: list[CheckCase] = []
    deterministic = True
    plan: list[tuple[dict[str, int], int | None]] = [(example, None)]
    plan += [(sizes, seed + i) for i, sizes in enumerate(plan_sizes(signature, extra_lengths))]
    for sizes, case_seed in plan:
        inputs = case_inputs(signature, sizes, case_seed)
        case = _run_case(source, compiled, inputs, sizes, case_seed, tolerance, exact)
        if not case.ok and case.comparisons and deterministic and all(c.ok for c in cases):
            again = compare_all(source(_cloned(inputs)), source(_cloned(inputs)), tolerance)
            deterministic = all(c.ok for c in again)
        cases.append(case)
    return CheckReport(tuple(cases), example, _split(signature)[1], deterministic)


def case_inputs(signature: Signature, sizes: Mapping[str, int], seed: int | None) -> Tensors:
    """The inputs of a case: the example inputs where ``seed`` is None, else random ones like them."""
    return dict(signature.examples) if seed is None else signature.random(sizes, seed)


def plan_sizes(signature: Signature, extra_lengths: Iterable[int] = ()) -> list[dict[str, int]]:
    """The sizes to check at, inside each dimension's range and without repetition.

    Lengths 1, the example's, a prime beyond it, four times it, and ``extra_lengths``, all dimensions at once (with a
    prime of its own for each), at batch 1 and at batch 3; where there are several lengths, also each of them alone.
    """
    example = signature.example_sizes()
    batch, lengths = _split(signature)
    if not example:
        return [{}]
    primes = _primes(2 * max((example[d] for d in lengths), default=1))
    prime = {d: next(primes) for d in lengths}
    own = [dict.fromkeys(lengths, 1), {d: example[d] for d in lengths}, prime, {d: 4 * example[d] for d in lengths}]
    planned = [
        {**dict.fromkeys(batch, b), **row}
        for row in (*own, *(dict.fromkeys(lengths, n) for n in extra_lengths))
        for b in _BATCHES
    ]
    if len(lengths) > 1:
        middle = {**dict.fromkeys(batch, _BATCHES[-1]), **{d: example[d] for d in lengths}}
        planned += [{**middle, d: row[d]} for d in lengths for row in own]
    clamped = [{d: signature.clamp(d, sizes[d]) for d in example} for sizes in planned]
    return list({tuple(sizes.items()): sizes for sizes in clamped}.values())


def first_divergence(
    source: Callable[[Tensors], Mapping[str, Array]],
    stages: Sequence[tuple[str, Callable[[Tensors], Mapping[str, Array]]]],
    inputs: Tensors,
    tolerance: float | Mapping[str, float] = DEFAULT_TOLERANCE,
) -> str | None:
    """The name of the first of ``stages`` that raises or whose outputs differ from those of ``source``; else None.

    ``stages`` are snapshots of the model in the order in which the compiler made them, so that the pass that broke it
    is named without anything recorded beforehand.
    """
    reference = {name: np.array(value) for name, value in source(_cloned(inputs)).items()}
    for name, stage in stages:
        try:
            outputs = stage(_cloned(inputs))
        except Exception:
            return name
        if not all(c.ok for c in compare_all(reference, outputs, tolerance)):
            return name
    return None


def to_numpy(tensor: torch.Tensor) -> Array:
    """A tensor of any device, layout or gradient state as an array of its own memory."""
    return np.array(tensor.detach().cpu().resolve_conj().resolve_neg().numpy())


def _run_case(
    source: Callable[[Tensors], Mapping[str, Array]],
    compiled: Callable[[Arrays], Mapping[str, Array]],
    inputs: Tensors,
    sizes: Mapping[str, int],
    seed: int | None,
    tolerance: float | Mapping[str, float],
    exact: Callable[[Tensors], Mapping[str, Array]] | None,
) -> CheckCase:
    arrays = {name: to_numpy(tensor) for name, tensor in inputs.items()}
    try:
        reference = source(_cloned(inputs))
    except Exception as error:
        return CheckCase(sizes, seed, refusal=_line(error))
    try:
        outputs = compiled(arrays)
    except Exception as error:
        return CheckCase(sizes, seed, failure=_line(error))
    case = CheckCase(sizes, seed, compare_all(reference, outputs, tolerance))
    return case if case.ok or exact is None else _decided(case, reference, outputs, exact, inputs, tolerance)


def _decided(
    case: CheckCase,
    reference: Mapping[str, Array],
    outputs: Mapping[str, Array],
    exact: Callable[[Tensors], Mapping[str, Array]],
    inputs: Tensors,
    tolerance: float | Mapping[str, float],
) -> CheckCase:
    """``case`` against the source in float64, where that shows the source to be further off than the compiled model."""
    try:
        truth = {name: array.astype(reference[name].dtype) for name, array in exact(_cloned(inputs)).items()}
    except Exception:
        return case
    ours, theirs = compare_all(truth, outputs, tolerance), compare_all(truth, reference, tolerance)
    nearer = all(a.relative <= b.relative for a, b, c in zip(ours, theirs, case.comparisons, strict=True) if not c.ok)
    if not nearer or not all(c.ok for c in ours):
        return case
    return CheckCase(case.sizes, case.seed, ours, source_error=max(c.relative for c in theirs))


def _split(signature: Signature) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Batch dimensions and lengths.

    A batch only ever appears at axis 0, unless dimensions say by their name that they are the batch: time-major models
    have the time at axis 0. Where every dimension would be a batch, they are all treated as lengths.
    """
    dims = list(signature.example_sizes())
    named = [d for d in dims if "batch" in d.lower()]
    first = [d for d in dims if all(a == 0 for axes in signature.axes.values() for a, n in axes.items() if n == d)]
    batch = named or first
    if len(batch) == len(dims):
        return (), tuple(dims)
    return tuple(batch), tuple(d for d in dims if d not in batch)


def _primes(above: int) -> Iterator[int]:
    n = max(above, _PRIME_ABOVE)
    while True:
        n += 1
        if all(n % k for k in range(2, math.isqrt(n) + 1)):
            yield n


def _cloned(inputs: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies, as a model may write into its inputs."""
    return {name: tensor.clone() for name, tensor in inputs.items()}


def _spell(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the fixed sizes"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
