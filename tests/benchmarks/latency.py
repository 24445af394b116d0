"""Latency at one length: seqc's model in ONNX Runtime against torch eager, torch.compile, and torch.onnx's export.

``python -m tests.benchmarks.latency [--length 512] [--rounds 7] [--limit 300] [--only NAME ...]``

All candidates run interleaved in one process on the same two threads; a row shows the median milliseconds of each and
how many times slower than seqc it is. torch.onnx unrolls a loop at the length it exports (its time and size grow with
it), so its export is tried in a process of its own with a time limit; so is the first call of torch.compile, which
unrolls too. Shown as "none in N s" where the limit was reached.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
import transformers
from torch import nn

import seqc
import seqc.runtime
from tests.benchmarks.timing import medians
from tests.models.zoo.base import VOCABULARY, Inputs, floats, randomised, tokens
from tests.models.zoo.recurrent_cells import WIDTH

THREADS = 2
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "use_cache": False}


class LstmCellLoop(nn.Module):
    """Two LSTM cells stacked inside one loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(WIDTH, 128), nn.LSTMCell(128, 128)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(x.shape[0], 128)
        states = [(zeros, zeros) for _ in self.cells]
        outputs = []
        for t in range(x.shape[1]):
            value = x[:, t]
            for i, cell in enumerate(self.cells):
                states[i] = cell(value, states[i])
                value = states[i][0]
            outputs.append(value)
        return torch.stack(outputs, dim=1)


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**_SIZES, state_size=16))


def rwkv() -> nn.Module:
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**_SIZES, context_length=4096))


def llama() -> nn.Module:
    sizes = {
        "intermediate_size": 344,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **sizes))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int, int], Inputs]]] = {
    "mamba": (mamba, tokens()),
    "rwkv": (rwkv, tokens()),
    "lstm_cell_loop": (LstmCellLoop, floats("x", width=WIDTH)),
    "llama": (llama, tokens()),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(MODELS[name][0](), seed=1)


def _shapes(inputs: Inputs) -> dict[str, dict[int, str]]:
    return {name: {0: "batch", 1: "sequence"} for name in inputs}


def export_with_torch(name: str, length: int, path: str) -> None:
    """torch.onnx's export at ``length``, which it freezes for a model that loops."""
    warnings.simplefilter("ignore")
    inputs = MODELS[name][1](1, length, 0)
    program = torch.onnx.export(
        build(name), (), kwargs=inputs, dynamo=True, dynamic_shapes=_shapes(inputs), verbose=False
    )
    assert program is not None
    program.save(path)


def compile_with_torch(name: str, length: int) -> None:
    """The first call of torch.compile, into the cache that the benchmark's own process then reads."""
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        torch.compile(build(name))(**MODELS[name][1](1, length, 0))


def within(seconds: float, work: Callable[..., None], *arguments: object) -> float | None:
    """Run ``work`` in a process of its own; its seconds, or None where it failed or took longer than the limit."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    start = time.perf_counter()
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return time.perf_counter() - start if process.exitcode == 0 else None


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(name: str, length: int, rounds: int, limit: float) -> None:
    model, inputs = build(name), MODELS[name][1](1, length, 0)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    absent = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        small = MODELS[name][1](2, 7, 0)
        seqc.compile(model, small, dynamic_shapes=_shapes(small), check=False).save(Path(folder) / "artifact")
        print(f"{name}: compiled by seqc in {time.perf_counter() - start:.1f} s", flush=True)
        ours = session(Path(folder) / "artifact" / "model.onnx")
        candidates: dict[str, Callable[[], object]] = {
            "seqc": lambda: ours.run(None, arrays),
            "torch eager": lambda: model(**inputs),
        }
        path = Path(folder) / "torch.onnx"
        seconds = within(limit, export_with_torch, name, length, str(path))
        if seconds is None:
            absent.append(f"torch.onnx: none in {limit:.0f} s")
        else:
            print(f"{name}: exported by torch.onnx at length {length} in {seconds:.1f} s", flush=True)
            theirs = session(path)
            candidates["torch.onnx"] = lambda: theirs.run(None, arrays)
        seconds = within(limit, compile_with_torch, name, length)
        if seconds is None:
            absent.append(f"torch.compile: none in {limit:.0f} s")
        else:
            print(f"{name}: first call of torch.compile in {seconds:.1f} s", flush=True)
            compiled = torch.compile(model)
            candidates["torch.compile"] = lambda: compiled(**inputs)
        with torch.no_grad():
            times = medians(candidates, rounds)
    shown = [f"{key} {value * 1e3:.2f} ms ({value / times['seqc']:.2f}x)" for key, value in times.items()]
    print(f"{name}, length {length}: {'; '.join(shown + absent)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=300, help="seconds for torch.onnx and for torch.compile, each")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    for name in options.only:
        measure(name, options.length, options.rounds, options.limit)


if __name__ == "__main__":
    main()
