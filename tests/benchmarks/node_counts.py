"""ONNX nodes of seqc's model, and of torch.onnx's, against the example length and against the number of layers.

``python -m tests.benchmarks.node_counts [--skip-torch]``
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

import seqc
from tests.models.onnx_count import op_counts
from tests.models.zoo.base import randomised

VOCABULARY = 61


def mamba(layers: int) -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=layers, use_cache=False
    )
    return randomised(transformers.MambaForCausalLM(config))


def by_seqc(model: nn.Module, ids: torch.Tensor, folder: Path) -> None:
    shapes = {"input_ids": {0: "batch", 1: "sequence"}}
    seqc.compile(model, {"input_ids": ids}, dynamic_shapes=shapes, check=False).save(folder)


def by_torch(model: nn.Module, ids: torch.Tensor, folder: Path) -> None:
    folder.mkdir()
    # Dim objects: for names torch 2.13 raises an error instead of freezing the length of a loop.
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    inputs = {"input_ids": ids}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(folder / "model.onnx")


def report(title: str, export: Callable[[nn.Module, torch.Tensor, Path], None], layers: int, length: int) -> None:
    ids = torch.randint(VOCABULARY, (2, length))
    with tempfile.TemporaryDirectory() as folder:
        export(mamba(layers), ids, Path(folder) / "model")
        nodes = op_counts(Path(folder) / "model" / "model.onnx").total()
    print(f"{title:10s} layers {layers} length {length:3d}: {nodes:6d} nodes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-torch", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    exporters = {"seqc": by_seqc} if options.skip_torch else {"seqc": by_seqc, "torch.onnx": by_torch}
    for title, export in exporters.items():
        for length in (5, 10, 20, 40, 80):
            report(title, export, 2, length)
        for layers in (1, 2, 4, 8):
            report(title, export, layers, 7)


if __name__ == "__main__":
    main()
