"""A 24-layer Mamba (hidden 768, state 16, vocabulary 50,280; random weights): compile and check, by stage, and memory.

``python -m tests.benchmarks.big_mamba [--layers 24] [--no-check] [--output DIR]``; the goal is 5 minutes and 10 GB on
two cores. Peak memory is that of this process, as the operating system counts it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers

import seqc


def peak_gb() -> float:
    """The largest resident set of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def show(stage: str, nodes: int, seconds: float) -> None:
    print(f"{stage:28s} {nodes:7d} nodes {seconds:8.1f} s   peak {peak_gb():5.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=50280,
        hidden_size=768,
        state_size=16,
        num_hidden_layers=options.layers,
        use_cache=False,
        # The default of 0.1 makes a chaotic model: eager float32 is then 2e-4 of the scale off eager float64.
        initializer_range=0.02,
    )
    start = time.perf_counter()
    model = transformers.MambaForCausalLM(config).eval()
    parameters = sum(p.numel() for p in model.parameters())
    show(f"build, {parameters / 1e6:.0f} M parameters", 0, time.perf_counter() - start)
    start = time.perf_counter()
    ids = torch.randint(config.vocab_size, (1, 7))
    shapes = {"input_ids": {0: "batch", 1: "sequence"}}
    compiled = seqc.compile(model, {"input_ids": ids}, dynamic_shapes=shapes, check=not options.no_check, progress=show)
    show("all of compile", compiled.program.node_count(), time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        saving = time.perf_counter()
        compiled.save(options.output or Path(folder) / "artifact")
        show("save", 0, time.perf_counter() - saving)
    total = time.perf_counter() - start
    print(f"total {total:.0f} s of 300, peak {peak_gb():.2f} GB of 10: {'within' if total <= 300 else 'OVER'} the goal")


if __name__ == "__main__":
    main()
