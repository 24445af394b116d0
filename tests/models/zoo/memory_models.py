"""Matrix states with correlated keys or several memories, and attention with feedback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.zoo.recurrent_cells import WIDTH, plain

HEADS, SIZE = 2, 8


class CorrelatedDelta(nn.Module):
    """The delta rule (arXiv 2406.06484) or gated delta rule (arXiv 2412.06464) on keys that are nearly parallel.

    Keys are one direction plus a quarter as much of the input's: their mean cosine is 1 / (1 + 1/16) = 0.94.
    """

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.beta = nn.Linear(WIDTH, HEADS)
        self.decay = nn.Linear(WIDTH, HEADS)
        self.register_buffer("common", F.normalize(torch.randn(HEADS, SIZE), dim=-1))
        nn.init.constant_(self.beta.bias, 2.6)  # a writing strength of about 0.93

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        own = F.normalize(self.k(x).unflatten(-1, (HEADS, SIZE)), dim=-1)
        return F.normalize(self.common + own / 4, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v = (layer(x).unflatten(-1, (HEADS, SIZE)) for layer in (self.q, self.v))
        k, beta = self.keys(x), torch.sigmoid(self.beta(x))
        g = F.logsigmoid(self.decay(x)) / 16
        s = x.new_zeros(x.shape[0], HEADS, SIZE, SIZE)
        outputs = []
        for t in range(x.shape[1]):
            if self.gated:
                s = s * torch.exp(g[:, t])[..., None, None]
            error = v[:, t] - torch.einsum("bhkv,bhk->bhv", s, k[:, t])
            s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
            outputs.append(torch.einsum("bhkv,bhk->bhv", s, q[:, t]))
        return torch.stack(outputs, dim=1).flatten(2)


class MixtureOfMemories(nn.Module):
    """Mixture-of-Memories (arXiv 2502.13685) with dense routing: every memory is written and read by its share."""

    def __init__(self, memories: int = 3, size: int = 4) -> None:
        super().__init__()
        self.memories, self.size = memories, size
        self.router = nn.Linear(WIDTH, memories)
        self.q = nn.Linear(WIDTH, size)
        self.k, self.v = (nn.Linear(WIDTH, memories * size) for _ in range(2))
        self.out = nn.Linear(size, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = torch.softmax(self.router(x), dim=-1)
        k, v = (layer(x).unflatten(-1, (self.memories, self.size)) for layer in (self.k, self.v))
        q = self.q(x)
        memory = torch.zeros(x.shape[0], self.memories, self.size, self.size)
        outputs = []
        for t in range(x.shape[1]):
            memory = memory + share[:, t, :, None, None] * (k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2))
            mixed = torch.einsum("bm,bmkv->bkv", share[:, t], memory)
            outputs.append(torch.einsum("bk,bkv->bv", q[:, t], mixed))
        return self.out(torch.stack(outputs, dim=1))


class Sessa(nn.Module):
    """Sessa (arXiv 2604.18580): causal attention f, then (I - gamma A) s = f with A strictly causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.feedback_q, self.feedback_k = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.gain = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        f = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)
        scores = self.feedback_q(x) @ self.feedback_k(x).transpose(1, 2) / WIDTH**0.5
        past = torch.ones(length, length, dtype=torch.bool).tril(-1)
        # The first row has no past: a finite score keeps its softmax defined, and the mask then clears it.
        attention = torch.softmax(scores.masked_fill(~past, -1e9), dim=-1).masked_fill(~past, 0.0)
        feedback = 0.999 * torch.tanh(1 + self.gain(x)) * attention
        return torch.linalg.solve_triangular(-feedback, f, upper=False, unitriangular=True)


MODELS = (
    plain("delta_correlated", CorrelatedDelta, False, note="mean key cosine 0.94"),
    plain("gated_delta_correlated", CorrelatedDelta, True, note="mean key cosine 0.94"),
    plain("mixture_of_memories", MixtureOfMemories, note="3 memories, dense routing"),
    plain("sessa", Sessa, loops=False, note="triangular solve along time"),
)
