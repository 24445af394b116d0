"""Forms chosen by the number of steps: in the graph, or when the model is compiled where the number is known then."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import nn

import seqc
from seqc.backends.onnx import export
from seqc.lowerings.chunked_attention import CHUNK, FEW, FEW_DELTA_STEPS, FEW_STEPS
from seqc.lowerings.lower import Lower
from seqc.memory import peak_activations
from seqc.ops.choose import choice, is_choice
from seqc.ops.recurrence import is_recurrence
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from seqc.text import text
from seqc.verify import verify
from tests.backends.test_lowerings import CASES, Calls, Inputs, Tensors, lowered
from tests.helpers.onnx import assert_same, run, session

LENGTHS = (1, 2, 3, 4, CHUNK - 1, CHUNK, CHUNK + 1, 257)
ops = torch.ops.seqc


def nested(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


@pytest.mark.parametrize(
    ("name", "target", "form", "few"),
    [
        ("linear_attention gated extreme", "onnx", "chunked", FEW_STEPS),
        ("linear_attention linear plain", "onnx", "chunked", FEW_STEPS),
        ("linear_attention delta correlated keys", "onnx", "chunked_delta", FEW_DELTA_STEPS),
    ],
)
def test_a_chunked_form_leaves_short_sequences_to_a_loop(name: str, target: str, form: str, few: int) -> None:
    program, (reason,) = lowered(name, target, "auto")
    assert f"linear_attention as {form}: " in reason and f", but sequential for at most {few} steps" in reason
    _, function, make, _ = CASES[name]
    equal_at_all_lengths(program, function, make)


def equal_at_all_lengths(program: Program, function: Callable[..., Tensors], make: Inputs) -> None:
    verify(program)
    model = export(program)
    assert [node.op_type for node in model.graph].count("If") == 1
    compiled = session(model)
    for length in LENGTHS:
        torch.manual_seed(length)
        given = make(length)
        expected = [x.float() for x in function(*(x.double() for x in given))]
        assert_same(run(compiled, given), expected, 2e-5)
        assert_same([x.numpy() for x in program(*given)], expected, 2e-5)


def shared_keys(length: int) -> Tensors:
    """Of one head for two, with states of more than 64 x 64."""
    q, k = torch.randn(2, length, 1, 1, 80)
    return q, k / 9, torch.randn(length, 1, 2, 64), torch.randn(1, 2, 80, 64), -torch.rand(length, 1, 2, 1)


def gated(*given: torch.Tensor) -> Tensors:
    return tuple(ops.linear_attention(*given, None))


def test_products_of_keys_that_heads_share_are_left_to_the_fused_operator_for_few_steps() -> None:
    dims = [{0: "sequence"}] * 3 + [{}, {0: "sequence"}]
    program = seqc.trace(Calls(gated), shared_keys(5), dims)
    (record,) = run_passes(program, [Lower(TARGETS["ort-cpu"])])
    (reason,) = record.reasons
    assert "linear_attention as chunked: " in reason and f", but contrib for at most {FEW} steps" in reason
    equal_at_all_lengths(program, gated, shared_keys)


def test_a_form_that_is_faster_at_any_length_is_tried_first() -> None:
    program, (reason,) = lowered("linear_attention gated plain", "ort-cpu", "auto")
    assert "linear_attention as contrib: " in reason and "but" not in reason and not choices(program)


def test_a_softmax_scan_of_few_steps_is_one_loop() -> None:
    def call(score: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = score.shape[1:]
        top, none = torch.full(heads, float("-inf")), torch.zeros(heads)
        found = ops.softmax_scan(score, value, None, top, torch.zeros(value.shape[1:]), none)
        return found[1] / found[2], found[3]

    def inputs(length: int) -> tuple[torch.Tensor, ...]:
        return 3 * torch.randn(length, 1, 2, 1), torch.randn(length, 1, 2, 4)

    program = seqc.trace(Calls(call), inputs(5), [{0: "sequence"}] * 2)
    (record,) = run_passes(program, [Lower(TARGETS["ort-cpu"])])
    assert (
        "softmax_scan as contrib: " in record.reasons[0]
        and ", but sequential for at most 10 steps" in record.reasons[0]
    )
    compiled = session(export(program))
    for length in LENGTHS:
        given = inputs(length)
        assert_same(run(compiled, given), call(*given), 2e-6)


def test_one_step_of_a_loop_is_written_without_the_loop() -> None:
    """A choice of its own, so that a single step pays for no Scan."""
    program, _ = lowered("linear_attention gated plain", "onnx", "auto")
    (node,) = choices(program)
    chosen = choice(node)
    assert chosen.most == 1 and not any(is_recurrence(n) for n in chosen.short.graph.nodes)
    (inner,) = [n for n in chosen.long.graph.nodes if is_choice(n)]
    assert choice(inner).most == FEW_STEPS and any(is_recurrence(n) for n in choice(inner).short.graph.nodes)


def test_where_there_may_be_no_steps_none_is_written_by_itself() -> None:
    """A step that is not there cannot be read, and a convolution of no steps fails in ONNX Runtime."""

    class Later(nn.Module):
        """Two scans behind the first step, which there always is."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList([torch.rand(16, 3, 1, 1), torch.randn(16, 3, 1), torch.randn(16, 3, 1)])
            self.d = nn.Parameter(torch.randn(16))

        def forward(self, x: torch.Tensor) -> Tensors:
            u, none = x[1:], x.new_zeros(x.shape[1], 16, 3, 1)
            y = ops.lti_scan(*self.parts, self.d, u, none)[0]
            q = u.unsqueeze(2)
            return y, ops.linear_attention(q, q, q, x.new_zeros(x.shape[1], 1, 16, 16), None, None)[0]

    def inputs(length: int) -> Tensors:
        return (torch.randn(length, 2, 16),)

    model = Later()
    program = seqc.trace(model, inputs(5), [{0: "sequence", 1: "batch"}])
    (record,) = run_passes(program, [Lower(TARGETS["onnx"])])
    assert not any("direct" in reason for reason in record.reasons)
    assert [choice(node).most for node in choices(program)] == [FEW_STEPS]
    compiled = session(export(program))
    for length in LENGTHS:
        (x,) = inputs(length)
        assert_same(run(compiled, [x]), model(x), 2e-4)


