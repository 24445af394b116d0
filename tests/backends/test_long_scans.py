"""The cheap forms at 65,536 steps, with decays from 1 down to 1e-38: the error does not grow with the length.

An error is the distance to float64, relative to the largest value up to there: where nothing decays, values add up, grow
like the square root of the number of steps, and absolute errors with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import seqc
from seqc.backends.onnx import export
from seqc.lowerings.lower import Lower
from seqc.pipeline import run_passes
from seqc.target import TARGETS
from tests.backends.test_lowerings import Calls
from tests.helpers.onnx import run, session

ops = torch.ops.seqc
LENGTH, EIGHTHS = 65536, 8
DECAYS = (1.0, 0.9999, 0.5, 1e-38)
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Long:
    """An op: its call, its inputs by length and decay, those with time at axis 0, what it computes, forms to try.

    ``recurrence`` gives decays, updates, the initial state, and the readout of all states.
    """

    function: Callable[..., Tensors]
    inputs: Callable[[int, float], Tensors]
    timed: tuple[int, ...]
    recurrence: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]
    forms: tuple[str, ...]


def linear_inputs(length: int, decay: float) -> Tensors:
    return torch.full((length, 1, 2), decay), torch.randn(length, 1, 2), torch.randn(1, 2)


def selective_inputs(length: int, decay: float) -> Tensors:
    dt = -torch.full((length, 1, 2), decay).log()
    return torch.randn(length, 1, 2), dt, -torch.ones(2, 2), *torch.randn(2, length, 1, 2), torch.randn(1, 2, 2)


def attention_inputs(length: int, decay: float) -> Tensors:
    key = torch.nn.functional.normalize(torch.randn(length, 1, 1, 2), dim=-1)
    logs = torch.full((length, 1, 1, 1), decay).log()
    return torch.randn(length, 1, 1, 2), key, torch.randn(length, 1, 1, 2), torch.randn(1, 1, 2, 2), logs


CASES = {
    "linear_scan": Long(
        ops.linear_scan, linear_inputs, (0, 1), lambda a, b, s: (a, b, s, lambda h: h), ("sequential",)
    ),
    "selective_scan": Long(
        ops.selective_scan,
        selective_inputs,
        (0, 1, 3, 4),
        lambda x, dt, a, b, c, s: (
            (dt[..., None] * a).exp(), x[..., None] * b[:, :, None], s, lambda h: (h * c[:, :, None]).sum(-1)
        ),
        ("channels_last",),
    ),
    "linear_attention": Long(
        lambda q, k, v, s, g: ops.linear_attention(q, k, v, s, g, None),
        attention_inputs,
        (0, 1, 2, 4),
        lambda q, k, v, s, g: (g[..., None].exp(), k[..., None] * v[..., None, :], s, lambda h: (h * q[..., None]).sum(-2)),
        ("chunked", "contrib"),
    ),
}  # fmt: skip


def in_float64(case: Long, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and final state by a plain loop."""
    decay, update, start, readout = case.recurrence(*(x.double() for x in given))
    state, states = start.numpy(), np.empty(torch.broadcast_shapes(decay.shape, update.shape))
    for t, (a, b) in enumerate(zip(decay.numpy(), update.numpy(), strict=True)):
        states[t] = state = a * state + b
    return readout(torch.from_numpy(states)), torch.from_numpy(state)


@pytest.mark.parametrize("op", CASES)
def test_the_error_does_not_grow_with_the_length(op: str, record_property: Callable[[str, object], None]) -> None:
    case = CASES[op]
    sequence = torch.export.Dim("sequence", max=LENGTH)
    example = case.inputs(5, 0.5)
    compiled = {}
    for form in case.forms:
        shapes = [{0: sequence} if i in case.timed else {} for i in range(len(example))]
        program = seqc.trace(Calls(case.function), example, shapes)
        run_passes(program, [Lower(TARGETS["ort-cpu"], {op: form})])
        compiled[form] = session(export(program))
    for decay in DECAYS:
        torch.manual_seed(0)
        given = case.inputs(LENGTH, decay)
        expected, last = in_float64(case, given)
        scale = expected.flatten(1).abs().amax(1).cummax(0).values
        for form, compiled_form in compiled.items():
            found, final = (torch.from_numpy(x).double() for x in run(compiled_form, given))
            errors = ((found - expected).flatten(1).abs().amax(1) / scale).unflatten(0, (EIGHTHS, -1)).amax(1)
            record_property(f"{form}, decay {decay:g}: error by eighth", " ".join(f"{e:.1e}" for e in errors))
            # nan fails too; the rounding errors of 65,536 sums add up to sqrt(65536) * 2^-24 = 1.5e-5 if none decays
            assert errors.max() <= (1.5e-5 if decay > 0.99 else 1e-6), f"{form}, decay {decay}: {errors}"
            assert errors[-1] <= 4 * errors[:2].max(), f"{form}, decay {decay}: {errors}"
            assert (final - last).abs().max() <= 1.5e-5 * max(scale[-1], last.abs().max())
