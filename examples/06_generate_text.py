"""Language models that were really trained write text: their states are derived, the runtime decodes.

The models and their training are in examples/byte_models: plain PyTorch without caches.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

import seqc
import seqc.runtime

sys.path.insert(0, str(Path(__file__).parent / "byte_models"))
from model import trained

PROMPT = "ROMEO.\nMy love, "
COUNT = 48
NAMES = sys.argv[1:] or ["transformer", "mamba", "hybrid"]

for name in NAMES:
    model = trained(name)
    compiled = seqc.compile(model, (torch.randint(256, (1, 9)),), stateful=True)
    session = seqc.runtime.load(compiled.save(Path(tempfile.mkdtemp()) / name))
    memory = session.memory()
    start = time.perf_counter()
    (written,) = session.generate(list(PROMPT.encode()), COUNT)
    seconds = time.perf_counter() - start
    (guessed,) = session.generate(list(PROMPT.encode()), COUNT, speculate=6)
    text = torch.tensor([list(PROMPT.encode())])
    with torch.no_grad():
        for _ in range(COUNT):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    print(f"{name}: {PROMPT}{bytes(written.tolist()).decode(errors='replace')}")
    print(
        f"  states: {memory.fixed} bytes and {memory.per_step} more for each byte of text; {COUNT} bytes in {seconds:.2f} s"
    )
    assert written.tolist() == guessed.tolist() == text[0, -COUNT:].tolist()
    print("  the same as PyTorch's, which read the whole text for each byte, with and without speculation")