@pytest.mark.parametrize(("length", "form"), [(5, "LinearAttention"), (1, "LinearAttention"), (2 * CHUNK + 3, "Scan")])
def test_a_length_that_is_known_is_decided_at_compile_time(length: int, form: str) -> None:
    given = shared_keys(length)
    program = seqc.trace(Calls(gated), given, [{}] * 5)
    run_passes(program, [Lower(TARGETS["ort-cpu"])])
    operators = nested(export(program))
    assert {"If", "LinearAttention", "Scan"} & set(operators) == {form}
    assert_same(run(session(export(program)), given), [x.float() for x in gated(*(x.double() for x in given))], 2e-5)


def test_a_single_step_is_written_without_a_loop() -> None:
    _, function, make, _ = CASES["linear_scan extreme reverse"]
    given = make(1)
    program = seqc.trace(Calls(function), given, [{1: "batch"}, {1: "batch"}, {0: "batch"}])
    run_passes(program, [Lower(TARGETS["onnx"])])
    assert not any(is_recurrence(node) for node in program.graph.nodes)
    assert_same(run(session(export(program)), given), function(*given), 1e-6)


def test_a_form_that_is_asked_for_is_taken_at_every_length() -> None:
    program, (reason,) = lowered("linear_attention gated plain", "ort-cpu", "chunked")
    assert "but" not in reason and not choices(program)


def test_faster_forms_that_refuse_give_way_to_the_next() -> None:
    """contrib has no float64."""
    _, function, make, _ = CASES["linear_attention gated plain"]
    given = tuple(x.double() for x in make(5))
    program = seqc.trace(Calls(function), given, [{0: "sequence"}] * 3 + [{}] + [{0: "sequence"}] * 2)
    (record,) = run_passes(program, [Lower(TARGETS["ort-cpu"])])
    assert "chunked: " in record.reasons[0] and f"but sequential for at most {FEW_STEPS} steps" in record.reasons[0]
    assert_same(run(session(export(program)), given), function(*given), 1e-12)


def test_bodies_hold_no_weights_and_are_printed_and_counted() -> None:
    program, _ = lowered("linear_attention gated plain", "onnx", "auto")
    (node,) = choices(program)
    chosen = choice(node)
    for body in chosen.bodies:
        assert not list(body.parameters()) and not list(body.buffers())
    printed = text(program)
    assert "choose(%" in printed and f" <= {FEW_STEPS}) {{" in printed and "} else {" in printed
    assert peak_activations(program, {"sequence": 1024, "batch": 1}).bytes > 0
    broken = program.copy()
    (node,) = choices(broken)
    node.args = (*node.args[:4], node.args[4][1:])
    with pytest.raises(Exception, match=r"values, .* are given"):
        verify(broken)


def choices(program: Program) -> list:
    return [node for node in program.graph.nodes if is_choice(node)]
