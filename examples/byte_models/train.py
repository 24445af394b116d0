"""Trains one of the byte-level models: `python examples/byte_models/train.py mamba`. Under an hour on two cores.

The text is fifteen plays by William Shakespeare as Project Gutenberg publishes them, in the public domain; the last one is
kept for validation. Writes weights/NAME.safetensors (float16) and weights/NAME.json with the bits per byte of what was written.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model import SHAPES, WEIGHTS, Mamba, build, trained
from safetensors.torch import save_file

TEXT = Path(__file__).parent / "shakespeare.txt"
LENGTH, BATCH = 256, 4
VALIDATION = 96_000


class Scan(torch.autograd.Function):
    """h[t] = decay[t] * h[t - 1] + x[t] over the first axis, its gradient by hand: autograd's own keeps a node per step."""

    @staticmethod
    def forward(ctx: Any, decay: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = x.clone()
        for t in range(1, len(h)):
            h[t].addcmul_(decay[t], h[t - 1])
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decay, h = ctx.saved_tensors
        grad = grad.clone()
        for t in range(len(h) - 1, 0, -1):
            grad[t - 1].addcmul_(decay[t], grad[t])
        return torch.cat([torch.zeros_like(h[:1]), grad[1:] * h[:-1]]), grad


def scan(
    self: Mamba, x: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """What Mamba.scan computes, several times faster to train."""
    dt, x, b, c = (part.transpose(0, 1) for part in (dt, x, b, c))
    h = Scan.apply(torch.exp(dt[..., None] * decay), (dt * x)[..., None] * b[:, :, None])
    return (h @ c[..., None]).squeeze(-1).transpose(0, 1)


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes to train on and those to validate on, both int64 of rank one."""
    data = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    return data[:-VALIDATION], data[-VALIDATION:]


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, data: torch.Tensor) -> float:
    """Over windows of LENGTH, each read from an empty past."""
    windows = data.reshape(-1, LENGTH)
    losses = [
        F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum") for w in windows.split(32)
    ]
    return float(sum(losses)) / (len(windows) * (LENGTH - 1)) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=1000, help="of 4 windows of 256 bytes")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    Mamba.scan = scan
    train, validation = corpus()
    model = build(arguments.name)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.rate,
        betas=(0.9, 0.95),
    )
    warm = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.05 + 0.475 * (1 + math.cos(math.pi * step / arguments.steps))),
    )
    start, smooth = time.time(), 0.0
    for step in range(arguments.steps):
        at = torch.randint(len(train) - LENGTH, (BATCH,))
        windows = torch.stack([train[i : i + LENGTH + 1] for i in at.tolist()])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49:
            print(
                f"{step + 1} steps, {smooth / math.log(2):.3f} bits per byte, {time.time() - start:.0f} s", flush=True
            )
    seconds = time.time() - start
    WEIGHTS.mkdir(exist_ok=True)
    save_file({k: v.half() for k, v in model.state_dict().items()}, WEIGHTS / f"{arguments.name}.safetensors")
    told = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": arguments.steps,
        "bytes_seen": arguments.steps * BATCH * LENGTH,
        "training_bits_per_byte": round(smooth / math.log(2), 4),
        "validation_bits_per_byte": round(bits_per_byte(trained(arguments.name), validation), 4),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
    }
    (WEIGHTS / f"{arguments.name}.json").write_text(json.dumps(told, indent=2) + "\n")
    print(told)


if __name__ == "__main__":
    main()
