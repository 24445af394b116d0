"""Every form of softmax_scan in ONNX Runtime: against the reference in float64, with extreme scores, decays and states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqc
import seqc.ops
from seqc.backends.onnx import export
from seqc.errors import UnsupportedOpError
from seqc.lowerings import FORMS
from seqc.lowerings.lower import Lower
from seqc.pipeline import run_passes
from seqc.target import TARGETS
from tests.helpers.onnx import assert_same, run, session

softmax_scan = torch.ops.seqc.softmax_scan
SEQUENCE = torch.export.Dim("sequence", max=65536)
LENGTHS = (1, 2, 15, 16, 17, 257, 4096)
B, H, D = 2, 3, 4
INF = float("inf")
Tensors = tuple[torch.Tensor, ...]


class Scan(nn.Module):
    """The maxima, numerators and denominators of all steps and at the end, or only the ratio."""

    def __init__(self, decayed: bool, reverse: bool, ratio: bool = False) -> None:
        super().__init__()
        self.decayed, self.reverse, self.ratio = decayed, reverse, ratio

    def forward(self, score, value, decay, top, numerator, denominator):
        decay = decay if self.decayed else None
        out = softmax_scan(score, value, decay, top, numerator, denominator, self.reverse)
        return (out[1] / out[2],) if self.ratio else out


def inputs(length: int, sizes: tuple[int, ...], kind: str) -> Tensors:
    """Score, value, decay, top, numerator, denominator; scores and their states have ``sizes``."""
    torch.manual_seed(length)
    score, decay = torch.randn(length, B, *sizes), -torch.rand(length, B, *sizes)
    top = torch.randn(B, *sizes)
    if kind == "extreme":
        score = 40 * score
        some = torch.rand(decay.shape)
        decay = torch.where(some < 0.2, -1e30, torch.where(some < 0.4, 0.0, decay))
        top = torch.where(torch.rand(top.shape) < 0.5, -INF, -1e38)
    if kind == "masked":
        score = score.masked_fill(torch.rand(score.shape) < 0.5, -INF)
        top = torch.full_like(top, -INF)
    state = torch.zeros if kind != "plain" else torch.rand
    return score, torch.randn(length, B, H, D), decay, top, state(B, H, D), state(B, *sizes)


def compiled(form: str, module: Scan, sizes: tuple[int, ...], kind: str, constant: bool = False):
    example = list(inputs(5, sizes, kind))
    shapes = [{0: SEQUENCE, 1: "batch"}] * 3 + [{0: "batch"}] * 3
    if constant:
        example[2], shapes[2] = example[2][:1], {1: "batch"}
    program = seqc.trace(module, tuple(example), shapes)
    (record,) = run_passes(program, [Lower(TARGETS["ort-cpu"], {"softmax_scan": form})])
    assert f"softmax_scan as {form}: " in record.reasons[0]
    return session(export(program))


@pytest.mark.parametrize("form", FORMS["softmax_scan"])
@pytest.mark.parametrize("kind", ["plain", "extreme", "masked"])
@pytest.mark.parametrize("sizes", [(H, 1), (H, D)], ids=["per head", "per channel"])
@pytest.mark.parametrize(("decayed", "reverse"), [(True, False), (False, False), (True, True)])
def test_every_form_equals_the_reference(
    form: str, kind: str, sizes: tuple[int, ...], decayed: bool, reverse: bool
) -> None:
    module = Scan(decayed, reverse)
    if form == "contrib" and sizes[-1] != 1:
        with pytest.raises(UnsupportedOpError, match="one score for each head"):
            compiled(form, module, sizes, kind)
        return
    model = compiled(form, module, sizes, kind)
    for length in LENGTHS:
        given = inputs(length, sizes, kind)
        expected = module(*(x.double() for x in given))
        assert_same(run(model, given), [x.float() for x in expected], 2e-5)


@pytest.mark.parametrize("form", FORMS["softmax_scan"])
def test_a_decay_of_one_step_serves_all(form: str) -> None:
    module, sizes = Scan(True, False), (H, 1) if form == "contrib" else (H, D)
    model = compiled(form, module, sizes, "plain", constant=True)
    for length in LENGTHS:
        score, value, decay, *state = inputs(length, sizes, "plain")
        expected = module(*(x.double() for x in (score, value, decay[:1], *state)))
        assert_same(run(model, (score, value, decay[:1], *state)), [x.float() for x in expected], 2e-5)


def test_without_axis_of_heads_it_is_one_head() -> None:
    make = lambda length: [x[..., 0, :] for x in inputs(length, (H, 1), "extreme")]  # noqa: E731
    program = seqc.trace(Scan(True, False), tuple(make(5)), [{0: SEQUENCE, 1: "batch"}] * 3 + [{0: "batch"}] * 3)
    (record,) = run_passes(program, [Lower(TARGETS["ort-cpu"])])
    assert "softmax_scan as contrib: " in record.reasons[0]
    model = session(export(program))
    for length in LENGTHS:
        given = make(length)
        assert_same(run(model, given), [x.float() for x in softmax_scan(*(x.double() for x in given))], 2e-5)


@pytest.mark.parametrize("form", FORMS["softmax_scan"])
def test_only_what_is_read_leaves_the_loop(form: str) -> None:
    module = Scan(False, False, ratio=True)
    example = inputs(5, (H, 1), "plain")
    program = seqc.trace(module, example, [{0: SEQUENCE, 1: "batch"}] * 3 + [{0: "batch"}] * 3)
    run_passes(program, [Lower(TARGETS["ort-cpu"], {"softmax_scan": form})])
    model = export(program)
    scans = [node for node in model.graph if node.op_type == "Scan"]
    assert all(len(node.attributes["body"].value.outputs) <= 5 for node in scans)  # three states, two of them by step
    assert bool(scans) == (form != "prefix")
    given = inputs(257, (H, 1), "plain")
    (expected,) = module(*(x.double() for x in given))
    assert_same(run(session(model), given), [expected.float()], 2e-5)


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_a_logarithm_of_summed_exponentials_needs_no_values(target: str) -> None:
    class LogSum(nn.Module):
        def forward(self, score: torch.Tensor) -> torch.Tensor:
            shape = score.shape[1:]
            top = torch.full(shape, -INF, dtype=score.dtype)
            none = torch.zeros((*shape, 0), dtype=score.dtype)
            state = top.unsqueeze(-1), none, torch.zeros_like(top).unsqueeze(-1)
            values = score.new_zeros((*score.shape, 0))
            tops, _, sums, *_ = softmax_scan(score.unsqueeze(-1), values, None, *state)
            return (tops + sums.log()).squeeze(-1)

    program = seqc.trace(LogSum(), (torch.randn(5, B, H),), [{0: SEQUENCE, 1: "batch"}])
    run_passes(program, [Lower(TARGETS[target])])
    model = session(export(program))
    for length in LENGTHS:
        given = 40 * torch.randn(length, B, H)
        expected = torch.logcumsumexp(given.double(), 0)
        assert_same(run(model, [given]), [expected.float()])
