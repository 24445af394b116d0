"""What a lowering is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.program import Dim, named_args
from seqc.sizes import at_least_one

aten = torch.ops.aten

STANDARD_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the operators LinearAttention and CausalConvWithState of ONNX 27 take."""


class Refused(Exception):
    """Why a lowering does not take a node."""


@dataclass(frozen=True)
class Lowering:
    """One way to write a dialect op with operations that targets have.

    ``write(emit, node, **settings)`` writes it in front of ``node`` and returns a node for each result, or None where
    ``node`` stays as it is; it raises Refused where it would not be right or not run. ``why`` says what the form is, a
    function of the node where that depends on what the node computes. ``domains`` are the ONNX operator domains it needs
    besides the standard one: a target that lacks one is not offered it. ``opset`` is the first ONNX opset with the operators
    it needs. ``cpu_only(node)`` says why ONNX Runtime may run it on a CPU only, else "". ``short(node)`` gives forms that are
    faster for few steps, each with how many that are (``math.inf``: it is faster at any length, 0: it is not): the first that
    the target has is taken for those, chosen in the graph; ``timed`` is the argument with time at axis 0. A form that
    ``needs_steps`` fails where there are none.

    A form that is read off what a loop's body happens to compute is compared with the loop before it is used: on random
    numbers in float64, over at least ``confirmed_over`` steps (None: not compared), to a relative error of ``agreement``.
    """

    op: str
    name: str
    why: str | Callable[[fx.Node], str]
    write: Callable[..., list[fx.Node] | None]
    domains: frozenset[str] = frozenset()
    opset: int = 18
    cpu_only: Callable[[fx.Node], str] = lambda node: ""
    short: Callable[[fx.Node], dict[str, float]] = lambda node: {}
    timed: str = ""
    needs_steps: bool = False
    confirmed_over: int | None = None
    agreement: float = 1e-10


def always_steps(dims: Iterable[Dim], node: fx.Node, form: Lowering) -> bool:
    """Whether ``node``, of which ``form`` is one, is proved to have at least one step."""
    return at_least_one(dims, named_args(node)[form.timed].meta["val"].shape[0])


Step = Callable[[Emitter, list[fx.Node], list[fx.Node], list[fx.Node]], tuple[list[fx.Node], list[fx.Node]]]
"""Emits one step of a loop from carries, xs and invariants; returns the next carries and the ys."""


def short_name(op: str) -> str:
    """The name of an op without its namespace."""
    return op.rpartition("::")[2]


def trip_of(emit: Emitter, steps: Any) -> Any:
    """The number of steps of a value [trip, ...], an int or a node; 1 where a single step is written."""
    if emit.most_steps == 1:
        return 1
    size = steps.meta["val"].shape[0]
    return size if isinstance(size, int) else emit(aten.sym_size.int, steps, 0)


def size_of(emit: Emitter, node: fx.Node, axis: int) -> Any:
    """A size of ``node``, an int or a node."""
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else emit(aten.sym_size.int, node, axis)
