"""One spelling per read, write and list of results: what each rule rewrites, what it leaves alone, values bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from seqc.frontend.capture import capture
from seqc.frontend.normalize import normalize
from seqc.frontend.signature import bind
from seqc.program import Program
from tests.helpers.modules import Applied

Function = Callable[[torch.Tensor], torch.Tensor]


def traced(function: Function) -> Program:
    """The trace at batch 3, length 7, not yet normalised."""
    signature = bind(Applied(function), (torch.randn(2, 9, 4),), {"x": {0: "batch", 1: "sequence"}})
    return capture(Applied(function), signature, signature.trace_sizes()).program


def ops(program: Program) -> list[str]:
    """The operators in order, reads of sizes left out."""
    names = [getattr(n.target, "__name__", str(n.target)) for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in names if not name.startswith("sym_size")]


def filled(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(x.shape[0], x.shape[1], 4)
    for t in range(x.shape[1]):
        y[:, t] = x[:, t].sin()
    return y


def chunks_written(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    for t in range(0, x.shape[1], 4):
        y[:, t : t + 4] = x[:, t : t + 4].cumsum(1)
    return y


def growing(x: torch.Tensor) -> torch.Tensor:
    out = x[:, :1].sin()
    for t in range(1, x.shape[1]):
        out = torch.cat([out, x[:, t : t + 1].sin()], dim=1)
    return out


def written_in_part(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(x.shape[0], x.shape[1], 4)
    y[:, 1] = x[:, 0]
    return y


REWRITES: dict[str, tuple[Function, list[str]]] = {
    "copies": (lambda x: x.clone().detach().contiguous() * 2, ["mul.Tensor"]),
    "whole slices": (lambda x: x[:, :, :] * 2, ["mul.Tensor"]),
    "casts to the same type": (lambda x: x.to(torch.float32).float() * 2, ["mul.Tensor"]),
    "views of the same shape": (lambda x: x.reshape(x.shape).view(x.shape) * 2, ["mul.Tensor"]),
    "unbind": (lambda x: torch.unbind(x, 1)[2], ["select.int"]),
    "a slice of one step": (lambda x: x[:, 2:3], ["select.int", "unsqueeze.default"]),
    "equal work": (lambda x: x.exp() + x.exp(), ["exp.default", "add.Tensor"]),
    "an end at the length": (lambda x: x[:, 2 : min(6, x.shape[1])], ["slice.Tensor"]),
    "dead work": (lambda x: (x.exp(), x * 2)[1], ["mul.Tensor"]),
    "nested lists": (
        lambda x: torch.cat([torch.cat([x, x * 2], 1), x * 3], 1),
        ["mul.Tensor", "mul.Tensor", "cat.default"],
    ),
}

KEPT: dict[str, tuple[Function, list[str]]] = {
    "a cast to another type": (lambda x: x.double() * 2, ["_to_copy.default", "mul.Tensor"]),
    "a slice that cuts": (lambda x: x[:, 1:] * 2, ["slice.Tensor", "mul.Tensor"]),
    "a view of another shape": (lambda x: x.reshape(-1, 4) * 2, ["reshape.default", "mul.Tensor"]),
    "a split of features": (lambda x: x.split(2, dim=2)[1], ["split.Tensor", "getitem"]),
    "lists along different axes": (
        lambda x: torch.cat([torch.cat([x, x * 2], 1)] * 2, 2),
        ["mul.Tensor", "cat.default", "cat.default"],
    ),
    "one write": (
        written_in_part,
        ["zeros.default", "select.int", "select_scatter.default"],
    ),
}


@pytest.mark.parametrize("name", [*REWRITES, *KEPT])
def test_each_rule_before_and_after(name: str) -> None:
    function, expected = {**REWRITES, **KEPT}[name]
    program = traced(function)
    normalize(program)
    assert ops(program) == expected


@pytest.mark.parametrize("name", [*REWRITES, *KEPT])
def test_every_rule_keeps_the_value_bit_for_bit(name: str) -> None:
    function, _ = {**REWRITES, **KEPT}[name]
    program = traced(function)
    normalize(program)
    for length in (7, 12):
        x = torch.randn(2, length, 4)
        assert torch.equal(program(x)[0], function(x))


@pytest.mark.parametrize(
    ("function", "collected"), [(filled, "stack.default"), (growing, "cat.default"), (chunks_written, "cat.default")]
)
def test_writes_and_growing_lists_become_one_list_of_results(function: Function, collected: str) -> None:
    program = traced(function)
    before = ops(program)
    assert before.count(collected) != 1 or before[-1] != collected
    normalize(program)
    after = ops(program)
    assert after[-1] == collected and after.count(collected) == 1
    assert not {"select_scatter.default", "slice_scatter.default", "copy.default"} & set(after)
    x = torch.randn(3, 7, 4)
    assert torch.equal(program(x)[0], function(x))


def test_random_numbers_are_not_merged() -> None:
    program = traced(lambda x: torch.rand_like(x) + torch.rand_like(x))
    normalize(program)
    assert ops(program).count("rand_like.default") == 2


def test_normalizing_twice_changes_nothing() -> None:
    program = traced(filled)
    normalize(program)
    once = ops(program)
    normalize(program)
    assert ops(program) == once
