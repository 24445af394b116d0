"""Random programs of operations that mix the steps: the derived step form, in any pieces, is the whole sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.program import Program
from tests.helpers.programs import capture_program
from tests.helpers.streams import in_pieces, random_pieces, stream_form

D = 4
NUMBERS = torch.randn(300, generator=torch.Generator().manual_seed(0)) / 2
Block = Callable[[torch.Tensor], torch.Tensor]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    count = math.prod(shape)
    return NUMBERS[seed : seed + count].reshape(shape)


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1])


def back(x: torch.Tensor) -> torch.Tensor:
    return positions(x)[:, None] - positions(x)


@dataclass(frozen=True)
class Convolution:
    size: int
    dilation: int
    groups: int
    spelling: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = numbers(3, D, D // self.groups, self.size)
        reach = self.dilation * (self.size - 1)
        given = {"dilation": self.dilation, "groups": self.groups}
        if self.spelling == "pad around":
            return turned(F.conv1d(turned(x), weight, padding=reach, **given)[..., : x.shape[1]])
        if self.spelling == "zeros in front":
            return turned(F.conv1d(turned(torch.cat([x.new_zeros(x.shape[0], reach, D), x], 1)), weight, **given))
        value = 0.5 if self.spelling == "value in front" else 0.0
        return turned(F.conv1d(F.pad(turned(x), (reach, 0), value=value), weight, **given))


@dataclass(frozen=True)
class Neighbours:
    """Steps before, by one of the ways to shift; means, maxima and products of them."""

    count: int
    value: float
    kind: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        line = F.pad(x, (0, 0, self.count, 0), value=self.value)
        if self.kind == "pad":
            return F.pad(x, (0, 0, self.count, -self.count), value=self.value)
        if self.kind == "pad and slice":
            return line[:, : x.shape[1]]
        if self.kind == "cat":
            return torch.cat([torch.full_like(x[:, :1], self.value), x[:, :-1]], 1)
        if self.kind == "mean":
            return turned(F.avg_pool1d(turned(line), self.count + 1, 1))
        if self.kind == "maximum":
            return turned(F.max_pool1d(turned(line), self.count + 1, 1))
        if self.kind == "unfold":
            return line.unfold(1, self.count + 1, 1).prod(-1)
        return torch.diff(x, dim=1, prepend=torch.zeros_like(x[:, :1]))


@dataclass(frozen=True)
class Running:
    kind: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        counted = (positions(x) + 1)[:, None]
        if self.kind == "maximum":
            return x.cummax(1).values
        if self.kind == "minimum":
            return x.cummin(1).values
        if self.kind == "logsumexp":
            return x.logcumsumexp(1)
        if self.kind == "product":
            return (x.sigmoid() * 0.5 + 0.7).cumprod(1)
        if self.kind == "of the newest":
            return x.cumsum(1) - F.pad(x.cumsum(1), (0, 0, 3, -3))
        return x.cumsum(1) / counted if self.kind == "mean" else turned(turned(x).cumsum(-1)) / counted.sqrt()


@dataclass(frozen=True)
class Attention:
    mask: str
    spelling: str
    width: int
    turns: bool

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        at, before = positions(x), back(x) >= 0
        if self.mask == "window":
            return before & (back(x) < self.width)
        if self.mask == "chunks":
            return before & (at[:, None] // self.width == at // self.width)
        if self.mask == "sinks":
            return before & ((back(x) < self.width) | (at < 2))
        return before & (back(x) % 2 == 0) if self.mask == "every second" else before

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (rotary(x), rotary(x * 0.8), x.tanh()) if self.turns else (x, x * 0.8, x.tanh())
        if self.spelling == "torch":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen(x))
        scores = torch.einsum("btd,bsd->bts", q, k) if self.spelling == "einsum" else q @ k.mT
        if self.mask == "distance":
            scores = scores - 0.2 * back(x)
        if self.spelling == "no softmax":
            return (scores * self.seen(x)) @ v / (positions(x) + 1)[:, None]
        scores = scores.masked_fill(~self.seen(x), float("-inf"))
        if self.spelling == "by hand":
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            return weights @ v / weights.sum(-1, keepdim=True)
        weights = scores.softmax(-1)
        return torch.einsum("bts,bsd->btd", weights, v) if self.spelling == "einsum" else weights @ v


def rotary(x: torch.Tensor) -> torch.Tensor:
    angle = positions(x)[:, None] * torch.tensor([1.0, 0.3])
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def learned(x: torch.Tensor) -> torch.Tensor:
    return x + numbers(0, 64, D)[positions(x)]


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (D,))


def merged(x: torch.Tensor) -> torch.Tensor:
    """The batch and the steps as one axis, and the features as two."""
    return (x.reshape(-1, D) @ numbers(1, D, D)).reshape(x.shape[0], -1, 2, D // 2).flip(2).flatten(2).tanh()


def one_of(*names: str) -> st.SearchStrategy[str]:
    return st.sampled_from(names)


NEAR = st.one_of(
    st.builds(
        Convolution,
        st.integers(1, 4),
        st.integers(1, 3),
        st.sampled_from([1, 2, D]),
        one_of("pad in front", "pad around", "zeros in front", "value in front"),
    ),
    st.builds(
        Neighbours,
        st.integers(1, 3),
        st.sampled_from([0.0, 0.7]),
        one_of("pad", "pad and slice", "cat", "mean", "maximum", "unfold", "difference"),
    ),
)
FAR = st.one_of(
    st.builds(Running, one_of("sum", "mean", "maximum", "minimum", "logsumexp", "product", "of the newest")),
    st.builds(
        Attention,
        one_of("before", "window", "chunks", "sinks", "every second", "distance"),
        one_of("torch", "softmax", "einsum", "by hand", "no softmax"),
        st.integers(2, 5),
        st.booleans(),
    ),
)
EACH = st.sampled_from([rotary, learned, normed, merged])
# Without shrinking: the failing program is printed, and short.
FEW = settings(deadline=None, derandomize=True, phases=(Phase.generate,))


class Stack(nn.Module):
    def __init__(self, blocks: list[Block], residual: bool, last: bool) -> None:
        super().__init__()
        self.blocks, self.residual, self.last = blocks, residual, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x) if self.residual else block(x)
        return x[:, -1] if self.last else x


def check(model: nn.Module, program: Program) -> None:
    program = stream_form(program)
    x = torch.randn(3, 19, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(x)
        scale = whole.abs().max().clamp(min=1.0)
        for pieces in (random_pieces(19), [11, 8]):
            (found,) = in_pieces(program, {"x": x}, pieces)
            assert float((found - whole).abs().max() / scale) < 1e-4


@settings(FEW, max_examples=10)
@given(st.lists(st.one_of(NEAR, FAR, EACH), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_blocks_in_any_order_step_like_the_whole(blocks: list[Block], residual: bool, last: bool) -> None:
    model = Stack(blocks, residual, last).eval()
    check(model, capture_program(model, torch.randn(2, 9, D)))


class Between(nn.Module):
    """One of torch's recurrent layers, or a loop over time, between two blocks."""

    def __init__(self, before: Block, after: Block, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.kind = before, after, kind
        self.layer = getattr(nn, kind)(D, D, num_layers=2, batch_first=True) if kind in LAYERS else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after(self.loop(x) if self.layer is None else self.layer(x)[0])

    def loop(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[0], D)
        peak = h - 1.0
        out = []
        for t in range(x.shape[1]):
            gate = x[:, t].sigmoid()
            if self.kind == "a loop with resets":
                gate = gate * (x[:, t, :1] < 0.8)
            h = gate * h + (1 - gate) * x[:, t]
            if self.kind == "a loop that mixes its state":
                h = (h @ numbers(2, D, D)).tanh()
            peak = torch.maximum(peak * 0.9, h)
            out.append(h - peak if self.kind == "a loop with two states" else h)
        return torch.stack(out, 1)


LAYERS = ("LSTM", "GRU", "RNN")
LOOPS = ("a loop with resets", "a loop that mixes its state", "a loop with two states")


@settings(FEW, max_examples=2)
@given(NEAR, st.one_of(FAR, EACH), one_of(*LAYERS, *LOOPS))
def test_recurrences_between_blocks_step_like_the_whole(before: Block, after: Block, kind: str) -> None:
    model = Between(before, after, kind).eval()
    check(model, seqc.trace(model, (torch.randn(2, 9, D),)))
