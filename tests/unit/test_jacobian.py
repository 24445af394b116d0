"""Derivatives of a loop's body: equal to torch's, elementwise, of symbolic sizes, and refused where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from seqc.jacobian import NotElementwise, Number, jacobian

Function = Callable[..., tuple[torch.Tensor, ...]]


def body(function: Function, *values: torch.Tensor) -> fx.GraphModule:
    gm = make_fx(function, tracing_mode="fake")(*values)
    gm.graph.eliminate_dead_code()
    return gm


def smooth(h, c, x, w):
    z = torch.sigmoid(w * h + x)
    f = torch.tanh(x + w * c) + F.silu(c * h) + F.softplus(h) + F.gelu(c) + torch.erf(h) * torch.exp(c)
    g = torch.log1p(h * h) + torch.rsqrt(c * c + 1) + torch.pow(h, 3) + torch.addcmul(x, h, c) + torch.lerp(h, x, z)
    return z * h + (1 - z) * f, g + torch.sin(c) / (2 + w * w)


def kinked(h, c, x, w):
    f = torch.maximum(h, x) + torch.relu(c) + F.leaky_relu(h) + c.clamp(-1, 1) + h.abs() + F.elu(c)
    return f, torch.where(h > 0.1, h * x, c / (1 + w * w)) + torch.floor(h)


@pytest.mark.parametrize("function", [smooth, kinked])
def test_derivatives_are_those_of_torch(function: Function) -> None:
    h, c, x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    w = torch.randn(8, generator=torch.Generator().manual_seed(1))
    gm = body(function, h, c, x, w)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    found = jacobian(inputs[:2], gm.graph.output_node().args[0])
    gm.graph.output_node().args = (found.operands,)
    operands = fx.GraphModule({}, gm.graph)(h, c, x, w)
    graph = found.inputs[0].graph
    wanted = [*found.following, *found.entries.values()]
    graph.output(tuple(v.value if isinstance(v, Number) else v for v in wanted))
    results = fx.GraphModule({}, graph)(h, c, *operands)
    expected = list(function(h, c, x, w))
    for i, j in found.entries:

        def alone(v, i=i, j=j):
            return function(*(v if k == j else s for k, s in enumerate((h, c))), x, w)[i]

        expected.append(torch.func.jvp(alone, ((h, c)[j],), (torch.ones_like(h),))[1])
    assert len(found.entries) == 4
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a).expand(5, 8), b)


def test_what_does_not_depend_on_a_state_has_no_entry() -> None:
    gm = body(lambda h, c, x: (torch.tanh(h) + x, c * 0.5 + x), *torch.randn(3, 5, 8))
    states = [n for n in gm.graph.nodes if n.op == "placeholder"][:2]
    found = jacobian(states, gm.graph.output_node().args[0])
    assert set(found.entries) == {(0, 0), (1, 1)}
    assert found.entries[1, 1] == Number(0.5, torch.float32)
    assert not found.is_constant


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda h, x: (h * x + 1,), True),
        (lambda h, x: (torch.sigmoid(x) * h - h / 3,), True),
        (lambda h, x: (h * h,), False),
        (lambda h, x: (torch.where(h > 0, x, h),), False),
    ],
)
def test_affine_steps_have_derivatives_that_read_no_state(function: Function, constant: bool) -> None:
    gm = body(function, *torch.randn(2, 5, 8))
    states = [n for n in gm.graph.nodes if n.op == "placeholder"][:1]
    assert jacobian(states, gm.graph.output_node().args[0]).is_constant is constant


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda h, x: (torch.tanh(h @ x),), "not known to be elementwise"),
        (lambda h, x: (h.cumsum(-1) * x,), "not known to be elementwise"),
        (lambda h, x: (torch.tanh(h.flip(-1)) * x,), "not known to be elementwise"),
        (lambda h, x: (F.hardtanh(h) * x,), "hardtanh_backward"),
    ],
)
def test_what_mixes_elements_or_has_no_derivative_is_refused(function: Function, why: str) -> None:
    gm = body(function, *torch.randn(2, 8, 8))
    states = [n for n in gm.graph.nodes if n.op == "placeholder"][:1]
    with pytest.raises(NotElementwise, match=why):
        jacobian(states, gm.graph.output_node().args[0])
