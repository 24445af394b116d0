"""One more token after many: a stream of seqc against transformers' own cache, and against reading the whole text anew.

``python -m tests.benchmarks.decode [--positions 64 1024 4096 16384] [--rounds 7] [--only NAME ...]``

All candidates run interleaved in one process on the same two threads; a row shows the median milliseconds of each and how
many times slower than seqc it is. The whole text is read anew up to 1024 tokens only. ``prefill`` is 512 tokens at once.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import seqc
import seqc.runtime
from tests.benchmarks.latency import THREADS, build
from tests.benchmarks.timing import medians
from tests.models.zoo.base import VOCABULARY

NAMES = ("llama", "mamba")
PREFILL, PIECE, LONGEST_ANEW = 512, 512, 1024


def text(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (1, count))


class Cached:
    """The source model with its own cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache: dict[str, Any] = {}

    def read(self, ids: np.ndarray[Any, Any]) -> None:
        out = self.model(input_ids=torch.from_numpy(ids), use_cache=True, **self.cache)
        name = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache_params"
        self.cache = {name: out[name]}


def show(name: str, what: str, times: dict[str, float]) -> None:
    shown = [f"{key} {value * 1e3:.2f} ms ({value / times['seqc']:.2f}x)" for key, value in times.items()]
    print(f"{name}, {what}: {'; '.join(shown)}", flush=True)


def measure(name: str, positions: list[int], rounds: int) -> None:
    model = build(name)
    ids = {"input_ids": torch.from_numpy(text(9))}
    compiled = seqc.compile(
        model, ids, dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}}, stateful=True, check=False
    )
    with tempfile.TemporaryDirectory() as folder:
        session = seqc.runtime.load(compiled.save(Path(folder) / "artifact"))
        prompt, one = text(PREFILL), text(1)
        show(
            name,
            f"prefill of {PREFILL}",
            medians(
                {
                    "seqc": lambda: session.stream().step({"input_ids": prompt}),
                    "transformers": lambda: Cached(model).read(prompt),
                },
                rounds,
            ),
        )
        stream, cached = session.stream(), Cached(model)
        for position in positions:
            while (missing := position - stream.positions[0]) > 0:
                piece = text(min(PIECE, missing))
                stream.step({"input_ids": piece})
                cached.read(piece)
            candidates: dict[str, Callable[[], object]] = {
                "seqc": lambda: stream.step({"input_ids": one}),
                "transformers": lambda cached=cached: cached.read(one),
            }
            if position <= LONGEST_ANEW:
                whole = torch.from_numpy(text(position + 1))
                candidates["whole text"] = lambda whole=whole: model(input_ids=whole, use_cache=False)
            show(name, f"a token after {position}", medians(candidates, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        for name in options.only:
            measure(name, sorted(options.positions), options.rounds)


if __name__ == "__main__":
    main()
