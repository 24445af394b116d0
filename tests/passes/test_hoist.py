"""Hoist: what leaves the loop, what stays, and that the numbers stay the same at lengths that were not traced."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from seqc.ops.recurrence import is_recurrence
from seqc.passes.hoist import Hoist
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from seqc.verify import verify
from tests.helpers.programs import body_of, count_ops, equal_at, loop_program

aten = torch.ops.aten
SIZES = [(3, 7), (1, 1), (2, 13), (2, 0)]


def hoisted(program: Program, *shapes: tuple[int, ...], tolerance: float = 1e-5, **options: float) -> Program:
    """The Program after Hoist; valid, and equal to the one before."""
    result = program.copy()
    assert Hoist(**options)(result) > 0
    verify(result)
    assert equal_at(program, result, SIZES, *shapes) <= tolerance
    return result


def loop_text(program: Program) -> list[str]:
    """The lines of the recurrence: head, inputs, body, results."""
    lines = text(program, provenance=False).splitlines()
    start = next(i for i, line in enumerate(lines) if "recurrence(" in line)
    return [line.strip() for line in lines[start : lines.index("}", start)]]


def body_ops(program: Program) -> list[str]:
    return [str(n.target) for n in body_of(program).graph.nodes if n.op == "call_function"]


def lstm(h, c, x, wi, wh, bi, bh, wo):
    i, f, g, o = (F.linear(x, wi, bi) + F.linear(h, wh, bh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h, c, F.linear(h, wo)


@pytest.fixture(scope="module")
def lstm_loop() -> Program:
    weights = [torch.randn(s) for s in ((20, 4), (20, 5), (20,), (20,), (3, 5))]
    return loop_program(lstm, [torch.randn(2, 3, 4)], [torch.zeros(5)] * 2, weights)


def test_projections_of_inputs_and_outputs_become_one_gemm_each(lstm_loop: Program) -> None:
    result = hoisted(lstm_loop, (4,))
    assert count_ops(body_of(lstm_loop), aten.linear.default) == 3
    assert count_ops(body_of(result), aten.linear.default) == 1
    outside = [n for n in result.graph.nodes if n.target is aten.linear.default]
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    assert [str(result.shape_of(n.meta["val"])) for n in outside] == [
        "('sequence', 'batch', 20)",
        "('sequence', 'batch', 3)",
    ]
    assert outside[0] < loop < outside[1]
    assert [line.split(":")[0].split()[0] for line in loop_text(result)[1:6]] == [
        "carry",
        "carry",
        "x",
        "invariant",
        "invariant",
    ]


def test_hoisting_twice_changes_nothing(lstm_loop: Program) -> None:
    result = hoisted(lstm_loop, (4,))
    before = text(result)
    assert Hoist()(result) == 0
    assert text(result) == before


BEFORE = """\
carry %5: f32[batch, 5] = %1
x %6: f32[batch, 4] = %2
invariant %7: f32[4, 5] = @w0
%8: f32[batch, 5] = aten.mul.Tensor(%5, 0.5)
%9: f32[4, 5] = aten.exp(%7)
%10: f32[batch, 5] = aten.matmul(%6, %9)
%11: f32[batch, 5] = aten.add.Tensor(%8, %10)
%12: f32[batch, 5] = aten.relu(%11)
next %11
y %12
"""
AFTER = """\
%4: f32[4, 5] = aten.exp(@w0)
%5: f32[sequence, batch, 5] = aten.matmul(%2, %4)
%6: (f32[batch, 5], f32[sequence, batch, 5]) = recurrence(trip=%3, reverse) {
  carry %7: f32[batch, 5] = %1
  x %8: f32[batch, 5] = %5
  %9: f32[batch, 5] = aten.mul.Tensor(%7, 0.5)
  %10: f32[batch, 5] = aten.add.Tensor(%9, %8)
  next %10
  y %10
}
%11: f32[batch, 5] = %6[0]
%12: f32[sequence, batch, 5] = %6[1]
%13: f32[sequence, batch, 5] = aten.relu(%12)
output output_0 = %11
output output_1 = %13
"""


def test_a_reverse_loop_before_and_after() -> None:
    def step(h, x, w):
        h = h * 0.5 + x @ w.exp()
        return h, h.relu()

    program = loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(5)], [torch.randn(4, 5)], reverse=True)
    result = hoisted(program, (4,))
    assert "\n".join(loop_text(program)[1:]) + "\n" == BEFORE
    assert text(result, provenance=False).endswith(AFTER)


def selective(s, dt, u, b, c, a, d):
    decay = torch.exp(dt[:, :, None] * -torch.exp(a))
    s = decay * s + dt[:, :, None] * b[:, None, :] * u[:, :, None]
    return s, F.silu((s @ c[:, :, None]).squeeze(-1) + d * u)


def selective_loop() -> Program:
    xs = [torch.rand(2, 3, 32), torch.randn(2, 3, 32), torch.randn(2, 3, 16), torch.randn(2, 3, 16)]
    return loop_program(selective, xs, [torch.zeros(32, 16)], [torch.randn(32, 16), torch.randn(32)])


SELECTIVE_SHAPES = ((32,), (32,), (16,), (16,))


def test_outer_products_that_blow_up_memory_stay_in_the_body() -> None:
    result = hoisted(selective_loop(), *SELECTIVE_SHAPES)
    inside = body_ops(result)
    assert inside.count("aten.exp.default") == 1, "exp(dt * A) stays, exp(A) does not depend on the step"
    assert "aten.matmul.default" in inside, "reading the states behind the loop would keep all of them"
    assert "aten.silu.default" not in inside
    assert count_ops(result.graph_module, aten.exp.default) == 1
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    assert all(
        x.meta["val"].dim() <= 4 and x.meta["val"].shape[-1] * x.meta["val"].shape[-2] != 512 for x in loop.args[3]
    )


def test_what_stays_although_it_does_not_read_the_carry_has_a_reason() -> None:
    program = selective_loop()
    (record,) = run_passes(program, [Hoist()])
    assert record.changes > 0
    assert any("stays in the loop: for all steps at once it takes" in reason for reason in record.reasons)
    (again,) = run_passes(program, [Hoist(max_growth=100.0)])
    assert again.reasons == (), "nothing is left to explain, and the reasons of the pass before are not told twice"


def test_max_growth_moves_the_bound() -> None:
    result = hoisted(selective_loop(), *SELECTIVE_SHAPES, max_growth=100.0)
    assert "aten.exp.default" not in body_ops(result) and "aten.matmul.default" not in body_ops(result)


def test_growth_is_counted_from_what_crossed_the_boundary_at_first() -> None:
    """Two steps of growth by 4 are growth by 16: the second stays, in whatever round it is looked at."""

    def step(h, x, w):
        wide = x[:, None, :] * w[:4, None]
        wider = wide[:, :, None, :] * w[:4, None]
        return (h + wider.sum((1, 2)).cos(),)

    program = loop_program(step, [torch.randn(2, 3, 6)], [torch.zeros(6)], [torch.randn(8)])
    result = hoisted(program, (6,), max_growth=4.0)
    assert "aten.sum.dim_IntList" in body_ops(result)
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    assert max(x.meta["val"].shape[1:].numel() // x.meta["val"].shape[1] for x in loop.args[3]) == 24


@pytest.mark.parametrize("reverse", [False, True])
def test_a_carry_that_only_delays_an_input_becomes_an_input(reverse: bool) -> None:
    def step(h, previous, x, mix, w):
        h = h * 0.9 + (previous * mix[0] + x * mix[1]) @ w
        return h, x, h + previous.sum(-1, keepdim=True)

    weights = [torch.randn(2, 4), torch.randn(4, 5)]
    program = loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(5), torch.randn(4)], weights, reverse)
    result = hoisted(program, (4,))
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    assert len(loop.args[2]) == 1
    assert sorted(body_ops(result)) == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_a_carry_passed_on_unchanged_becomes_an_invariant_and_leaves() -> None:
    def step(h, k, x):
        return h + k.exp() * x, k

    result = hoisted(loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(4), torch.randn(4)]), (4,))
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    assert len(loop.args[2]) == 1
    assert body_ops(result) == ["aten.add.Tensor"]


def test_dead_carries_unused_inputs_and_duplicates_go() -> None:
    def step(h, dead, x, unread, w, same):
        return h + (x @ w + x @ same), dead * 2 + x.sum(), h, h

    xs = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    program = loop_program(step, xs, [torch.zeros(5), torch.zeros(1)], [torch.randn(4, 5)] * 2, results=[0, 2, 3])
    (loop,) = [n for n in program.graph.nodes if is_recurrence(n)]
    loop.args = (*loop.args[:4], (loop.args[4][0],) * 2, loop.args[5])
    loop.args = (*loop.args[:3], (loop.args[3][0],) * 2, *loop.args[4:])
    result = hoisted(program, (4,), (4,))
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    assert [len(part) for part in loop.args[2:5]] == [1, 1, 0]
    assert len(loop.meta["val"]) == 2, "the two equal ys are one"
    assert body_ops(result) == ["aten.add.Tensor"]


def test_results_that_are_inputs_or_invariants_are_read_from_outside() -> None:
    def step(h, x, w):
        return h + x, x, w, x * 2

    result = hoisted(
        loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(4)], [torch.randn(3)]), (4,), tolerance=0.0
    )
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    assert len(loop.meta["val"]) == 1


def test_what_reads_only_previous_states_moves_behind() -> None:
    def step(h, x, w):
        return torch.tanh(h + x), (h * x) @ w

    result = hoisted(loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(4)], [torch.randn(4, 9)]), (4,))
    assert sorted(body_ops(result)) == ["aten.add.Tensor", "aten.tanh.default"]


def test_a_step_that_only_maps_its_input_leaves_no_loop() -> None:
    def step(x, w):
        return (F.gelu(x @ w),)

    result = hoisted(loop_program(step, [torch.randn(2, 3, 4)], (), [torch.randn(4, 5)]), (4,))
    assert not any(is_recurrence(n) for n in result.graph.nodes)
    assert not any(m is not result.graph_module for m in result.graph_modules())


def test_work_that_reads_the_carry_stays() -> None:
    def step(h, x, w):
        h = torch.tanh(h @ w + x)
        return h, h

    program = loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(4)], [torch.randn(4, 4)])
    before = text(program)
    assert Hoist()(program) == 0
    assert text(program) == before


def test_an_operator_without_a_rule_stays_with_what_depends_on_it() -> None:
    def step(h, x):
        inverse = torch.linalg.inv_ex(torch.eye(4) + x[:, :, None] * x[:, None, :])[0]
        return (h + (inverse * 2).sum(-1),)

    result = hoisted(loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(4)]), (4,), tolerance=1e-4)
    assert "aten.linalg_inv_ex.default" in body_ops(result) and "aten.mul.Tensor" in body_ops(result)


def test_random_numbers_stay_in_the_body() -> None:
    def step(h, x):
        return (h + torch.bernoulli(x.sigmoid()),)

    program = loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(4)])
    Hoist()(program)
    verify(program)
    assert "aten.bernoulli.default" in body_ops(program)


def test_provenance_follows_the_moved_work(lstm_loop: Program) -> None:
    program = lstm_loop.copy()
    for i, node in enumerate(n for n in body_of(program).graph.nodes if n.target is aten.linear.default):
        node.meta["stack_trace"] = f'File "cell.py", line {i}, in forward\n    linear()'
    Hoist()(program)
    moved = [n for n in program.graph.nodes if n.target is aten.linear.default]
    assert all("cell.py" in n.meta["stack_trace"] for n in moved)


def test_every_result_is_read_once(lstm_loop: Program) -> None:
    result = hoisted(lstm_loop, (4,))
    (loop,) = [n for n in result.graph.nodes if is_recurrence(n)]
    reads = [user.args[1] for user in loop.users if user.target is operator.getitem]
    assert sorted(reads) == sorted(set(reads)) == list(range(len(loop.meta["val"])))
