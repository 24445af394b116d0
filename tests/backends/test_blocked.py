"""Affine loops without a loop: form ``blocked`` of a recurrence, in ONNX Runtime against a loop in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import pytest
import torch

from seqc.backends.onnx import export
from seqc.compiler import bound
from seqc.errors import UnsupportedOpError
from seqc.lowerings.lower import Lower
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from tests.helpers.onnx import assert_same, run, session
from tests.helpers.programs import loop_program

LENGTHS = (1, 2, 15, 16, 17, 257, 4096)
Tensors = Sequence[torch.Tensor]
Step = Callable[..., Tensors]


@dataclass(frozen=True)
class Case:
    """``step(*carries, *xs, *weights)`` with sizes of one row of each carry and each x; ``decays`` are the xs in [0, 1]."""

    step: Step
    carries: tuple[tuple[int, ...], ...]
    xs: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[int, ...], ...] = ()
    decays: tuple[int, ...] = ()

    def inputs(self, batch: int, length: int) -> list[torch.Tensor]:
        torch.manual_seed(length)
        return [_draw((batch, length, *size), i in self.decays) for i, size in enumerate(self.xs)]

    def constants(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        return [torch.randn(size) for size in self.carries], [torch.randn(size) * 0.3 for size in self.weights]

    def program(self, reverse: bool = False) -> Program:
        carries, weights = self.constants()
        program = loop_program(self.step, self.inputs(2, 5), carries, weights, reverse)
        bound(program, 300)
        return program

    def expected(self, inputs: Tensors, reverse: bool) -> list[torch.Tensor]:
        carries, weights = ([x.double() for x in group] for group in self.constants())
        states = [c.expand(len(inputs[0]), *c.shape) for c in carries]
        ys = []
        steps = range(inputs[0].shape[1])
        for t in reversed(steps) if reverse else steps:
            out = self.step(*states, *(x[:, t].double() for x in inputs), *weights)
            states = list(out[: len(states)])
            ys.append(out[len(states) :])
        ys = ys[::-1] if reverse else ys
        return [x.float() for x in (*states, *(torch.stack(column) for column in zip(*ys, strict=True)))]


def _draw(shape: tuple[int, ...], decay: bool) -> torch.Tensor:
    """Normal, or in [0, 1] with 0, 1e-38 and 1 among them."""
    if not decay:
        return torch.randn(shape)
    extremes = torch.tensor([0.0, 1e-38, 1.0, 1.0])[torch.randint(4, shape)]
    return torch.where(torch.rand(shape) < 0.5, extremes, torch.rand(shape))


def decayed(h, a, x, c):
    h = a * h + x
    return h, (c * h).sum(-1) + torch.tanh(x[..., 0])


def before_update(h, a, x, c):
    return a * h + x, (c * h).sum(-1)


def reset(h, done, x):
    h = torch.where(done > 0.5, 0.0, h)
    h = 0.9 * h + x
    return h, h * x


def complex_pair(re, im, x, a, b):
    a, b = 0.7 * torch.cos(a), 0.7 * torch.sin(b)
    re, im = a * re - b * im + x, a * im + b * re
    return re, im, (re * a - im).sum(-1)


def turning(re, im, angle, decay, x):
    re, im = (
        decay * (torch.cos(angle) * re - torch.sin(angle) * im) + x,
        decay * (torch.cos(angle) * im + torch.sin(angle) * re),
    )
    return re, im, re * im


def dense(h, x, a, b):
    h = h @ a + x @ b
    return h, torch.relu(h)


def dense_by_step(h, x, a):
    h = torch.einsum("bij,bj->bi", 0.4 * a, h) + x
    return h, h.sum(-1)


def kept_and_mixed(h, x, a):
    h = 0.5 * h + torch.einsum("nm,bdm->bdn", a, h) + x.unsqueeze(-1)
    return h, h.amax(-1)


def complex_dense(re, im, x, a, b):
    re, im = re @ a - im @ b + x, im @ a + re @ b
    return re, im, re - im


def delta(s, k, v, q):
    k = torch.nn.functional.normalize(k, dim=-1)
    s = s + k.unsqueeze(-1) * (v - (s * k.unsqueeze(-1)).sum(1)).unsqueeze(1)
    return s, (s * q.unsqueeze(-1)).sum(1)


def liquid(h, x, a, b):
    h = (0.5 * torch.sigmoid(a) + 0.1 * torch.tanh(x) * b) * h + b * x
    return h, torch.logsumexp(h, -1)


def bilinear(h, dt, x, a):
    z = dt * torch.exp(a)
    h = (h - z * h + dt * x) / (z + 1)
    return h, h * 2


def second_depends_on_first(m, h, a, x):
    m = a * m + x
    h = torch.sigmoid(m) * h + torch.tanh(m)
    return m, h, h - m


def delayed(h, last, a, x):
    following = a * h + x
    return following, h, following * last


CASES = {
    "decays": Case(decayed, ((4,),), ((4,), (4,)), ((4,),), (0,)),
    "readout before the update": Case(before_update, ((4,),), ((4,), (4,)), ((4,),), (0,)),
    "resets": Case(reset, ((4,),), ((1,), (4,)), (), (0,)),
    "complex pair": Case(complex_pair, ((4,), (4,)), ((4,),), ((4,), (4,))),
    "complex pair by step": Case(turning, ((4,), (4,)), ((4,), (4,), (4,)), (), (1,)),
    "dense": Case(dense, ((3,),), ((2,),), ((3, 3), (2, 3))),
    "dense by step": Case(dense_by_step, ((3,),), ((3,), (3, 3))),
    "kept and mixed": Case(kept_and_mixed, ((2, 3),), ((2,),), ((3, 3),)),
    "complex dense": Case(complex_dense, ((3,), (3,)), ((3,),), ((3, 3), (3, 3))),
    "rank one, mixed along axis 1": Case(delta, ((3, 2),), ((3,), (2,), (3,))),
    "liquid": Case(liquid, ((4,),), ((4,),), ((4,), (4,))),
    "bilinear": Case(bilinear, ((4,),), ((4,), (4,)), ((4,),), (0,)),
    "second depends on first": Case(second_depends_on_first, ((4,), (4,)), ((4,), (4,)), (), (0,)),
    "delayed": Case(delayed, ((4,), (4,)), ((4,), (4,)), (), (0,)),
}


def loops(model: ir.Model) -> int:
    return sum(node.op_type in ("Loop", "Scan") for node in model.graph.all_nodes())


REVERSED = ("decays", "complex pair by step", "dense")
KINDS = {
    "decays": "affine, each element by itself: blocks",
    "complex pair": "affine, each element by itself, 2 coupled states: blocks",
    "dense": "affine, with elements mixed: blocks",
}


@pytest.mark.parametrize(("name", "reverse"), [*((n, False) for n in CASES), *((n, True) for n in REVERSED)])
def test_blocks_equal_the_loop(name: str, reverse: bool) -> None:
    case = CASES[name]
    program = case.program(reverse)
    (record,) = run_passes(program, [Lower(TARGETS["tensorrt"])])
    assert record.changes == 1 and f"recurrence as blocked: {KINDS.get(name, 'affine')}" in record.reasons[0]
    for length in LENGTHS:
        given = case.inputs(3, length)
        assert_same([x.numpy() for x in program(*given)], case.expected(given, reverse), 2e-5)


@pytest.mark.parametrize(
    ("name", "reverse"),
    [("decays", False), ("resets", False), ("complex pair", False), ("kept and mixed", False), ("delayed", True)],
)
def test_blocks_equal_the_loop_in_onnx_runtime(name: str, reverse: bool) -> None:
    case = CASES[name]
    program = case.program(reverse)
    run_passes(program, [Lower(TARGETS["tensorrt"])])
    model = export(program)
    assert not loops(model)
    compiled = session(model)
    for length in LENGTHS:
        given = case.inputs(3, length)
        assert_same(run(compiled, given), case.expected(given, reverse), 2e-5)


def squared(h, x):
    h = 0.1 * h * h + 0.3 * x
    return h, h


def leaky(h, x):
    h = torch.where(h > 0, 0.9 * h, 0.1 * h) + x
    return h, h


def gated_by_itself(h, x):
    h = torch.sigmoid(h + x) * h + x
    return h, h


def coefficient_of_the_other(h, g, x):
    g = torch.tanh(g * 0.5 + h)
    h = g * h + x
    return h, g, h


def transposed(s, x):
    s = 0.5 * s.transpose(-1, -2) + x.unsqueeze(-1)
    return s, s


def mixed_along_two(s, x, a):
    s = a @ s @ a + x.unsqueeze(-1)
    return s, s


def counted(h, i, x):
    h = 0.5 * h + x * i.unsqueeze(-1)
    return h, i + 1, h


def wide_by_step(h, x, k):
    h = h - k * (h * k).sum(-1, keepdim=True) + x
    return h, h


REFUSED = {
    "a square": (Case(squared, ((4,),), ((4,),)), "a product of the state with itself"),
    "a mask that reads the state": (Case(leaky, ((4,),), ((4,),)), "state"),
    "a gate that reads the state": (Case(gated_by_itself, ((4,),), ((4,),)), "aten.sigmoid.default of the state"),
    "a coefficient that is a state": (Case(coefficient_of_the_other, ((4,), (4,)), ((4,),)), "of the state"),
    "axes that change places": (Case(transposed, ((3, 3),), ((3,),)), "axes change places"),
    "two axes mixed": (Case(mixed_along_two, ((3, 3),), ((3,),), ((3, 3),)), "mixed along 2 axes"),
    "many elements mixed": (Case(wide_by_step, ((24,),), ((24,), (24,))), "24 elements are mixed in each step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_stays_a_loop_with_its_reason(name: str) -> None:
    case, why = REFUSED[name]
    program = case.program()
    before = program.node_count()
    (record,) = run_passes(program, [Lower(TARGETS["tensorrt"])])
    assert record.changes == 0 and "recurrence as loop" in record.reasons[0] and why in record.reasons[0]
    assert program.node_count() == before
    given = case.inputs(3, 17)
    assert_same([x.numpy() for x in program(*given)], case.expected(given, False), 2e-5)
    with pytest.raises(UnsupportedOpError, match=r"blocked: .*state"):
        run_passes(case.program(), [Lower(TARGETS["onnx"], {"recurrence": "blocked"})])


def test_a_count_of_steps_stays_a_loop() -> None:
    carries = [torch.zeros(4), torch.zeros((), dtype=torch.int64)]
    program = loop_program(counted, [torch.randn(2, 5, 4)], carries)
    bound(program, 300)
    (record,) = run_passes(program, [Lower(TARGETS["tensorrt"])])
    assert record.changes == 0 and "holds no real numbers" in record.reasons[0]


def test_without_a_bound_of_the_length_there_are_no_blocks() -> None:
    case = CASES["decays"]
    carries, weights = case.constants()
    program = loop_program(case.step, case.inputs(2, 5), carries, weights)
    with pytest.raises(UnsupportedOpError, match="no upper bound"):
        run_passes(program, [Lower(TARGETS["onnx"], {"recurrence": "blocked"})])


def test_a_target_with_loops_keeps_them() -> None:
    program = CASES["decays"].program()
    (record,) = run_passes(program, [Lower(TARGETS["ort-cpu"])])
    assert record.changes == 0 and "recurrence as loop: " in record.reasons[0]
    assert loops(export(program)) == 1


def test_long_bodies_stay_loops() -> None:
    def long(h, x):
        h = 0.5 * h + x
        return h, functools.reduce(lambda y, _: torch.sin(y), range(300), h)

    (record,) = run_passes(Case(long, ((4,),), ((4,),)).program(), [Lower(TARGETS["tensorrt"])])
    assert record.changes == 0 and "operations in blocks of 16 steps, more than" in record.reasons[0]
