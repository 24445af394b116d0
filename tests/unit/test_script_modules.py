"""TorchScript modules inside a model: traced with their loops, weights and what they keep between calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import UnsupportedModelError
from seqc.ops.recurrence import is_recurrence

D = 4


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: torch.jit.ScriptModule = torch.jit.script(module.eval())
    return result


class Remembering(nn.Module):
    """A cell that keeps its state itself, as voice-activity models do."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)
        self._state = torch.zeros(0)
        self._calls = 0

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        if x.size(-1) != 4:
            raise ValueError("four channels, not {}".format(x.size(-1)))  # noqa: UP032
        if not len(self._state):
            self._state = torch.zeros(x.size(0), 4)
        self._state = self.cell(x, self._state)
        self._calls = self._calls + 1
        return self._state * scale

    @torch.jit.export
    def reset(self) -> None:
        self._state = torch.zeros(0)
        self._calls = 0


class Frames(nn.Module):
    """Calls ``step`` on each frame, after ``begin``."""

    def __init__(
        self,
        cell: nn.Module,
        step: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        begin: Callable[[nn.Module], None] = lambda cell: None,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.step, self.begin = step, begin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.begin(self.cell)
        return torch.stack([self.step(self.cell, frame) for frame in x.unbind(1)], 1)


def reset(cell: nn.Module) -> None:
    cell.reset()


def test_a_scripted_cell_in_a_loop_of_python() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.Sequential(scripted(nn.LSTMCell(D, D)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, c, out = x.new_zeros(x.shape[0], D), x.new_zeros(x.shape[0], D), []
            for t in range(x.shape[1]):
                h, c = self.cells[0](x[:, t], hx=(h, c))
                out.append(h)
            return torch.stack(out, 1)

    model = Loop().eval()
    before = model.cells[0]
    program = seqc.trace(model, (torch.randn(2, 5, D),))
    assert model.cells[0] is before
    assert any(is_recurrence(node) for node in program.graph.nodes)
    assert "cells.0.weight_hh" in program.weight_names.values()
    x = torch.randn(5, 19, D)
    torch.testing.assert_close(program(x)[0], model(x))


def test_what_a_module_keeps_between_its_calls_is_carried() -> None:
    model = Frames(scripted(Remembering()), lambda cell, x: cell(x), reset).eval()
    program = seqc.trace(model, (torch.randn(2, 5, D),))
    assert any(is_recurrence(node) for node in program.graph.nodes)
    x = torch.randn(5, 19, D)
    torch.testing.assert_close(program(x)[0], model(x))
    model.cell.reset()
    torch.testing.assert_close(model.cell(x[:, 0]), program(x[:, :1])[0][:, 0])


def test_submodules_methods_and_defaults_of_a_scripted_module() -> None:
    cell = scripted(Remembering())
    model = Frames(cell, lambda cell, x: cell.cell(x) + cell.cell.weight_hh.sum(), reset).eval()
    program = seqc.trace(model, (torch.randn(2, 5, D),))
    x = torch.randn(3, 8, D)
    torch.testing.assert_close(program(x)[0], model(x))


def test_what_an_earlier_call_left_is_refused_with_its_line() -> None:
    model = Frames(scripted(Remembering()), lambda cell, x: cell(x))
    with pytest.raises(
        UnsupportedModelError, match=r"what an earlier call left in its attribute '_state'.*torch.zeros"
    ) as e:
        seqc.trace(model, (torch.randn(2, 5, D),))
    assert "\n" not in str(e.value)
    assert isinstance(model.cell, torch.jit.ScriptModule)


def test_errors_of_the_script_are_told() -> None:
    model = Frames(scripted(Remembering()), lambda cell, x: cell(x[:, :3]), reset)
    with pytest.raises(UnsupportedModelError, match=r"ValueError: four channels, not 3"):
        seqc.trace(model, (torch.randn(2, 5, D),))
    model = Frames(scripted(Remembering()), lambda cell, x: cell(x, 1.0, 2.0), reset)
    with pytest.raises(UnsupportedModelError, match=r"TypeError: forward\(\) takes x, scale"):
        seqc.trace(model, (torch.randn(2, 5, D),))


def test_one_module_under_two_names_keeps_one_state() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = scripted(Remembering())
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.a.reset()
            return torch.stack([self.a(f) + self.b(f) for f in x.unbind(1)], 1)

    model = Twice().eval()
    program = seqc.trace(model, (torch.randn(2, 5, D),))
    x = torch.randn(3, 8, D)
    torch.testing.assert_close(program(x)[0], model(x))
    assert sum(name.endswith("weight_hh") for name in program.weight_names.values()) == 1
