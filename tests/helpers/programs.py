"""Small builders that tests share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from seqc import _torch
from seqc.frontend.capture import capture
from seqc.frontend.signature import bind
from seqc.ops.recurrence import propagate, recurrence
from seqc.program import Port, Program

Step = Callable[..., Sequence[torch.Tensor]]


def capture_program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    """The Program of one trace of ``model``: axis 0 is the batch and axis 1 the sequence of every input."""
    signature = bind(model.eval(), inputs, None)
    return capture(model, signature, signature.trace_sizes()).program


class _Prologue(nn.Module):
    def __init__(self, carries: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.carries = carries
        self.zero = [not c.any() for c in carries]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = inputs[0].shape[0]
        zeros = [inputs[0].new_zeros(batch, *c.shape, dtype=c.dtype) for c in self.carries]
        starts = [z if zero else z + c for z, zero, c in zip(zeros, self.zero, self.carries, strict=True)]
        return (*starts, *(x.transpose(0, 1) for x in inputs))


def loop_program(
    step: Step,
    xs: Sequence[torch.Tensor],
    carries: Sequence[torch.Tensor] = (),
    weights: Sequence[torch.Tensor] = (),
    reverse: bool = False,
    results: Sequence[int] | None = None,
) -> Program:
    """A Program of one recurrence over the inputs ``xs`` of shape [batch, sequence, ...].

    ``step(*carries, *xs, *weights)`` takes and returns tensors with the batch at axis 0: the next carries, then the ys.
    ``carries`` are the initial values of one row (no batch axis). ``results`` picks the outputs among the final carries
    and the ys (of shape [sequence, batch, ...]); by default all are outputs.
    """
    program = capture_program(_Prologue(carries), *xs)
    first = program.output_nodes
    nodes = [*first, *(program.add_weight(w.detach(), f"w{i}") for i, w in enumerate(weights))]
    for node, weight in zip(nodes[len(first) :], weights, strict=True):
        node.meta["val"] = program.fake_mode.from_tensor(weight.detach(), static_shapes=True)
    count, mode = len(carries), _torch.fake_mode_of(program.graph_module)
    per_step = range(count, len(first))
    with mode, _torch.no_guards(mode.shape_env):
        vals = [n.meta["val"][0] if i in per_step else n.meta["val"] for i, n in enumerate(nodes)]
        body = make_fx(lambda *a: tuple(step(*a)), pre_dispatch=True)(*vals)
    body.graph.eliminate_dead_code()
    program.graph_module.add_submodule("body", body)
    graph, out = program.graph, program.output_node
    with graph.inserting_before(out):
        trip = graph.call_function(torch.ops.aten.sym_size.int, (first[count], 0))
        args = (
            graph.get_attr("body"),
            trip,
            tuple(first[:count]),
            tuple(first[count:]),
            tuple(nodes[len(first) :]),
            reverse,
        )
        loop = graph.call_function(recurrence, args)
        total = len(list(body.graph.output_node().args[0]))
        got = [graph.call_function(operator.getitem, (loop, i)) for i in (range(total) if results is None else results)]
    out.args = (tuple(got),)
    propagate(program.graph_module)
    program.outputs = tuple(
        Port(f"output_{i}", n.meta["val"].dtype, program.shape_of(n.meta["val"])) for i, n in enumerate(got)
    )
    program.graph_module.recompile()
    return program


def equal_at(before: Program, after: Program, sizes: Sequence[tuple[int, int]], *shapes: tuple[int, ...]) -> float:
    """The largest difference of two Programs relative to the outputs' scale, on inputs [batch, sequence, *shape]."""
    worst = 0.0
    for seed, (batch, length) in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(batch, length, *shape, generator=generator) for shape in shapes]
        for a, b in zip(before(*inputs), after(*inputs), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
            if a.numel():
                worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)))
    return worst


def count_ops(gm: fx.GraphModule, op: Any) -> int:
    """How many nodes of one graph, nested bodies not included, call ``op``."""
    return sum(n.target is op for n in gm.graph.nodes)


def body_of(program: Program) -> fx.GraphModule:
    """The body of the only recurrence of a Program."""
    (body,) = [m for m in program.graph_modules() if m is not program.graph_module]
    return body


def dialect_of(program: Program) -> list[str]:
    """The dialect ops and loops of the main graph, in order."""
    names = []
    for node in program.graph.nodes:
        if node.target is recurrence:
            names.append("recurrence")
        elif str(node.target).startswith("seqc."):
            names.append(str(node.target).split(".")[1])
    return names
