"""FuseFlips: which flips of time become the direction of a scan, and which stay."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
import seqc.ops
from seqc.passes import DEFAULT
from seqc.passes.fuse_flips import FuseFlips
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text

ops = torch.ops.seqc
WIDTH = 4
Forward = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


class Model(nn.Module):
    """``forward(self, x [B, T, WIDTH], y [B, T, WIDTH])`` with weights to use."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.gate, self.update = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = forward

    def forward(self, x: torch.Tensor, y: torch.Tensor):
        return self.function(self, x, y)


def scan(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of decays and updates [B, T, WIDTH] the states, and the final one."""
    states, final = ops.linear_scan(a.transpose(0, 1), b.transpose(0, 1), torch.zeros_like(b[:, 0]))
    return states.transpose(0, 1), final


def fused(forward: Forward) -> tuple[Program, int, list[str]]:
    torch.manual_seed(0)
    program = seqc.trace(Model(forward), (torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH)))
    before = program.copy()
    (record,) = run_passes(program, [FuseFlips()])
    for batch, length in ((1, 1), (3, 13)):
        given = torch.randn(2, batch, length, WIDTH)
        for old, new in zip(before(*given), program(*given), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)
    return program, record.changes, list(record.reasons)


def flips(program: Program) -> int:
    return text(program).count("aten.flip")


def projected(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = x.flip(1)
    return F.silu(scan(m.gate(z).sigmoid(), m.update(z))[0]).flip(1) + x


def split_in_heads(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    a, b = torch.cat([x.flip(1), m.gate(x).flip(1)], -1).view(*x.shape[:2], 2, WIDTH).unbind(2)
    return scan(a.softmax(-1), b * b.mean(-1, keepdim=True))[0].flip(1)


def two_inputs(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return scan(x.flip(1).sigmoid(), y.flip(1) * m.gate.weight[0])[0].flip(1)


def only_the_final_state(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = x.flip(1)
    return scan(z.sigmoid(), z)[1]


@pytest.mark.parametrize("forward", [projected, split_in_heads, two_inputs, only_the_final_state])
def test_a_scan_between_flips_walks_from_the_end(forward: Forward) -> None:
    program, changes, (reason,) = fused(forward)
    assert changes == 1
    assert flips(program) == 0
    assert "walks time the other way" in reason
    assert "True)" in next(line for line in text(program).splitlines() if "seqc.linear_scan" in line)


def test_before_and_after() -> None:
    def forward(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        time = x.transpose(0, 1).flip(0)
        return ops.linear_scan(time.exp(), time, x[:, 0])[0].flip(0)

    program, _, _ = fused(forward)
    steps = [line.split("  #")[0] for line in text(program).splitlines() if line.startswith("%") and "sym" not in line]
    assert steps == [
        f"%0: f32[sequence, batch, {WIDTH}] = aten.transpose.int(%x, 0, 1)",
        f"%1: f32[sequence, batch, {WIDTH}] = aten.exp(%0)",
        f"%2: f32[batch, {WIDTH}] = aten.select.int(%x, 1, 0)",
        f"%3: (f32[sequence, batch, {WIDTH}], f32[batch, {WIDTH}]) = seqc.linear_scan(%1, %0, %2, True)",
        f"%4: f32[sequence, batch, {WIDTH}] = %3[0]",
    ]


def one_operand(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return scan(x.flip(1).sigmoid(), y)[0].flip(1)


def another_axis(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = x.flip(2)
    return scan(z.sigmoid(), z)[0].flip(2)


def not_flipped_back(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = x.flip(1)
    return scan(z.sigmoid(), z)[0]


def read_beside(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = x.flip(1)
    return scan(z.sigmoid(), z)[0].flip(1) + z


def mixed_with_other_steps(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.flip(1) + y
    return scan(z.sigmoid(), z)[0].flip(1)


def summed_up_over_time(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = x.flip(1).cumsum(1)
    return scan(z.sigmoid(), z)[0].flip(1)


def state_from_a_step(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = x.flip(1).transpose(0, 1)
    return ops.linear_scan(z.sigmoid(), z, z[0])[0].flip(0)


def convolved(m: Model, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    z = F.conv1d(x.flip(1).transpose(1, 2), m.gate.weight.unsqueeze(-1)).transpose(1, 2)
    return scan(z.sigmoid(), z)[0].flip(1)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (one_operand, "seqc.linear_scan.default .* reads other steps in their order"),
        (another_axis, "seqc.linear_scan.default .* reads other steps in their order"),
        (not_flipped_back, "output at .* is the output"),
        (read_beside, "aten.add.Tensor .* reads other steps in their order"),
        (mixed_with_other_steps, None),
        (summed_up_over_time, None),
        (state_from_a_step, "aten.select.int .* acts along the steps"),
        (convolved, None),
    ],
)
def test_flips_stay(forward: Forward, why: str | None) -> None:
    """``why`` None: no scan is reached from the flips."""
    program, changes, reasons = fused(forward)
    assert changes == 0
    assert flips(program) > 0
    assert len(reasons) == (why is not None)
    assert all(re.search(why or "", reason) for reason in reasons)


class Bidirectional(nn.Module):
    """Two loops over time with weights of their own, the second over the flipped sequence, twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for forwards, backwards in (self.cells[:2], self.cells[2:]):
            x = x + self.walk(forwards, x) + self.walk(backwards, x.flip(1)).flip(1)
        return x

    def walk(self, cell: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate, update = cell(x).chunk(2, -1)
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.sigmoid(gate[:, t]) * h + update[:, t]
            out.append(h)
        return torch.stack(out, 1)


def test_bidirectional_layers_compile_without_flips() -> None:
    compiled = seqc.compile(Bidirectional(), (torch.randn(2, 9, WIDTH),))
    assert [r["changes"] for r in compiled.report["passes"] if r["name"] == "fuse_flips"] == [2]
    assert FuseFlips() in DEFAULT
