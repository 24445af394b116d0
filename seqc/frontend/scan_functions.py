"""Parallel scans written as autograd Functions, traced as the loop that they compute.

Such a Function works through a tree over time, in place on a padded copy; the depth of the tree depends on the length,
so no trace of it holds at another length. What it computes is found from its values instead: it is run on random
numbers in float64 at lengths on both sides of powers of two, and where each result is that of

    h = a[t] * h + b[t], from h = 0

along an axis of symbolic size, this loop is traced in its place. Anything else is traced as it is written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import Function

LENGTHS = (1, 2, 3, 4, 5, 8, 9, 16, 31, 33)
"""The lengths at which a Function is compared with the loop."""

_FREE = 2  # size of other symbolic axes in these runs
_CLOSE = 1e-9

Match = tuple[int, bool]
"""The axis of time, and whether the first argument is the decay."""


@contextlib.contextmanager
def scans_as_loops(notes: list[str]) -> Iterator[None]:
    """Inside, autograd Functions that compute a scan run its loop. What was replaced is said in ``notes``."""
    functions = [f for f in _subclasses(Function) if "forward" in vars(f) and not f.__module__.startswith("torch.")]
    saved = {function: vars(function)["forward"] for function in functions}
    for function in functions:
        setattr(function, "forward", staticmethod(_replaced(function, notes)))  # noqa: B010
    try:
        yield
    finally:
        for function, forward in saved.items():
            setattr(function, "forward", forward)  # noqa: B010


def _subclasses(cls: Any) -> list[Any]:
    return [s for child in cls.__subclasses__() for s in (child, *_subclasses(child))]


def _replaced(function: Any, notes: list[str]) -> Callable[..., Any]:
    forward = function.forward
    takes_context = function.setup_context is Function.setup_context
    known: dict[Any, Match | None] = {}

    def run(*given: Any) -> Any:
        args = given[1:] if takes_context else given
        if not _alike(args):
            return forward(*given)
        shape = tuple(s if type(s) is int else None for s in args[0].shape)
        key = (shape, args[0].dtype)
        if key not in known:
            known[key] = _outside_tracing(lambda: _match(forward, takes_context, shape, args[0].dtype))
        match = known[key]
        if match is None:
            return forward(*given)
        axis, decay_first = match
        name = f"{function.__module__}.{function.__qualname__}"
        note = f"{name} computes h = a * h + b along axis {axis} (at lengths {LENGTHS}): traced as a loop"
        if note not in notes:
            notes.append(note)
        a, b = args if decay_first else reversed(args)
        return loop(a, b, axis)

    return run


def _alike(args: Sequence[Any]) -> bool:
    """Whether the arguments are two tensors of one shape and dtype, some of whose sizes are symbolic."""
    if len(args) != 2 or not all(isinstance(a, torch.Tensor) for a in args):
        return False
    a, b = args
    floating = a.is_floating_point() or a.is_complex()
    return floating and a.dtype == b.dtype and a.shape == b.shape and any(type(s) is not int for s in a.shape)


def loop(a: torch.Tensor, b: torch.Tensor, axis: int) -> torch.Tensor:
    """h = a[t] * h + b[t] along ``axis``, from h = 0; the h of every step."""
    h = torch.zeros_like(b.select(axis, 0))
    steps = []
    for t in range(int(b.shape[axis])):
        h = a.select(axis, t) * h + b.select(axis, t)
        steps.append(h)
    return torch.stack(steps, axis)


class _Context:
    """Takes what a forward says about its backward."""

    def save_for_backward(self, *tensors: Any) -> None: ...
    def save_for_forward(self, *tensors: Any) -> None: ...
    def mark_dirty(self, *tensors: Any) -> None: ...
    def mark_non_differentiable(self, *tensors: Any) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def _match(
    forward: Callable[..., Any], takes_context: bool, shape: tuple[int | None, ...], dtype: torch.dtype
) -> Match | None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    candidates = [(axis, first) for axis, size in enumerate(shape) if size is None for first in (True, False)]
    return next((c for c in candidates if _computes_scan(forward, takes_context, shape, wide, *c)), None)


def _computes_scan(
    forward: Callable[..., Any],
    takes_context: bool,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    axis: int,
    decay_first: bool,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        sizes = [length if i == axis else _FREE if s is None else s for i, s in enumerate(shape)]
        a, b = (torch.randn(sizes, dtype=dtype, generator=generator) for _ in range(2))
        a[torch.rand(sizes, generator=generator) < 0.1] = 0.0  # resets
        args = (a, b) if decay_first else (b, a)
        context = (_Context(),) if takes_context else ()
        copies = [x.clone() for x in args]
        try:
            found = forward(*context, *copies)
        except Exception:
            return False
        if not all(torch.equal(x, copy) for x, copy in zip(args, copies, strict=True)):
            return False  # it writes to what it is given
        wanted = loop(a, b, axis)
        if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != dtype:
            return False
        if not bool((found - wanted).abs().max() <= _CLOSE * wanted.abs().max()):
            return False
    return True


def _outside_tracing(task: Callable[[], Match | None]) -> Match | None:
    """Run ``task`` where tensors are real: torch's tracing modes belong to the thread that traces."""
    results: list[Match | None] = []

    def run() -> None:
        with torch.no_grad():
            results.append(task())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0] if results else None
