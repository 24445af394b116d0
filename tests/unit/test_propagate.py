"""Values follow a change of the graph, and only what the change reaches is computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch.fx.experimental.sym_node import SymNode

import seqc
from seqc import _torch
from seqc.ops.recurrence import Propagate, propagate
from seqc.program import Program

aten = torch.ops.aten


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.tanh(x[:, :, 1:]) * 2.0).sum(-1)


@pytest.fixture
def program() -> Program:
    return seqc.trace(Chain(), (torch.randn(2, 9, 6),), {"x": {0: "batch", 1: "sequence"}})


def calls(program: Program, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that ``propagate`` runs."""
    run: list[str] = []
    original = Propagate.call_function

    def recorded(self: Propagate, target: Any, args: Any, kwargs: Any) -> Any:
        run.append(str(target))
        return original(self, target, args, kwargs)

    monkeypatch.setattr(Propagate, "call_function", recorded)
    propagate(program.graph_module)
    return run


def node(program: Program, target: Any) -> fx.Node:
    return next(n for n in program.graph.nodes if n.target is target)


def shapes(program: Program) -> list[tuple[int | str, ...]]:
    return [program.shape_of(n.meta["val"]) for n in program.graph.nodes if n.op == "call_function"]


def test_without_a_change_nothing_is_run(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(program, monkeypatch) == []


def test_another_size_reaches_all_users(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    node(program, aten.slice.Tensor).update_arg(2, 3)
    assert len(calls(program, monkeypatch)) == program.node_count()
    x = ("batch", "sequence", 3)
    assert shapes(program) == [x, x, x, x, ("batch", "sequence")]


def test_a_value_of_the_same_shape_ends_the_change(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    node(program, aten.tanh.default).target = aten.sigmoid.default
    assert calls(program, monkeypatch) == ["aten.sigmoid.default"]


def test_another_dtype_reaches_all_users(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    first = node(program, aten.slice.Tensor)
    with program.graph.inserting_after(first):
        wide = program.graph.call_function(aten._to_copy.default, (first,), {"dtype": torch.float64})
    first.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    assert len(calls(program, monkeypatch)) == program.node_count() - 1
    assert program.output_nodes[0].meta["val"].dtype == torch.float64


def test_arithmetic_on_sizes_is_done_once_but_gives_values_of_their_own(program: Program) -> None:
    size = program.input_nodes[0].meta["val"].shape[1]
    original = vars(SymNode)["_add"]
    with _torch.faking(program.fake_mode):
        one, other = size + 1, size + 1
        assert one.node is not other.node
        assert one.node.expr is other.node.expr
        assert (one.node.hint, bool(one == other), bool(one == size)) == (size.node.hint + 1, True, False)
    assert vars(SymNode)["_add"] is original
