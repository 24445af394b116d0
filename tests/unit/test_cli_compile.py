"""From a saved model of each kind, through the command line, to the source model's numbers at untraced lengths."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from seqc.cli.main import run


class Cell(nn.Module):
    """A GRU cell looped over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 4)
        steps = []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            steps.append(h)
        return torch.stack(steps, 1)


class Mixed(nn.Module):
    """No loop: what torch.export itself keeps dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.proj(x)).cumsum(1)


class Halting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.abs().sum() > 1:
            x = x / 2
        return x


X = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(3))
INPUT = ["--input", "x=float32[batch,seq,3]"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "savedmodels", sys.modules[__name__])
    monkeypatch.chdir(tmp_path)


def save(kind: str, path: str) -> tuple[nn.Module, list[str]]:
    """Save a model; return it and the flags that it is compiled with."""
    torch.manual_seed(0)
    model: nn.Module = Mixed() if kind == "exported" else Cell()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "exported":
            dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=500)}
            torch.export.save(torch.export.export(model, (X,), dynamic_shapes={"x": dims}), path)
            return model, []
        if kind == "torchscript":
            torch.jit.script(model).save(path)
            return model, INPUT
    if kind == "pickle":
        torch.save(model, path)
        return model, [*INPUT, "--allow-pickle"]
    torch.save(model.state_dict(), path)
    return model, [*INPUT, "--entry", "savedmodels:Cell"]


@pytest.mark.parametrize("kind", ["exported", "torchscript", "pickle", "weights"])
def test_compile_run_verify(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, flags = save(kind, "model.pt")
    assert run(["compile", "model.pt", "-o", "art", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["manifest"]["source"]["kind"] == kind and result["report"]["check"]["ok"]

    x = torch.randn(3, 61, 3)
    np.savez("in.npz", x=x.numpy())
    assert run(["run", "art", "--inputs", "in.npz", "-o", "out.npz"]) == 0
    with torch.no_grad():
        expected = model(x).numpy()
    (got,) = np.load("out.npz").values()
    np.testing.assert_allclose(got, expected, atol=1e-5)

    against = [f for f in flags if f not in INPUT]
    assert run(["verify", "art", "--against", "model.pt", *against]) == 0
    assert run(["inspect", "art", "--text"]) == 0
    if kind != "exported":
        assert "onnx_rnn" in capsys.readouterr().out
        model.cell.weight_ih.data.add_(0.5)
        torch.save(model.state_dict(), "other.pt")
        assert run(["verify", "art", "--against", "other.pt", "--entry", "savedmodels:Cell"]) == 1


def test_a_streaming_artifact_is_checked_in_pieces_and_says_its_states(capsys: pytest.CaptureFixture[str]) -> None:
    _, flags = save("exported", "model.pt")
    assert run(["compile", "model.pt", "-o", "art", "--stateful", *flags]) == 0
    out = capsys.readouterr().out
    # of a running sum: what it is, and what rounding took from it
    assert "state   past_key_values.0.recurrent_state  float32[batch, 2, 4]" in out and "taken in random pieces" in out
    assert run(["inspect", "art"]) == 0
    assert "past_key_values.0.recurrent_state" in capsys.readouterr().out


def test_huggingface_directory(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=19, hidden_size=8, state_size=4, num_hidden_layers=1, eos_token_id=0, bos_token_id=0
    )
    model = MambaForCausalLM(config).eval()
    model.save_pretrained("mamba")
    capsys.readouterr()
    assert run(["compile", "mamba", "-o", "art"]) == 0
    out, err = capsys.readouterr()
    assert "logits" in out and "falling back" not in err and "Warning" not in err

    ids = torch.randint(19, (2, 45))
    np.savez("in.npz", input_ids=ids.numpy())
    assert run(["run", "art", "--inputs", "in.npz", "-o", "out.npz"]) == 0
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    np.testing.assert_allclose(np.load("out.npz")["logits"], expected, atol=1e-5)


def test_model_that_cannot_be_compiled_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Halting(), "module.pt")
    assert run(["compile", "module.pt", "-o", "art", *INPUT, "--allow-pickle"]) == 3
    err = capsys.readouterr().err
    assert Path(__file__).name in err and "Traceback" not in err
    assert not Path("art").exists() and not list(Path().glob(".seqc*"))


def test_unrolled_loop_is_fixed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    save("weights", "w.pt")
    flags = [*INPUT, "--entry", "savedmodels:Cell", "--opt", "loops=unroll"]
    assert run(["compile", "w.pt", "-o", "art", *flags]) == 0
    assert "FIXED" in capsys.readouterr().out
    assert run(["run", "art", "--random", "batch=2"]) == 0
    assert "[2, 16, 4]" in capsys.readouterr().out
