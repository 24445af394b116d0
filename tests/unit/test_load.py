"""Loading: the kind is told from the content, and what the source says about its inputs is kept."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from seqc.errors import LoadError, UnsupportedModelError, UsageError
from seqc.frontend.capture import capture
from seqc.frontend.load import load
from seqc.frontend.signature import bind
from seqc.frontend.trace import trace_signature
from seqc.program import source_line


class Running(nn.Module):
    """A projection, a running sum over the sequence, and a constant that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 3)
        self.two = torch.full((3,), 2.0)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, length, width = x.shape
        flat = self.proj(x.reshape(batch * length, width)).reshape(batch, length, 3)
        return {"y": flat.cumsum(1) * self.two * scale}


class Loop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            total = total + x[:, t]
        return total


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x * 2, x.abs()]
        if x.shape[1] > 5:
            parts.append(x[:, : x.shape[1] // 2].sum(1, keepdim=True).expand_as(x))
        total = torch.zeros_like(x)
        for i, part in enumerate(parts):
            total = total + part * (i + 1)
        return torch.cat([total, torch.full([x.size(0), 1], float(len(parts)))], dim=-1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return x * self.calls


def make() -> Running:
    torch.manual_seed(1)
    return Running()


def misnamed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


def misshapen() -> nn.Module:
    model = Running()
    model.proj = nn.Linear(5, 3)
    return model


def not_a_module() -> int:
    return 3


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
SCALE = torch.tensor([0.5, 2.0]).reshape(2, 1, 1)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loadable", sys.modules[__name__])


def export(path: Path, **kwargs: object) -> Path:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=1, max=64)
    shapes = {"x": {0: batch, 1: length}, "scale": {0: batch}}
    program = torch.export.export(make(), (X, SCALE), dynamic_shapes=kwargs.pop("dynamic_shapes", shapes))
    torch.export.save(program, path)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return export(tmp_path / "model.pt2")


def test_exported_archive_brings_inputs_and_dims(archive: Path) -> None:
    loaded = load(archive)
    assert loaded.kind == "exported"
    assert loaded.example_inputs is not None and list(loaded.example_inputs) == ["x", "scale"]
    assert torch.equal(loaded.example_inputs["x"], X)
    assert loaded.dynamic_shapes is not None
    assert [d.__name__ for d in loaded.dynamic_shapes["x"].values()] == ["batch", "sequence"]
    assert loaded.dynamic_shapes["x"][1].max == 64
    torch.testing.assert_close(loaded.model(x=X, scale=SCALE), make()(X, SCALE))


def test_kind_is_told_from_content_not_from_the_name(archive: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "model.safetensors"
    shutil.copy(archive, renamed)
    assert load(renamed).kind == "exported"


def test_exported_model_stays_dynamic_when_traced_again(archive: Path) -> None:
    loaded = load(archive)
    assert loaded.example_inputs is not None
    signature = bind(loaded.model, loaded.example_inputs, loaded.dynamic_shapes)
    program = capture(loaded.model, signature, signature.trace_sizes()).program
    assert program.outputs[0].name == "y" and program.outputs[0].shape == ("batch", "sequence", 3)
    assert program.dims[1].max == 64
    x = torch.randn(3, 11, 4)
    scale = torch.randn(3, 1, 1)
    torch.testing.assert_close(program(x, scale)[0], make()(x, scale)["y"])
    assert any(Path(__file__).name in source_line(n) for n in program.graph.nodes), "the source lines are lost"


def test_size_exported_as_static_stays_static_and_is_noted(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    loaded = load(export(tmp_path / "static.pt2", dynamic_shapes={"x": {0: batch}, "scale": {0: batch}}))
    assert loaded.dynamic_shapes is not None and list(loaded.dynamic_shapes["x"]) == [0]
    assert "input 'x': axis 1 was exported with the fixed size 5 and keeps it" in loaded.notes
    assert loaded.example_inputs is not None
    signature = bind(loaded.model, loaded.example_inputs, loaded.dynamic_shapes)
    program = capture(loaded.model, signature, signature.trace_sizes()).program
    assert program.inputs[0].shape == ("batch", 5, 4)


def test_pickled_module_needs_permission(tmp_path: Path) -> None:
    for name, legacy in (("zip.pt", False), ("legacy.pt", True)):
        torch.save(make(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(LoadError, match="--allow-pickle") as caught:
            load(tmp_path / name)
        assert "Running" in str(caught.value) and "\n" not in str(caught.value)
        assert load(tmp_path / name, allow_pickle=True).kind == "pickle"


def test_module_written_by_plain_pickle(tmp_path: Path) -> None:
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(make()))
    with pytest.raises(LoadError):
        load(path)
    assert load(path, allow_pickle=True).kind == "pickle"


def test_module_whose_class_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save(make(), path)
    monkeypatch.delitem(sys.modules, __name__)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(LoadError, match="cannot be imported"):
        load(path, allow_pickle=True)


@pytest.mark.parametrize("form", ["zip", "legacy", "checkpoint", "safetensors"])
def test_weights_go_into_the_entry_model(tmp_path: Path, form: str) -> None:
    weights = {k: v + 1 for k, v in make().state_dict().items()}
    path = tmp_path / "weights"
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        value = {"state_dict": weights, "epoch": 3} if form == "checkpoint" else weights
        torch.save(value, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(LoadError, match=r"2 weights \(proj\.\w+, \.\.\.\).*--entry"):
        load(path)
    loaded = load(path, entry="loadable:make")
    assert loaded.kind == "weights"
    assert torch.equal(loaded.model.state_dict()["proj.bias"], weights["proj.bias"])
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("loadable:misnamed", "'0.weight' is missing"),
        ("loadable:misshapen", "'proj.weight' has shape"),
        ("loadable:not_a_module", "returned a int"),
        ("loadable:absent", "AttributeError"),
        ("no_such_module_here:make", "No module named"),
        ("loadable", "pkg.mod:factory"),
    ],
)
def test_entry_that_does_not_fit(tmp_path: Path, entry: str, message: str) -> None:
    torch.save(make().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path / "w.pt", entry=entry)
    assert "\n" not in str(caught.value)


def test_entry_is_refused_for_a_whole_model(archive: Path) -> None:
    with pytest.raises(UsageError, match="--entry goes with"):
        load(archive, entry="loadable:make")


def scripted(path: Path, model: nn.Module, *args: torch.Tensor, trace: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.trace(model, args, strict=False) if trace else torch.jit.script(model)
        module.save(str(path))
    return path


@pytest.mark.parametrize("trace", [False, True])
def test_torchscript_stays_dynamic(tmp_path: Path, trace: bool) -> None:
    loaded = load(scripted(tmp_path / "s.pt", make(), X, SCALE, trace=trace))
    assert loaded.kind == "torchscript" and loaded.example_inputs is None
    examples = {"x": X, "scale": SCALE}
    module = loaded.module(examples)
    signature = bind(module, examples, {"x": {0: "batch", 1: "sequence"}, "scale": {0: "batch"}})
    program = capture(module, signature, signature.trace_sizes()).program
    assert program.outputs[0].shape == ("batch", "sequence", 3)
    x, scale = torch.randn(3, 11, 4), torch.randn(3, 1, 1)
    torch.testing.assert_close(program(x, scale)[0], make()(x, scale)["y"])


def test_torchscript_loop_becomes_a_recurrence(tmp_path: Path) -> None:
    module = load(scripted(tmp_path / "loop.pt", Loop())).module({"x": X})
    program = trace_signature(module, bind(module, {"x": X}, None))
    assert any("recurrence" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(3, 23, 4)
    torch.testing.assert_close(program(x)[0], Loop()(x))


def test_torchscript_branches_lists_and_integers(tmp_path: Path) -> None:
    loaded = load(scripted(tmp_path / "b.pt", Branches(), torch.ones(1)))
    for x in (torch.randn(2, 4), torch.randn(2, 9)):
        module = loaded.module({"x": x})
        torch.testing.assert_close(module(x=x), Branches()(x))


def test_torchscript_that_is_not_understood_is_refused_with_advice(tmp_path: Path) -> None:
    loaded = load(scripted(tmp_path / "c.pt", Counting()))
    with pytest.raises(UnsupportedModelError, match=r"an earlier call left in its attribute 'calls'.*self\.calls \+ 1"):
        loaded.module({"x": X})
    with pytest.raises(UsageError, match="does not accept the example inputs"):
        load(scripted(tmp_path / "s.pt", make())).module({"x": torch.ones(1), "scale": SCALE})


def small_config(**extra: object) -> dict[str, object]:
    return {
        "vocab_size": 23, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, **extra,
    }  # fmt: skip


@pytest.fixture
def huggingface(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**small_config())).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_huggingface_directory(huggingface: Path) -> None:
    loaded = load(huggingface)
    assert loaded.kind == "huggingface" and type(loaded.model).__name__ == "LlamaForCausalLM"
    assert loaded.model.config.use_cache is False and loaded.vocabulary == 23
    assert loaded.example_inputs is not None
    ids = loaded.example_inputs["input_ids"]
    assert ids.shape == (2, 16) and ids.dtype == torch.int64 and int(ids.max()) < 23
    assert loaded.dynamic_shapes == {"input_ids": {0: "batch", 1: "sequence"}}


def test_huggingface_class_comes_from_the_config_and_positions_bound_the_length(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(**small_config())).save_pretrained(tmp_path / "bert")
    loaded = load(tmp_path / "bert")
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    assert loaded.dynamic_shapes is not None and loaded.dynamic_shapes["input_ids"][1].max == 32


def edit(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Net"}}, "auto_map"),
        ({"architectures": ["os"]}, "no model class 'os'"),
        ({"architectures": ["NoSuchModel"]}, "no model class"),
        ({"_attn_implementation": "someone/kernel"}, "downloaded kernel"),
        ({"num_hidden_layers": 2}, "is missing or misshapen"),
        ({"hidden_size": 16}, "transformers cannot load it|misshapen"),
    ],
)
def test_huggingface_config_that_cannot_be_used(huggingface: Path, changes: dict[str, object], message: str) -> None:
    edit(huggingface, **changes)
    with pytest.raises(LoadError, match=message) as caught:
        load(huggingface)
    assert "\n" not in str(caught.value)


def test_huggingface_directory_without_weights(huggingface: Path) -> None:
    (huggingface / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="no weights"):
        load(huggingface)
    torch.save({}, huggingface / "pytorch_model.bin")
    with pytest.raises(LoadError, match="pickled weights"):
        load(huggingface)
    (huggingface / "config.json").write_text("{")
    with pytest.raises(LoadError, match="not valid JSON"):
        load(huggingface)
