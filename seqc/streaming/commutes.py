"""Whether an operation treats each element along its axes over time by itself: found by trying it.

An operation may be done on the newest steps alone if the result is that part of its result on the whole. That is tried, on
random numbers, at a few parts of a short sequence: no rule for each of torch's operations is needed, and none can be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc.outside import is_size
from seqc.streaming.concrete import shape_at, size_at
from seqc.streaming.derivation import target_of

Axes = tuple[int, ...]
"""For each axis over time of an operand, in order: the axis of the result that it becomes."""

_NONE: Mapping[fx.Node, int] = {}

# Within the shortest of the axes: some are an element or two shorter than the sequence.
PARTS = ((0, 3), (2, 5), (4, 5), (0, 5))
LENGTH = 7


def commutes(
    node: fx.Node,
    axes: Mapping[fx.Node, Axes],
    time: sympy.Symbol,
    sizes: Mapping[sympy.Symbol, int],
    weights: Mapping[str, torch.Tensor],
    resize: Callable[[fx.Node, Sequence[int]], tuple[Any, Any]],
    inner: Mapping[fx.Node, int] = _NONE,
) -> bool:
    """Whether ``node`` on parts of its operands is that part of ``node`` on the whole of them.

    ``axes`` tells, for each operand with axes over time, where these are in the result; ``resize(node, shape)`` gives the
    node's arguments with the shape of the result put where they say it. ``sizes`` are small sizes of the other dimensions.
    ``inner`` tells, where steps are merged with other elements in one axis, how many of these there are of each step.
    """
    at = {**sizes, time: LENGTH}
    torch.manual_seed(0)
    values: dict[fx.Node, Any] = {}
    for operand in dict.fromkeys(n for n in node.all_input_nodes if not is_size(n)):
        values[operand] = _random(operand, at, weights)
    first = node.meta["val"][0] if isinstance(node.meta["val"], (tuple, list)) else node.meta["val"]
    over = [a for a, size in enumerate(first.shape) if time in _symbols(size)]
    try:
        whole = _run(node, values, shape_at(first, at), at, resize)
        for parts in _choices(len(over)):
            chosen = dict(zip(over, parts, strict=True))
            some = {
                operand: _part(value, operand, time, [chosen[a] for a in axes[operand]], inner.get(operand, 1))
                if operand in axes
                else value
                for operand, value in values.items()
            }
            shape = list(shape_at(first, at))
            for axis, (start, stop) in chosen.items():
                shape[axis] = shape[axis] // LENGTH * (stop - start) if shape[axis] % LENGTH == 0 else stop - start
            got = _run(node, some, shape, at, resize)
            for full, part in zip(pytree.tree_leaves(whole), pytree.tree_leaves(got), strict=True):
                wanted = full
                for axis, bounds in chosen.items():
                    wanted = narrow(wanted, axis, bounds, inner.get(node, 1))
                if part.shape != wanted.shape or not close(part, wanted):
                    return False
    except Exception:  # an operation that does not run on a part does not commute with taking one
        return False
    return True


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding: what mixes steps is off by the size of the numbers themselves."""
    ulp = torch.finfo(a.dtype).eps if a.dtype.is_floating_point else 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    return torch.allclose(a.to(wide), b.to(wide), rtol=max(1e-4, 16 * ulp), atol=max(1e-5, 16 * ulp), equal_nan=True)


def _choices(count: int) -> list[tuple[tuple[int, int], ...]]:
    """For each axis a part; with two axes they differ, so that one cannot be taken for the other."""
    return [tuple(PARTS[(i + k) % len(PARTS)] for k in range(count)) for i in range(len(PARTS))]


def _symbols(size: Any) -> set[sympy.Symbol]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _random(node: fx.Node, at: Mapping[sympy.Symbol, int], weights: Mapping[str, torch.Tensor]) -> Any:
    value = node.meta["val"]
    if node.op == "placeholder" and node.name in weights:
        return weights[node.name]
    if isinstance(value, (tuple, list)):
        return tuple(_like(v, at) for v in value)
    return _like(value, at)


def _like(value: torch.Tensor, at: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    shape = shape_at(value, at)
    if value.dtype == torch.bool or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return torch.randint(0, 2, shape).to(value.dtype)
    return torch.randn(shape, dtype=value.dtype)


def _run(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    shape: Sequence[int],
    at: Mapping[sympy.Symbol, int],
    resize: Callable[[fx.Node, Sequence[int]], tuple[Any, Any]],
) -> Any:
    def concrete(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        return size_at(arg.meta["val"], at) if is_size(arg) else values[arg]

    args, kwargs = pytree.tree_map(concrete, resize(node, shape), is_leaf=lambda a: a is None)
    with torch.no_grad():
        return target_of(node)(*args, **kwargs)


def _part(value: Any, node: fx.Node, time: sympy.Symbol, parts: Sequence[tuple[int, int]], inner: int) -> Any:
    fake = node.meta["val"]
    if isinstance(fake, (tuple, list)):
        return tuple(_part_of(v, f, time, parts, inner) for v, f in zip(value, fake, strict=True))
    return _part_of(value, fake, time, parts, inner)


def _part_of(
    value: torch.Tensor, fake: torch.Tensor, time: sympy.Symbol, parts: Sequence[tuple[int, int]], inner: int
) -> torch.Tensor:
    over = [a for a, size in enumerate(fake.shape) if time in _symbols(size)]
    for axis, part in zip(over, parts, strict=True):
        value = narrow(value, axis, part, inner)
    return value


def narrow(value: torch.Tensor, axis: int, part: tuple[int, int], inner: int) -> torch.Tensor:
    """``part`` of an axis over time; where other axes are merged with it, of each of their elements."""
    size = value.shape[axis]
    if size % LENGTH == 0 and size > LENGTH:
        apart = value.reshape(*value.shape[:axis], size // LENGTH // inner, LENGTH, inner, *value.shape[axis + 1 :])
        return apart.narrow(axis + 1, part[0], part[1] - part[0]).flatten(axis, axis + 2)
    return value.narrow(axis, part[0], part[1] - part[0])
