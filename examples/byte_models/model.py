"""Byte-level language models in plain PyTorch: a transformer, a Mamba and a hybrid, of about three million parameters.

Written as papers write them: attention over the whole sequence, the state space as a loop over time. Nothing here knows of
caches, states or ONNX.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "weights"

# "a" is a layer of grouped-query attention (Ainslie et al. 2023) and a gated MLP, "m" a Mamba layer (Gu and Dao 2023)
SHAPES = {
    "transformer": ("a" * 12, 128),
    "mamba": ("m" * 12, 192),
    "hybrid": ("mma" * 4, 160),
}


class Attention(nn.Module):
    """Causal self-attention with rotary positions; two heads of keys and values serve four of queries."""

    heads, key_heads = 4, 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = width // self.heads
        self.queries = nn.Linear(width, width, bias=False)
        self.keys = nn.Linear(width, self.key_heads * self.head, bias=False)
        self.values = nn.Linear(width, self.key_heads * self.head, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.queries, self.keys, self.values)
        )
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[2], device=x.device)
        rates = 10000.0 ** (-torch.arange(0, self.head, 2, device=x.device) / self.head)
        angles = positions[:, None] * rates
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mamba(nn.Module):
    """A selective state space behind a causal convolution of four steps, gated."""

    state = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        inner, self.rank = 2 * width, width // 16
        self.inward = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.select = nn.Linear(inner, self.rank + 2 * self.state, bias=False)
        self.step_size = nn.Linear(self.rank, inner)
        self.log_decay = nn.Parameter(torch.arange(1.0, self.state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)
        with torch.no_grad():
            sizes = torch.exp(torch.linspace(-7.0, -2.3, inner))[torch.randperm(inner)]
            self.step_size.bias.copy_(sizes.expm1().log())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.inward(x).chunk(2, dim=-1)
        x = F.silu(self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        rank, b, c = self.select(x).split([self.rank, self.state, self.state], dim=-1)
        y = self.scan(x, F.softplus(self.step_size(rank)), -self.log_decay.exp(), b, c) + self.skip * x
        return self.out(y * F.silu(gate))

    def scan(
        self, x: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> torch.Tensor:
        """Inputs and step sizes [batch, sequence, inner], decay [inner, state], b and c [batch, sequence, state]."""
        h = x.new_zeros(x.shape[0], x.shape[2], self.state)
        outputs = []
        for dt_t, x_t, b_t, c_t in zip(dt.unbind(1), x.unbind(1), b.unbind(1), c.unbind(1), strict=True):
            h = torch.exp(dt_t[..., None] * decay) * h + (dt_t * x_t)[..., None] * b_t[:, None]
            outputs.append((h @ c_t[..., None]).squeeze(-1))
        return torch.stack(outputs, dim=1)


class Layer(nn.Module):
    """Two residual branches where the second is an MLP, or one."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mixer: nn.Module = Attention(width) if kind == "a" else Mamba(width)
        self.mlp = nn.Sequential(nn.RMSNorm(width), GatedMLP(width, 4 * width)) if kind == "a" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm(x))
        return x if self.mlp is None else x + self.mlp(x)


class ByteModel(nn.Module):
    """Bytes ``[batch, sequence]`` to logits of the next byte ``[batch, sequence, 256]``."""

    def __init__(self, layers: str, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList([Layer(kind, width) for kind in layers])
        self.norm = nn.RMSNorm(width)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


def build(name: str) -> ByteModel:
    """One of SHAPES, untrained."""
    return ByteModel(*SHAPES[name])


def trained(name: str) -> ByteModel:
    """One of SHAPES with the weights in the repository, ready to run."""
    model, weights = build(name), WEIGHTS / f"{name}.safetensors"
    if not weights.exists():
        raise SystemExit(f"{name} was not trained yet: python {Path(__file__).parent / 'train.py'} {name}")
    model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    return model.eval()
