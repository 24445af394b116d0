"""The ONNX model does not grow with the traced length and grows at most linearly with the number of layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import seqc
from tests.models.onnx_count import op_counts
from tests.models.zoo.base import randomised


class StackedCells(nn.Module):
    """``layers`` LSTM cells, each with a loop over time of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(6, 6) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for cell in self.cells:
            state = (torch.zeros(x.shape[0], 6), torch.zeros(x.shape[0], 6))
            outputs = []
            for t in range(x.shape[1]):
                state = cell(x[:, t], state)
                outputs.append(state[0])
            x = torch.stack(outputs, dim=1)
        return x


def tiny_mamba(layers: int) -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=31, hidden_size=8, state_size=3, num_hidden_layers=layers, use_cache=False
    )
    return transformers.MambaForCausalLM(config)


def nodes(model: nn.Module, inputs: dict[str, torch.Tensor], folder: Path) -> int:
    """Nodes of the compiled model, loop bodies and functions included."""
    shapes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    seqc.compile(randomised(model), inputs, dynamic_shapes=shapes, check=False).save(folder)
    return op_counts(folder / "model.onnx").total()


@pytest.mark.parametrize("length", [5, 40])
def test_node_count_does_not_depend_on_the_example_length(length: int, tmp_path: Path) -> None:
    usual = nodes(StackedCells(1), {"x": torch.randn(2, 9, 6)}, tmp_path / "usual")
    assert nodes(StackedCells(1), {"x": torch.randn(2, length, 6)}, tmp_path / "other") == usual


@pytest.mark.parametrize("family", ["lstm_cells", "mamba"])
def test_node_count_grows_at_most_linearly_with_layers(family: str, tmp_path: Path) -> None:
    counts = []
    for layers in (1, 2, 3):
        if family == "mamba":
            model, inputs = tiny_mamba(layers), {"input_ids": torch.randint(31, (2, 9))}
        else:
            model, inputs = StackedCells(layers), {"x": torch.randn(2, 9, 6)}
        counts.append(nodes(model, inputs, tmp_path / str(layers)))
    assert 0 < counts[2] - counts[1] <= counts[1] - counts[0]
