"""Newton's method for loops: as the loop where it converges, the loop itself where it does not, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch

import seqc
from seqc.backends.onnx import export
from seqc.lowerings.lower import Lower
from seqc.ops.recurrence import is_branch, is_recurrence
from seqc.pipeline import run_passes
from seqc.program import Port, Program
from seqc.target import TARGETS
from tests.helpers.onnx import assert_same, run, session
from tests.helpers.programs import loop_program
from tests.models.zoo import ALL

D = 4
LENGTHS = (1, 2, 15, 16, 17, 257, 4096)
Tensors = tuple[torch.Tensor, ...]
Step = Callable[..., Tensors]


def gru(h: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Tensors:
    """Every gate reads the state through a diagonal matrix, a row of ``w``."""
    z = torch.sigmoid(w[0] * h + x)
    h = h + z * (torch.tanh(w[1] * h + y) - h)
    return h, h * x


def lstm(h: torch.Tensor, c: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Tensors:
    f = torch.sigmoid(w[0] * h + x + w[2] * c)
    z = torch.tanh(w[1] * h + y)
    c = z + f * (c - z)
    h = torch.sigmoid(w[3] * h + x) * torch.tanh(c)
    return h, c, h


CELLS: dict[str, tuple[Step, int]] = {"gru": (gru, 1), "lstm": (lstm, 2)}


def loop(step: Step, states: int, gain: float = 1.0, reverse: bool = False, start: float = 0.0) -> Program:
    torch.manual_seed(0)
    xs = [torch.randn(2, 9, D) for _ in range(2)]
    weights = [gain * (0.5 + torch.rand(4, D))]
    return loop_program(step, xs, [torch.full((D,), start)] * states, weights, reverse=reverse)


def newton(program: Program, target: str = "onnx", **settings: float) -> tuple[Program, tuple[str, ...]]:
    """``program`` in the form, with a further output: whether the loop was taken."""
    found = program.copy()
    told = {"newton": {"iterations": 5, "tolerance": 1e-6, **settings}}
    (record,) = run_passes(found, [Lower(TARGETS[target], {"recurrence": "newton"}, settings=told)])
    for branch in [n for n in found.graph.nodes if is_recurrence(n) and is_branch(n)]:
        failed = branch.args[1].args[0]
        found.output_node.args = ((*found.output_nodes, failed),)
        found.outputs = (*found.outputs, Port("failed", failed.meta["val"].dtype, ()))
        found.graph_module.recompile()
    return found, record.reasons


def inputs(length: int, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(length)
    return tuple(scale * torch.randn(2, length, D, generator=generator) for _ in range(2))


@pytest.mark.parametrize(("cell", "reverse"), [("gru", True), ("lstm", False)])
def test_small_gains_converge_at_every_length_without_the_loop(cell: str, reverse: bool) -> None:
    program = loop(*CELLS[cell], gain=0.3, reverse=reverse, start=0.5)
    compiled = session(export(newton(program)[0]))
    for length in LENGTHS:
        *found, failed = run(compiled, inputs(length))
        assert failed == 0
        assert_same(found, program(*inputs(length)), 2e-6)


def test_the_parallel_result_is_what_is_returned() -> None:
    """With a tolerance that anything passes, one iteration is returned though it is not the loop's answer."""
    program = loop(gru, 1, gain=1.5)
    rough, _ = newton(program, iterations=1, tolerance=1e6)
    *found, failed = run(session(export(rough)), inputs(17))
    assert failed == 0
    assert (torch.tensor(found[1]) - program(*inputs(17))[1]).abs().max() > 1e-3


@pytest.mark.parametrize("cell", CELLS)
def test_large_gains_take_the_loop_and_give_exactly_its_answer(cell: str) -> None:
    program = loop(*CELLS[cell], gain=-8.0)
    compiled, sequential = session(export(newton(program)[0])), session(export(program))
    *found, failed = run(compiled, inputs(257))
    assert failed == 1
    for a, b in zip(found, run(sequential, inputs(257)), strict=True):
        assert (a == b).all()


