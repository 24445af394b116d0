"""Functions of torch in a spelling that keeps symbolic sizes, while a model is traced."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class SymbolicSpellings(TorchFunctionMode):
    """Spells functions that would lose what a symbolic size means in another way, inside.

    ``unbind``, ``split`` and ``chunk`` along a symbolic dimension read by index: torch would divide the size by the number of
    pieces, which loses that each piece is one step. ``linspace`` is computed: its result would have the size of the trace.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.unbind, torch.Tensor.unbind):
            x, dim = _arguments(args, kwargs, "dim", 0)
            if isinstance(x.shape[dim], torch.SymInt):
                return tuple(x.select(dim, i) for i in range(int(x.shape[dim])))
        if func in (torch.split, torch.Tensor.split) and len(args) > 1 and isinstance(args[1], int):
            x, dim = _arguments((args[0], *args[2:]), kwargs, "dim", 0)
            if isinstance(x.shape[dim], torch.SymInt):
                length = int(x.shape[dim])
                pieces = range(0, length, args[1])
                return tuple(torch.ops.aten.slice.Tensor(x, dim, i, i + args[1]) for i in pieces)
        if func in (torch.tensor_split, torch.Tensor.tensor_split) and len(args) > 1 and isinstance(args[1], int):
            x, dim = _arguments((args[0], *args[2:]), kwargs, "dim", 0)
            if isinstance(x.shape[dim], torch.SymInt):
                return _even_pieces(x, args[1], dim)
        if func is torch.linspace and (found := _linspace(*args, **kwargs)) is not None:
            return found
        if func is torch.Tensor.__getitem__:
            return func(args[0], _single_steps(*args))
        return func(*args, **kwargs)


def _linspace(start: Any, end: Any, steps: Any, *, dtype: Any = None, **settings: Any) -> torch.Tensor | None:
    """torch.linspace of a symbolic number of steps, as it computes: from the nearer end. None where it is another call."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    numbers = all(isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) for x in (start, end))
    if (
        not isinstance(steps, torch.SymInt)
        or not numbers
        or not dtype.is_floating_point
        or settings.get("out") is not None
    ):
        return None
    symbolic: Any = torch
    at = symbolic.arange(steps)
    gaps = symbolic.sym_max(steps - 1, 1)
    each = (end - start) / gaps
    near, far = start + at.to(dtype) * each, end - (gaps - at).to(dtype) * each
    return torch.where(2 * at < steps, near, far)


def _even_pieces(x: torch.Tensor, count: int, dim: int) -> tuple[torch.Tensor, ...]:
    """tensor_split: the first ``length % count`` pieces are longer by one, as arithmetic instead of a branch."""
    symbolic: Any = torch
    base, rest = x.shape[dim] // count, x.shape[dim] % count
    ends = [i * base + symbolic.sym_min(i, rest) for i in range(count + 1)]
    return tuple(torch.ops.aten.slice.Tensor(x, dim, a, b) for a, b in itertools.pairwise(ends))


def _single_steps(x: torch.Tensor, index: Any) -> Any:
    """x[..., t:t+1, ...] as x[..., [t] (by select), ...]: a step of size 1, not of a size that depends on the length."""
    items = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis or isinstance(i, torch.Tensor) for i in items) or None in items:
        return index
    result: list[Any] = []
    for axis, item in enumerate(items):
        one = isinstance(item, slice) and type(item.start) is int and type(item.stop) is int and item.step in (None, 1)
        if one and item.stop == item.start + 1 and item.start >= 0 and isinstance(x.shape[axis], torch.SymInt):
            result += [item.start, None]
        else:
            result.append(item)
    return tuple(result)


def _arguments(args: Any, kwargs: Any, name: str, default: int) -> tuple[torch.Tensor, int]:
    return args[0], args[1] if len(args) > 1 else kwargs.get(name, default)
