"""Each rule of seqc.batch gives the stack of what the steps give, at lengths that were not traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from seqc.batch import RULES, Value, over_time
from seqc.emit import Emitter
from seqc.program import Program, flat_args
from seqc.verify import verify
from tests.helpers.programs import body_of, loop_program

aten = torch.ops.aten
W = torch.linspace(-1, 1, 20).reshape(5, 4)

Body = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# x: [batch, 4] and u: [batch, 3, 4] of one step, w: [5, 4] the same in each step
CASES: dict[str, Body] = {
    "broadcast batched of lower rank": lambda x, u, w: x.unsqueeze(1) * u + x.mean(),
    "broadcast with a matrix": lambda x, u, w: x[:, None, :] * w,
    "a vector against a batch": lambda x, u, w: x.sum(0) * u,
    "where and clamp": lambda x, u, w: torch.where(x > 0, x, w[0]).clamp(min=-0.5),
    "linear": lambda x, u, w: F.linear(u, w, w[:, 0]),
    "mm": lambda x, u, w: torch.mm(x, w.t()),
    "addmm": lambda x, u, w: torch.addmm(w[:, 0], x, w.t()),
    "bmm": lambda x, u, w: torch.bmm(u, u.transpose(1, 2)),
    "matmul with a step's matrix": lambda x, u, w: w @ u.transpose(-1, -2),
    "matmul by a vector": lambda x, u, w: u @ w[0],
    "matmul by a step's vector": lambda x, u, w: u @ x.sum(0),
    "matmul of ranks 2 and 3": lambda x, u, w: x @ u.transpose(1, 2),
    "einsum": lambda x, u, w: torch.einsum("bd,bnd,kd->bnk", x, u, w),
    "softmax": lambda x, u, w: u.softmax(1),
    "log_softmax from the end": lambda x, u, w: u.log_softmax(-1),
    "sum over everything": lambda x, u, w: x.sum() + x.mean(),
    "sum over two axes": lambda x, u, w: u.sum((0, -1)),
    "amax, keepdim": lambda x, u, w: u.amax(1, keepdim=True),
    "cumsum over rows": lambda x, u, w: u.cumsum(1),
    "variance": lambda x, u, w: u.var(1, unbiased=False),
    "norm": lambda x, u, w: F.normalize(u, dim=1),
    "select and slice": lambda x, u, w: u[:, 1, 1:3],
    "chunks": lambda x, u, w: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split of axis 0 of a step": lambda x, u, w: w.split([2, 3])[1] + u.transpose(0, 1).split([1, 2])[1][0, :1],
    "unbind": lambda x, u, w: u.unbind(1)[2],
    "cat with a weight": lambda x, u, w: torch.cat([x.sum(0, keepdim=True), w], 0),
    "stack": lambda x, u, w: torch.stack([x, x * 2], 0),
    "stack at the end": lambda x, u, w: torch.stack([x, x * 2], -1),
    "permute": lambda x, u, w: u.permute(2, 0, -2),
    "transpose, t": lambda x, u, w: u.transpose(0, 2) + x.t().unsqueeze(1),
    "view": lambda x, u, w: u.flatten(1) + x.view(-1, 2, 2).flatten(1).repeat(1, 3),
    "expand": lambda x, u, w: x[:, None].expand(-1, 3, -1) * u,
    "expand by a new axis": lambda x, u, w: x.sum(0).expand(3, 4),
    "squeeze": lambda x, u, w: x.unsqueeze(0).squeeze(0),
    "flip and roll": lambda x, u, w: x.flip(1) + x.roll(1, 1),
    "layer_norm": lambda x, u, w: F.layer_norm(u, (4,), w[0], w[1]),
    "rms_norm": lambda x, u, w: F.rms_norm(u, (4,), w[0]),
    "activations": lambda x, u, w: F.silu(x) + F.gelu(x) + F.softplus(x) + F.relu(x) + F.logsigmoid(x),
    "conv1d": lambda x, u, w: F.conv1d(u, w.t()[:, :3, None], padding=0),
    "group_norm": lambda x, u, w: F.group_norm(u, 3),
    "attention": lambda x, u, w: F.scaled_dot_product_attention(u[:, None], u[:, None], u[:, None]),
    "gather": lambda x, u, w: x.gather(1, x.argsort(1)),
    "gather by a weight": lambda x, u, w: x.gather(1, w[:1].argsort(1)),
    "index": lambda x, u, w: u[:, w[:3, 0].argsort()],
    "tril": lambda x, u, w: torch.tril(u),
    "topk": lambda x, u, w: x.topk(2, 1).values,
    "dtype": lambda x, u, w: (x.double() * 2).float() + (x > 0),
    "pad": lambda x, u, w: aten.constant_pad_nd(x, [1, 2], 0.5),
}


def batch_all(program: Program) -> Program:
    """Compute the only y of the loop outside of it, every node of the body by its rule."""
    result = program.copy()
    (loop,) = [n for n in result.graph.nodes if n.target.__class__.__name__ == "function" and n.name == "recurrence"]
    body, trip = body_of(result), loop.args[1]
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    outside = [*((x, True) for x in loop.args[3]), *((w, False) for w in loop.args[4])]
    env = {inner: Value(node, batched) for inner, (node, batched) in zip(inputs, outside, strict=True)}
    sizes = [x for x in result.graph.nodes if x.target is aten.sym_size.int]
    emit = Emitter(result.graph_module)
    with emit.before(loop):
        for node in body.graph.nodes:
            if node.op != "call_function":
                continue
            if isinstance(node.meta["val"], torch.SymInt):
                env[node] = Value(next(s for s in sizes if str(s.meta["val"]) == str(node.meta["val"])), False)
                continue
            look = lambda a: env[a]  # noqa: E731
            args, kwargs = torch.fx.node.map_arg(node.args, look), torch.fx.node.map_arg(node.kwargs, look)
            if any(isinstance(a, torch.fx.Node) and env[a].batched for a in flat_args(node)):
                written = over_time(emit, node, args, kwargs, trip)
                assert written is not None, f"no rule for {node.target}"
                env[node] = Value(written, True)
            else:
                plain = torch.fx.node.map_arg(node.args, lambda a: env[a].node)
                env[node] = Value(emit(node.target, *plain, **node.kwargs), False)
    (y,) = body.graph.output_node().args[0]
    result.output_node.args = ((env[y].node,),)
    result.graph_module.recompile()
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_rule_gives_the_stack_of_the_steps(case: str) -> None:
    step = CASES[case]
    program = loop_program(lambda x, u, w: (step(x, u, w),), [torch.randn(2, 3, 4), torch.randn(2, 3, 3, 4)], (), [W])
    batched = batch_all(program)
    verify(batched)
    for batch, length in ((3, 7), (2, 1), (1, 5), (2, 0)):
        inputs = torch.randn(batch, length, 4), torch.randn(batch, length, 3, 4)
        (expected,), (found,) = program(*inputs), batched(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_operator_without_a_rule_writes_nothing() -> None:
    program = loop_program(lambda x: (torch.linalg.inv(x @ x.t()),), [torch.randn(2, 3, 4)])
    node = next(n for n in body_of(program).graph.nodes if n.op == "call_function" and n.target not in RULES)
    (x,) = [n for n in program.graph.nodes if n.target is aten.transpose.int]
    emit, count = Emitter(program.graph_module), len(program.graph.nodes)
    with emit.before(program.output_node):
        assert over_time(emit, node, (Value(x, True),), {}, 7) is None
    assert len(program.graph.nodes) == count
