"""Voice activity in audio that comes piece by piece: the TorchScript model in the package silero-vad, as a streaming artifact.

The model keeps an LSTM's state and the last 64 samples between its calls. Called frame after frame it can be compiled like any
loop over time: what it keeps becomes the states of the stream, and no caller can forget them.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from silero_vad import load_silero_vad
from torch import nn

import seqc
import seqc.runtime

RATE, FRAME = 16000, 512


class VoiceActivity(nn.Module):
    """Audio [batch, frames, 512] to the probability of speech in each frame [batch, frames]."""

    def __init__(self) -> None:
        super().__init__()
        self.vad = load_silero_vad()

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        self.vad.reset_states()
        return torch.cat([self.vad(frame, RATE) for frame in audio.unbind(1)], 1)


def voice(seconds: float, pitch: float) -> np.ndarray:
    """Something like a voice: harmonics of a gliding pitch under two moving formants, in syllables."""
    t = np.arange(int(seconds * RATE)) / RATE
    hertz = pitch * (1 + 0.1 * np.sin(2 * np.pi * 2.1 * t) + 0.02 * np.sin(2 * np.pi * 5.3 * t))
    low, high = 500 + 250 * np.sin(2 * np.pi * 1.7 * t), 1500 + 600 * np.sin(2 * np.pi * 1.1 * t + 1)
    phase, sound = 2 * np.pi * np.cumsum(hertz) / RATE, np.zeros_like(t)
    for k in range(1, 30):
        loudness = np.exp(-(((k * hertz - low) / 150) ** 2)) + 0.6 * np.exp(-(((k * hertz - high) / 200) ** 2))
        sound += (loudness + 0.05 / k) * np.sin(k * phase)
    return 0.2 * sound * np.clip(1.5 * np.sin(2 * np.pi * 3.5 * t) + 0.6, 0, 1)


random = np.random.default_rng(0)
silence, noise = np.zeros(RATE), 0.2 * random.standard_normal(RATE // 2)
sound = np.concatenate([silence, voice(1.5, 120), silence, noise, silence, voice(1, 210), silence])
sound += 0.003 * random.standard_normal(sound.size)
audio = sound[: sound.size // FRAME * FRAME].reshape(1, -1, FRAME).astype(np.float32)

model = VoiceActivity().eval()
example = (torch.from_numpy(audio[:, 25:34]).repeat(2, 1, 1),)
compiled = seqc.compile(model, example, dynamic_shapes={"audio": {0: "batch", 1: "frames"}}, stateful=True)
directory = compiled.save(Path(tempfile.mkdtemp()) / "voice_activity")
for state in compiled.manifest["states"]:
    print(f"{state['name']} {state['dtype']} {state['shape']}, from {state['initial']}")

session = seqc.runtime.load(directory)
stream, pieces, alone, at = session.stream(), [], [], 0
while at < audio.shape[1]:
    piece = audio[:, at : at + int(random.integers(1, 9))]
    pieces.append(stream.step({"audio": piece})["output"])
    alone.append(session.run({"audio": piece})["output"])  # what one gets who forgets the states
    at += piece.shape[1]
streamed = np.concatenate(pieces, 1)

model.vad.reset_states()
with torch.no_grad():
    package = torch.cat([model.vad(torch.from_numpy(audio[:, i]), RATE) for i in range(audio.shape[1])], 1).numpy()
print("speech, frame by frame:", "".join(" .:-=+*#%@"[int(9.99 * p)] for p in streamed[0]))
print(
    f"{len(pieces)} pieces of 1 to 8 frames; from the package's own probabilities: {abs(streamed - package).max():.1e}"
)
print(f"each piece by itself, without the states: {abs(np.concatenate(alone, 1) - package).max():.1e}")
assert abs(streamed - package).max() < 1e-4 and package.max() > 0.9 and package[:, 90:110].max() < 0.1
