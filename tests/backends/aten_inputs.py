"""Inputs that the tables of ATen ops share: functions of (batch, length)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = Callable[[int, int], tuple[torch.Tensor, ...]]
Op = tuple[Callable[..., Any], Inputs]
"""An op, as a function or module of the inputs, and what makes its inputs for a batch and a length."""


def floats(*tail: int, count: int = 1) -> Inputs:
    """``count`` float inputs of shape [batch, sequence, *tail]."""
    return lambda b, n: tuple(torch.randn(b, n, *tail) for _ in range(count))


def ints(high: int = 7, low: int = 0, *tail: int, count: int = 1) -> Inputs:
    return lambda b, n: tuple(torch.randint(low, high, (b, n, *tail)) for _ in range(count))


def both(*makers: Inputs) -> Inputs:
    return lambda b, n: tuple(x for make in makers for x in make(b, n))


def mask(b: int, n: int) -> tuple[torch.Tensor, ...]:
    return (torch.rand(b, n) > 0.5,)


X, XX, IDS, XI = floats(4), floats(4, count=2), ints(), both(floats(4), ints(4))
HEADS = floats(4, 6)  # [batch, sequence, heads, size]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def causal(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril()
