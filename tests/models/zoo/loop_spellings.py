"""The same kind of recurrence in every spelling of a loop over time that seqc promises to understand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.zoo.base import ZooModel, floats, randomised

WIDTH = 6
HIDDEN = 5
CHUNK = 4

DYNAMIC = {"x": {0: "batch", 1: "sequence"}}


class _Loop(nn.Module):
    """A tanh cell h' = tanh(W x + U h) that the spellings below run over x: [batch, sequence, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(WIDTH, HIDDEN)
        self.u = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.w(x) + self.u(h))

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], HIDDEN)


class InPlaceOutput(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], x.shape[1], HIDDEN)
        h = self.start(x)
        for t in range(x.shape[1]):
            h = self.step(x[:, t], h)
            out[:, t] = h
        return out


class PaddedBuffer(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], x.shape[1] + 1, HIDDEN)
        for t in range(x.shape[1]):
            h[:, t + 1] = self.step(x[:, t], h[:, t])
        return h[:, 1:]


class Unbind(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for xt in x.unbind(1):
            h = self.step(xt, h)
            out.append(h)
        return torch.stack(out, 1)


class EnumerateUnbind(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.start(x)
        out = torch.zeros(x.shape[0], x.shape[1], HIDDEN)
        for t, xt in enumerate(x.unbind(1)):
            h = self.step(xt, h)
            out[:, t, :] = h
        return out


class Split(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x).unsqueeze(1), []
        for xt in x.split(1, dim=1):
            h = self.step(xt, h)
            out.append(h)
        return torch.cat(out, dim=1)


class TimeFirst(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for xt in x.transpose(0, 1):
            h = self.step(xt, h)
            out.append(h)
        return torch.stack(out).transpose(0, 1)


class SliceAppendCat(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1]):
            h = self.step(x[:, t : t + 1].squeeze(1), h)
            out.append(h[:, None])
        return torch.cat(out, 1)


class GrowingCat(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.start(x)
        out = torch.zeros(x.shape[0], 0, HIDDEN)
        for t in range(x.shape[1]):
            h = self.step(x[:, t], h)
            out = torch.cat([out, h.unsqueeze(1)], dim=1)
        return out


class IndexSelect(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1]):
            h = self.step(x.select(1, t), h)
            out += [h]
        return torch.stack(out, dim=-1).permute(0, 2, 1)


class Reversed(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1] - 1, -1, -1):
            h = self.step(x[:, t], h)
            out.append(h)
        return torch.stack(out[::-1], dim=1)


class ReversedNotRestored(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in reversed(range(x.shape[1])):
            h = self.step(x[:, t], h)
            out.append(h)
        return torch.stack(out, dim=1)


class NegativeIndex(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(1, x.shape[1] + 1):
            h = self.step(x[:, -t], h)
            out.append(h)
        return torch.stack(out, dim=1)


class Strided(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(0, x.shape[1], 2):
            h = self.step(x[:, t], h)
            out.append(h)
        return torch.stack(out, dim=1)


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ahead, self.back = nn.GRUCell(WIDTH, HIDDEN), nn.GRUCell(WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        h = torch.zeros(x.shape[0], HIDDEN)
        ahead, back = [], [h] * length
        for t in range(length):
            h = self.ahead(x[:, t], h)
            ahead.append(h)
        h = torch.zeros(x.shape[0], HIDDEN)
        for t in reversed(range(length)):
            h = self.back(x[:, t], h)
            back[t] = h
        return torch.cat([torch.stack(ahead, 1), torch.stack(back, 1)], dim=-1)


class PeeledFirst(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.w(x[:, 0]))
        out = [h]
        for t in range(1, x.shape[1]):
            h = self.step(x[:, t], h)
            out.append(h)
        return torch.stack(out, 1)


class PeeledLast(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1] - 1):
            h = self.step(x[:, t], h)
            out.append(h)
        out.append(self.w(x[:, -1]) + self.u(h))
        return torch.stack(out, 1)


class Branch(_Loop):
    """``if t == 0`` in the loop: a peeled first step in another spelling."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = None, []
        for t in range(x.shape[1]):
            h = torch.tanh(self.w(x[:, t])) if h is None else self.step(x[:, t], h)
            out.append(h)
        return torch.stack(out, 1)


class SeveralCarries(nn.Module):
    """A tanh cell, its running maximum, and a cumulative mean fed back into the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(WIDTH + HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = torch.zeros(x.shape[0], HIDDEN)
        top, mean = torch.full_like(h, -1.0), torch.zeros_like(h)
        out = []
        for t in range(x.shape[1]):
            h = torch.tanh(self.w(torch.cat([x[:, t], mean], dim=-1)) - 0.3 * h)
            top = torch.maximum(top, h)
            mean = 0.8 * mean + 0.2 * top
            out.append(h + mean)
        return torch.stack(out, 1), top, mean


class TwoLayers(nn.Module):
    """Two recurrent layers one after the other, each with a loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(WIDTH, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for cell in self.cells:
            h, out = torch.zeros(x.shape[0], HIDDEN), []
            for t in range(x.shape[1]):
                h = cell(x[:, t], h)
                out.append(h)
            x = torch.stack(out, dim=1)
        return x


class LayersInside(nn.Module):
    """A loop over time with the loop over layers inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            [nn.LSTMCell(WIDTH, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(x.shape[0], HIDDEN)
        states = [(zeros, zeros) for _ in self.cells]
        out = []
        for t in range(x.shape[1]):
            value = x[:, t]
            for i, cell in enumerate(self.cells):
                states[i] = cell(value, states[i])
                value = states[i][0]
            out.append(value)
        return torch.stack(out, dim=1)


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.linear = nn.Linear(WIDTH + HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.linear(torch.cat([x, self.norm(h)], -1)))


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.update, self.reset = _Gate(), _Gate()
        self.candidate = nn.Sequential(nn.Linear(WIDTH + HIDDEN, 7), nn.GELU(), nn.Linear(7, HIDDEN))

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        h = state["h"]
        z = self.update(x, h)
        new = torch.tanh(self.candidate(torch.cat([x, self.reset(x, h) * h], -1)))
        h = torch.lerp(h, new, z)
        return h, {"h": h}


class NestedCells(nn.Module):
    """Cells made of modules made of modules, the state in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = _Cell()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"h": torch.zeros(x.shape[0], HIDDEN)}
        out = []
        for t in range(x.shape[1]):
            y, state = self.cell(x[:, t], state)
            out.append(y)
        return {"y": torch.stack(out, dim=1), "last": state["h"]}


class LastOnly(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.start(x)
        for t in range(x.shape[1]):
            h = self.step(x[:, t], h)
        return h


class BeforeUpdate(_Loop):
    """Its outputs are the states before each update."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1]):
            out.append(h)
            h = self.step(x[:, t], h)
        return torch.stack(out, dim=1)


class TwoBack(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, h, out = self.start(x), self.start(x), []
        for t in range(x.shape[1]):
            before, h = h, torch.tanh(self.w(x[:, t]) + self.u(h) - 0.5 * before)
            out.append(h)
        return torch.stack(out, 1)


class PreviousInput(_Loop):
    """Reads x[:, t] and x[:, t - 1], a zero before the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out, last = self.start(x), [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = self.step(x[:, t] - 0.5 * last, h)
            last = x[:, t]
            out.append(h)
        return torch.stack(out, 1)


class PaddedChunks(_Loop):
    """Pads to a multiple of CHUNK, reshapes, and carries one state per chunk."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        v = F.pad(self.w(x), (0, 0, 0, -length % CHUNK))
        chunks = v.reshape(x.shape[0], -1, CHUNK, HIDDEN)
        h, out = self.start(x), []
        for i in range(chunks.shape[1]):
            out.append(chunks[:, i].cumsum(1) + self.u(h).unsqueeze(1))
            h = torch.tanh(h * 0.5 + chunks[:, i].mean(1))
        return torch.cat(out, dim=1)[:, :length]


class RaggedChunks(_Loop):
    """Chunks by slicing, the last one ragged; its state is decayed by its own length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        v = self.w(x)
        h, out = self.start(x), []
        for start in range(0, length, CHUNK):
            part = v[:, start : min(start + CHUNK, length)]
            out.append(part.cumsum(dim=1) + h.unsqueeze(1))
            h = torch.tanh(0.5 * h + part.sum(dim=1))
        return torch.cat(out, dim=1)


class _Chunks(_Loop):
    """A state per chunk; each spelling below cuts the sequence into chunks in its own way."""

    def chunk(self, part: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return part.cumsum(dim=1) + h.unsqueeze(1), torch.tanh(0.5 * self.u(h) + part.mean(dim=1))


class SplitChunks(_Chunks):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, out = self.start(x), []
        for part in self.w(x).split(CHUNK, dim=1):
            y, h = self.chunk(part, h)
            out.append(y)
        return torch.cat(out, dim=1), h


class WideChunks(_Chunks):
    """Wider than the example is long."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, h, out = self.w(x), self.start(x), []
        for start in range(0, x.shape[1], 24):
            y, h = self.chunk(v[:, start : start + 24], h)
            out.append(y)
        return torch.cat(out, dim=1)


class WhileChunks(_Chunks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, h, out, start = self.w(x), self.start(x), [], 0
        while start < x.shape[1]:
            y, h = self.chunk(v[:, start : start + 3], h)
            out.append(y)
            start += 3
        return torch.cat(out, dim=1)


class ChunkWrites(_Chunks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, h = self.w(x), self.start(x)
        out = torch.empty_like(v)
        for start in range(0, x.shape[1], CHUNK):
            out[:, start : start + CHUNK], h = self.chunk(v[:, start : start + CHUNK], h)
        return out


class LastChunkState(_Chunks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, h = self.w(x), self.start(x)
        for start in range(0, x.shape[1], 8):
            _, h = self.chunk(v[:, start : start + 8], h)
        return h


class WholeChunksOnly(_Chunks):
    """length // 4 chunks; what is left over passes through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, h, out, count = self.w(x), self.start(x), [], x.shape[1] // CHUNK
        for i in range(count):
            y, h = self.chunk(v[:, CHUNK * i : CHUNK * (i + 1)], h)
            out.append(y)
        return torch.cat([*out, v[:, CHUNK * count :]], dim=1)


class InnerConstant(_Loop):
    """Three fixed-point iterations within every time step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1]):
            z = h
            for _ in range(3):
                z = torch.tanh(self.w(x[:, t]) + self.u(z) + 0.3 * h)
            h = z
            out.append(h)
        return torch.stack(out, dim=1)


class NoReads(_Loop):
    """Decodes as many steps as x is long from the mean of x; the steps read no input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = torch.tanh(self.w(x.mean(dim=1))), []
        for _ in range(x.shape[1]):
            h = torch.tanh(self.u(h) + 0.1)
            out.append(h)
        return torch.stack(out, dim=1)


class While(_Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out, t = self.start(x), [], 0
        while t < x.shape[1]:
            h = self.step(x[:, t], h)
            out.append(h)
            t += 1
        return torch.stack(out, 1)


class Zip(_Loop):
    """Two inputs of one length, zipped; the second only weighs the step."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for xt, yt in zip(x.unbind(1), y.unbind(1), strict=True):
            weight = torch.sigmoid(yt.mean(-1, keepdim=True))
            h = weight * h + (1 - weight) * self.step(xt, h)
            out.append(h)
        return torch.stack(out, 1)


class Masked(_Loop):
    """A step that keeps the old state where the input is negative: a mask instead of a branch on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1]):
            h = torch.where(x[:, t, :1] > 0, self.step(x[:, t], h), h)
            out.append(h)
        return torch.stack(out, 1)


class StepIndex(_Loop):
    """Uses the step index as a number: it enters the arithmetic linearly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = self.start(x), []
        for t in range(x.shape[1]):
            h = self.step(x[:, t] + 0.01 * t, h)
            out.append(h)
        return torch.stack(out, 1)


class FixedSteps(_Loop):
    """A loop of constant trip count over the whole sequence: it must stay as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.w(x)
        for _ in range(4):
            h = h + torch.tanh(self.u(h)).mean(dim=1, keepdim=True)
        return h


def _spelling(
    name: str, make: Callable[[], nn.Module], note: str = "", loops: bool = True, two: bool = False
) -> ZooModel:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomised(make())

    inputs = floats("x", "y", width=WIDTH) if two else floats("x", width=WIDTH)
    shapes = {**DYNAMIC, "y": DYNAMIC["x"]} if two else DYNAMIC
    return ZooModel(f"loop_{name}", "pytorch", build, inputs, shapes, loops=loops, note=note)


MODELS = (
    _spelling("in_place_output", InPlaceOutput, "out[:, t] = h"),
    _spelling("padded_buffer", PaddedBuffer, "h[:, t + 1] = f(h[:, t])"),
    _spelling("unbind", Unbind),
    _spelling("enumerate_unbind", EnumerateUnbind),
    _spelling("split", Split),
    _spelling("time_first", TimeFirst, "for xt in x.transpose(0, 1)"),
    _spelling("slice_append_cat", SliceAppendCat),
    _spelling("growing_cat", GrowingCat, "out = cat([out, h])"),
    _spelling("select_stack_last", IndexSelect, "stacked on the last axis"),
    _spelling("reversed", Reversed),
    _spelling("reversed_not_restored", ReversedNotRestored),
    _spelling("negative_index", NegativeIndex, "x[:, -t]"),
    _spelling("strided", Strided, "every second step"),
    _spelling("bidirectional", Bidirectional, "writes back[t]"),
    _spelling("peeled_first", PeeledFirst),
    _spelling("peeled_last", PeeledLast),
    _spelling("none_at_first", Branch, "h is None at the first step"),
    _spelling("several_carries", SeveralCarries),
    _spelling("two_layers", TwoLayers),
    _spelling("layers_inside", LayersInside),
    _spelling("nested_cells", NestedCells, "state in a dict"),
    _spelling("last_only", LastOnly, "only the last state"),
    _spelling("before_update", BeforeUpdate, "states before the update"),
    _spelling("two_back", TwoBack, "reads h[t-2]"),
    _spelling("previous_input", PreviousInput, "reads x[t-1]"),
    _spelling("padded_chunks", PaddedChunks, "pad, reshape, ceil(L/4) steps"),
    _spelling("ragged_chunks", RaggedChunks, "range(0, L, 4), last chunk ragged"),
    _spelling("split_chunks", SplitChunks, "split(4), last chunk ragged, state returned"),
    _spelling("wide_chunks", WideChunks, "chunks of 24"),
    _spelling("while_chunks", WhileChunks, "while, chunks of 3"),
    _spelling("chunk_writes", ChunkWrites, "out[:, i:i+4] = ..."),
    _spelling("last_chunk_state", LastChunkState, "only the last state of chunks of 8"),
    _spelling("whole_chunks_only", WholeChunksOnly, "L // 4 chunks and a rest"),
    _spelling("inner_constant", InnerConstant, "3 inner iterations"),
    _spelling("no_reads", NoReads, "h = f(h), L times"),
    _spelling("while", While),
    _spelling("zip", Zip, two=True),
    _spelling("masked", Masked),
    _spelling("step_index", StepIndex, "adds 0.01 t"),
    _spelling("fixed_steps", FixedSteps, "constant trip count", loops=False),
)
