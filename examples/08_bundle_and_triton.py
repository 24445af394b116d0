"""A streaming model taken to where it runs: as one archive with its runtime, and to a Triton server that keeps its states.

The same by the command line: seqc bundle DIR -o FILE; seqc triton DIR -o REPO
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import seqc
import seqc.runtime
from seqc.deploy.bundle import write_bundle
from seqc.deploy.triton_repository import write_repository
from seqc.deploy.triton_serving import Serving

THERE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])  # or: pip install the wheel; Python can import it as it is
import numpy as np
import seqc.runtime

stream = seqc.runtime.load("artifact").stream()
x = np.load("x.npy")
np.save("y.npy", np.concatenate([stream.step({"x": x[:, a:b]})["output"] for a, b in ((0, 5), (5, 6), (6, 20))], 1))
print("ran by", Path(seqc.runtime.__file__).parents[2].name, "with" if "torch" in sys.modules else "without", "torch")
"""


class Smoothed(nn.Module):
    """A GRU whose outputs are smoothed over time."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.read = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.read(self.gru(x)[0])
        mean, means = torch.zeros_like(y[:, 0]), []
        for t in range(x.shape[1]):
            mean = 0.8 * mean + 0.2 * y[:, t]
            means.append(mean)
        return torch.stack(means, 1)


torch.manual_seed(0)
x = torch.randn(1, 20, 4)
model = Smoothed().eval()
here = Path(tempfile.mkdtemp())
compiled = seqc.compile(model, (x[:, :7].repeat(2, 1, 1),), stateful=True)
artifact = compiled.save(here / "smoothed")

# One archive: the artifact, the runtime as a wheel that needs numpy and onnxruntime only, a README and an example.
print(*write_bundle(artifact, here / "smoothed.zip"), sep="\n")
there = here / "there"
with zipfile.ZipFile(here / "smoothed.zip") as archive:
    archive.extractall(there)
np.save(there / "x.npy", x.numpy())
(wheel,) = there.glob("*.whl")
subprocess.run([sys.executable, "-c", THERE, wheel], cwd=there, check=True)
with torch.no_grad():
    error = np.abs(np.load(there / "y.npy") - model(x).numpy()).max()
print(f"streamed out of the bundle, against PyTorch on the whole sequence: {error:.1e}")
assert error < 1e-5

# A model repository: the server keeps the states of every sequence, and joins requests of several.
folder = write_repository(artifact, here / "repository", Serving("smoothed", max_batch=16))
print((folder / "config.pbtxt").read_text())
print((folder / "README.md").read_text())
