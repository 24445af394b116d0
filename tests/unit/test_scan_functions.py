"""autograd Functions that compute a scan are traced as its loop, told by their values; others as they are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import Function

import seqc
from seqc.errors import VerificationError
from seqc.frontend.capture import capture
from seqc.frontend.scan_functions import scans_as_loops
from seqc.frontend.signature import bind
from tests.models.measure import became


def doubling(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A scan along axis 1 in log2(length) steps, in place on copies."""
    a, b, reach = a.clone(), b.clone(), 1
    while reach < b.shape[1]:
        b[:, reach:] += a[:, reach:] * b[:, :-reach].clone()
        a[:, reach:] *= a[:, :-reach].clone()
        reach *= 2
    return b


class Doubling(Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return doubling(a, b)


class InputFirst(Function):
    """The arguments the other way round, and the context set up apart."""

    @staticmethod
    def forward(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return doubling(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...


class DecayAfter(Function):
    """Nearly a scan: the decay meets the input as well."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return doubling(a, a * b)


class Overwriting(Function):
    """A scan that leaves its result in its argument."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(b)
        return b.copy_(doubling(a, b))


class Scan(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function.apply(torch.sigmoid(x), x.flip(-1))
        return result


def replaced(function: Any) -> list[str]:
    model = Scan(function).eval()
    signature = bind(model, (torch.randn(2, 5, 4),), None)
    return capture(model, signature, signature.trace_sizes()).returned.replaced


def test_a_function_with_the_values_of_a_scan_becomes_a_loop() -> None:
    compiled = seqc.compile(Scan(Doubling), (torch.randn(2, 9, 4),))
    assert compiled.report["check"]["ok"]
    assert became(compiled.report) == "linear_scan"
    assert any("Doubling computes h = a * h + b along axis 1" in note for note in compiled.program.notes)


def test_a_function_with_other_values_keeps_its_depth_which_the_check_notices() -> None:
    with pytest.raises(VerificationError, match="branches on a size"):
        seqc.compile(Scan(DecayAfter), (torch.randn(2, 9, 4),))


def test_values_tell_which_argument_decays_and_what_is_no_scan() -> None:
    assert len(replaced(Doubling)) == len(replaced(InputFirst)) == 1
    assert replaced(DecayAfter) == replaced(Overwriting) == []


def test_functions_are_as_before_after_tracing() -> None:
    before = Doubling.forward
    with scans_as_loops([]):
        assert Doubling.forward is not before
        a, b = torch.rand(2, 5, 3), torch.randn(2, 5, 3)
        inside = Doubling.apply(a, b)  # nothing is symbolic here: it runs as it is
    assert Doubling.forward is before
    assert torch.equal(inside, Doubling.apply(a, b))
