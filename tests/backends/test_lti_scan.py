"""Every form of ``seqc::lti_scan`` in ONNX Runtime: block sizes, lengths, poles close to the unit circle, decays of 0."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import seqc
import seqc.ops
from seqc.backends.onnx import export
from seqc.errors import UnsupportedOpError
from seqc.lowerings import FORMS
from seqc.lowerings.lower import Lower
from seqc.lowerings.lti_scan import DIRECT, KERNEL_BYTES
from seqc.passes import FoldConstants
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from tests.helpers.onnx import assert_same, run, session

LENGTHS = (1, 2, 15, 16, 17, 257, 4096)
B, D = 2, 3
Tensors = tuple[torch.Tensor, ...]
SYSTEMS = {
    "real": (4, 1, 0.9),
    "complex": (3, 2, 0.99),
    "complex at the unit circle": (3, 2, 1 - 1e-6),
    "dense": (1, 6, 0.999),
    "dense blocks": (2, 5, 0.5),
    "decays of 0 and 1": (4, 1, None),
    "growing": (2, 2, 1.02),
}


class System(nn.Module):
    """Calls the op with weights of its own: rotations times ``radius``, or decays of 0 and 1 where that is None."""

    def __init__(self, name: str, reverse: bool = False, stateful: bool = True) -> None:
        super().__init__()
        m, k, radius = SYSTEMS[name]
        torch.manual_seed(0)
        rotations = torch.linalg.qr(torch.randn(D, m, k, k))[0]
        a = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(D, 1)[..., None, None] if radius is None else radius * rotations
        self.a = nn.Parameter(a)
        self.b, self.c = (nn.Parameter(torch.randn(D, m, k)) for _ in range(2))
        self.d = nn.Parameter(torch.randn(D))
        self.reverse, self.stateful = reverse, stateful

    def forward(self, u: torch.Tensor, state: torch.Tensor) -> Tensors:
        found = torch.ops.seqc.lti_scan(self.a, self.b, self.c, self.d, u, state, self.reverse)
        return tuple(found) if self.stateful else (found[0],)


def inputs(model: System, length: int) -> Tensors:
    torch.manual_seed(length)
    return torch.randn(length, B, D), torch.randn(B, *model.b.shape)


def expected(model: System, given: Tensors) -> Tensors:
    parts = [x.detach().double() for x in (model.a, model.b, model.c, model.d, *given)]
    found = torch.ops.seqc.lti_scan(*parts, model.reverse)
    return tuple(x.float() for x in (found if model.stateful else found[:1]))


def lowered(model: System, form: str, target: str = "onnx", trip: int | None = None) -> Program:
    axes = {1: "batch"} if trip else {0: torch.export.Dim("sequence", max=65536), 1: "batch"}
    program = seqc.trace(model, inputs(model, trip or 5), [axes, {0: "batch"}])
    forced = {} if form == "auto" else {"lti_scan": form}
    record, _ = run_passes(program, [Lower(TARGETS[target], forced), FoldConstants()])
    assert "lti_scan as " in record.reasons[0]
    return program


CONVOLUTIONS = ("direct", "fft")


class FromZeros(System):
    """Without a state of its own; its final one is not read."""

    def forward(self, u: torch.Tensor) -> Tensors:  # type: ignore[override]
        m, k = self.b.shape[1:]
        state = u.new_zeros(u.shape[1], m, D, k).transpose(1, 2) if k == 1 else u.new_zeros(u.shape[1], D, m, k)
        return (torch.ops.seqc.lti_scan(self.a, self.b, self.c, self.d, u, state, self.reverse)[0],)


def from_zeros(model: FromZeros, form: str, most: int) -> tuple[Program, Sequence[str]]:
    """The program in ``form``, for at most ``most`` steps, and the reasons given."""
    forced = {} if form == "auto" else {"lti_scan": form}
    axes = [{0: torch.export.Dim("sequence", max=most), 1: "batch"}]
    program = seqc.trace(model, inputs(model, 5)[:1], axes)
    record, _ = run_passes(program, [Lower(TARGETS["onnx"], forced), FoldConstants()])
    return program, record.reasons


def steps(model: FromZeros, u: torch.Tensor) -> Tensors:
    state = torch.zeros(B, *model.b.shape)
    parts = [x.detach().double() for x in (model.a, model.b, model.c, model.d, u, state)]
    return (torch.ops.seqc.lti_scan(*parts, model.reverse)[0].float(),)


@pytest.mark.parametrize("form", [*CONVOLUTIONS, "auto"])
@pytest.mark.parametrize(
    ("name", "reverse"), [*((name, False) for name in SYSTEMS), ("complex", True), ("dense", True)]
)
def test_a_system_that_starts_from_zeros_may_be_a_convolution(name: str, reverse: bool, form: str) -> None:
    model = FromZeros(name, reverse)
    compiled = session(export(from_zeros(model, form, 300)[0]))
    for length in (1, 2, 15, 16, 17, DIRECT - 1, DIRECT, DIRECT + 1, 300):
        (u, _) = inputs(model, length)
        assert_same(run(compiled, [u]), steps(model, u), 2e-5)


def test_few_steps_from_zeros_are_one_convolution() -> None:
    program, (reason,) = from_zeros(FromZeros("complex"), "auto", 4096)
    assert "lti_scan as chunked: " in reason and f", but direct for at most {DIRECT} steps" in reason
    assert any(weight.shape == (D, 1, DIRECT) for weight in program.weights.values()), "its kernel is a weight"
    assert FoldConstants().small_bytes >= KERNEL_BYTES
    program = lowered(System("complex", stateful=False), "auto")
    assert not any(weight.shape == (D, 1, DIRECT) for weight in program.weights.values()), "it starts from a state"


@pytest.mark.parametrize(
    ("model", "most", "reason"),
    [
        (System("complex", stateful=False), 64, "it starts from a state that may not be zero"),
        (FromZeros("complex"), 65536, "a kernel of more than 2048 steps is too large: give the dimension a bound"),
    ],
)
def test_what_cannot_be_a_convolution_is_refused(model: System, most: int, reason: str) -> None:
    with pytest.raises(UnsupportedOpError, match=reason):
        lowered(model, "direct") if type(model) is System else from_zeros(model, "direct", most)


def test_a_final_state_that_is_read_is_no_convolution() -> None:
    class Ends(FromZeros):
        def forward(self, u: torch.Tensor) -> Tensors:  # type: ignore[override]
            state = u.new_zeros(u.shape[1], *self.b.shape)
            return tuple(torch.ops.seqc.lti_scan(self.a, self.b, self.c, self.d, u, state))

    with pytest.raises(UnsupportedOpError, match="direct: the final state is read"):
        from_zeros(Ends("complex"), "direct", 64)


@pytest.mark.parametrize("form", [form for form in FORMS["lti_scan"] if form not in CONVOLUTIONS])
@pytest.mark.parametrize(
    ("name", "reverse"), [*((name, False) for name in SYSTEMS), ("complex", True), ("dense", True)]
)
def test_every_form_equals_the_reference(name: str, reverse: bool, form: str) -> None:
    model = System(name, reverse)
    compiled = session(export(lowered(model, form)))
    for length in LENGTHS if name != "growing" else LENGTHS[:-1]:
        given = inputs(model, length)
        assert_same(run(compiled, given), expected(model, given), 2e-5)


@pytest.mark.parametrize("trip", [1, 16, 70])
def test_a_fixed_number_of_steps(trip: int) -> None:
    model = System("complex")
    form = "auto" if trip < 16 else "chunked"
    given = inputs(model, trip)
    assert_same(run(session(export(lowered(model, form, trip=trip))), given), expected(model, given), 1e-5)


def test_powers_are_those_of_float64_rounded_once() -> None:
    """Squared in float32, the 4096th power of a rotation by an angle is off by hundreds of roundings."""
    model = System("complex at the unit circle", stateful=False)
    program = lowered(model, "prefix")
    found = [w for w in program.weights.values() if w.shape == model.a.shape]
    exact = torch.linalg.matrix_power(model.a.detach().double(), 4096)
    assert any(torch.equal(w, exact.float()) or (w - exact).abs().max() <= 6e-8 for w in found)
    assert all(w.dtype == torch.float32 for w in program.weights.values() if w.dtype.is_floating_point)


def test_a_target_that_avoids_loops_gets_the_form_without_them() -> None:
    program = lowered(System("complex"), "auto", "tensorrt")
    assert not any(node.op_type in ("Loop", "Scan") for node in export(program).graph.all_nodes())


@pytest.mark.parametrize("trip", [1, 64, 70])
def test_the_form_without_loops_gives_the_state_behind_a_fixed_number_of_steps(trip: int) -> None:
    model = System("complex", reverse=True)
    given = inputs(model, trip)
    compiled = session(export(lowered(model, "prefix", trip=trip)))
    assert_same(run(compiled, given), expected(model, given), 1e-5)


def test_few_steps_are_walked() -> None:
    with pytest.raises(UnsupportedOpError, match="5 steps are no whole chunk"):
        lowered(System("real"), "chunked", trip=5)
