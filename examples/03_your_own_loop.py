"""Any loop over time: a hand-written recurrent cell that returns all outputs and its last state."""

import torch
from torch import nn

import seqc


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.zeros_like(x[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            z = torch.sigmoid(self.gate(torch.cat([x[:, t], h], dim=-1)))
            h = z * h + (1 - z) * torch.tanh(self.value(x[:, t]))
            outputs.append(h)
        return torch.stack(outputs, dim=1), h


torch.manual_seed(0)
model = Gated(8).eval()
compiled = seqc.compile(model, (torch.randn(2, 10, 8),))
print("\n".join(compiled.program.notes) or "no notes")
print("length 500:", *(tuple(y.shape) for y in compiled(torch.randn(4, 500, 8))))

print("\nthe loop in the IR:")
from seqc.text import text  # noqa: E402

print(text(compiled.program, provenance=False))
