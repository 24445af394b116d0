"""Compile a Mamba whose layers loop over time in Python, check it, save it, and run it at a length never traced."""

import tempfile
import time

import numpy as np
import torch
from transformers import MambaConfig, MambaForCausalLM

import seqc
import seqc.runtime

torch.manual_seed(0)
config = MambaConfig(vocab_size=256, hidden_size=64, state_size=16, num_hidden_layers=2, use_cache=False)
model = MambaForCausalLM(config).eval()

print("compiling a 2-layer Mamba (transformers' own code, with a Python loop over time)")
compiled = seqc.compile(
    model,
    {"input_ids": torch.randint(0, 256, (1, 16))},
    dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}},
    progress=lambda stage, nodes, seconds: print(f"  {stage:<14} {nodes:>5} nodes {seconds:>6.1f} s", flush=True),
)

print("checked against the model, relative to the output's scale:")
for case in compiled.report["check"]["cases"]:
    sizes = ", ".join(f"{name} {size}" for name, size in case["sizes"].items())
    print(f"  {sizes:<24} error {max(output['relative'] for output in case['outputs']):.1e}")

with tempfile.TemporaryDirectory() as folder:
    compiled.save(f"{folder}/mamba")
    session = seqc.runtime.load(f"{folder}/mamba")  # from here on neither torch nor the compiler is needed
    ids = np.random.default_rng(0).integers(0, 256, (3, 1000))
    start = time.perf_counter()
    logits = session.run({"input_ids": ids})["logits"]
    elapsed = time.perf_counter() - start
    with torch.no_grad():
        reference = model(torch.from_numpy(ids)).logits.numpy()
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    print(f"ran batch 3, length 1000 (never traced) in {elapsed:.2f} s: error {error:.1e}")
    assert error < 1e-4