def overflowing(h: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Tensors:
    h = torch.tanh(torch.exp(w[0] * h * h) * y) + x
    return h, h


def test_iterates_that_overflow_or_are_nan_take_the_loop() -> None:
    program = loop(overflowing, 1, gain=40.0)
    *found, failed = run(session(export(newton(program)[0])), inputs(64, 3.0))
    assert failed == 1
    assert_same(found, program(*inputs(64, 3.0)), 1e-5)


def test_a_nan_in_the_input_is_the_loops_nan() -> None:
    program = loop(gru, 1, gain=0.3)
    x, y = inputs(16)
    x[0, 5, 1] = float("nan")
    *found, failed = run(session(export(newton(program)[0])), (x, y))
    assert failed == 1
    assert_same(found, program(x, y))


def test_no_steps_return_the_initial_state() -> None:
    program = loop(gru, 1, gain=0.3, start=0.5)
    found, _ = newton(program)
    h, y, failed = found(*inputs(0))
    assert not failed and (h == 0.5).all() and y.shape == (0, 2, D)


def dense(h: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Tensors:
    h = torch.tanh(h @ w + x)
    return h, h


def affine(h: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Tensors:
    h = torch.sigmoid(x) * h + y
    return h, h


def summed(h: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Tensors:
    h = torch.tanh(x + h.sum(-1, keepdim=True))
    return h, h


def no_rule(h: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Tensors:
    h = torch.nn.functional.hardtanh(h * x) + y
    return h, h


REFUSED: dict[str, tuple[Step, str]] = {
    "dense matrix": (dense, r"aten\.(mm|matmul)\.default at .* is not known to be elementwise"),
    "affine": (affine, "affine in its state, which takes no iterations"),
    "sum over the state": (summed, r"aten\.sum.* is not known to be elementwise"),
    "no derivative": (no_rule, "hardtanh_backward.default, which no target has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_stays_a_loop_and_is_told_why(name: str) -> None:
    step, why = REFUSED[name]
    program = loop(step, 1)
    found, reasons = newton(program)
    assert any(" recurrence as loop: " in r for r in reasons)
    (said,) = [r for r in reasons if "newton: " in r]
    assert re.search(why, said), said
    assert sum(is_recurrence(n) for n in found.graph.nodes) == 1
    assert_same([x.numpy() for x in found(*inputs(9))], program(*inputs(9)), 0.0)


def test_it_is_never_chosen_unless_asked_for() -> None:
    for target in TARGETS.values():
        program = loop(gru, 1)
        (record,) = run_passes(program, [Lower(target)])
        assert any(" recurrence as loop: " in r for r in record.reasons)


def test_for_tensorrt_no_loop_stands_outside_the_branch() -> None:
    model = export(newton(bounded(), "tensorrt", iterations=2)[0])
    assert [n.op_type for n in model.graph if n.op_type in ("Scan", "Loop", "If")] == ["If"]
    assert sum(n.op_type == "Scan" for n in model.graph.all_nodes()) == 1


def bounded() -> Program:
    class Cell(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, out = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                h = torch.tanh(0.3 * h + x[:, t])
                out.append(h)
            return torch.stack(out, 1)

    return seqc.trace(Cell(), (torch.randn(2, 9, D),), {"x": {0: "batch", 1: torch.export.Dim("sequence", max=64)}})


def test_a_model_compiles_with_the_option_and_says_so() -> None:
    zoo = ALL["para_gru"]
    compiled = seqc.compile(
        zoo.build(),
        zoo.inputs(2, 9, 0),
        dynamic_shapes=zoo.dynamic_shapes,
        options=["lowering.recurrence=newton", "newton.iterations=6", "newton.tolerance=1e-5"],
    )
    reasons: Sequence[str] = [r for p in compiled.report["passes"] if p["name"] == "lower" for r in p["reasons"]]
    assert any("recurrence as newton: Newton's method" in r for r in reasons)
    assert compiled.report["check"]["ok"]
