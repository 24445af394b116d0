"""Files that are damaged or hostile: one clear line, and nothing of theirs is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seqc.errors import LoadError, SeqcError
from seqc.frontend.load import load

MARK = "executed"


class Hostile:
    """Unpickling this creates the file ``executed`` in the current directory."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARK,)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARK).exists(), "code of the file was executed"


def refuses(path: Path, match: str | None = None, **kwargs: Any) -> str:
    with pytest.raises(SeqcError, match=match) as caught:
        load(path, **kwargs)
    text = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in text and len(text) < 500 and str(path) in text
    return text


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.two = torch.full((2,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * self.two * x.shape[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    torch.export.save(torch.export.export(Doubling(), (torch.ones(2, 3, 2),), dynamic_shapes=shapes), path)
    return path


def rewritten(source: Path, target: Path, **edits: Callable[[bytes], bytes]) -> Path:
    """A copy of a zip archive, the members whose name ends in a key edited (``__`` is ``/``, ``_dot_`` is ``.``)."""
    wanted = {name.replace("__", "/").replace("_dot_", "."): edit for name, edit in edits.items()}
    seen = set()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            for end, edit in wanted.items():
                if name.endswith(end):
                    data = edit(data)
                    seen.add(end)
            new.writestr(name, data)
        root = old.namelist()[0].partition("/")[0]
        for end in set(wanted) - seen:
            new.writestr(f"{root}/{end}", wanted[end](b""))
    return target


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_json(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return edit


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"w": h}, lambda h: [torch.ones(1), h]])
def test_pickles_that_run_code(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    value = wrap(Hostile())
    torch.save(value, tmp_path / "zip.pt")
    torch.save(value, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for protocol in range(2, 6):
        (tmp_path / f"plain{protocol}").write_bytes(pickle.dumps(value, protocol))
    for name in ("zip.pt", "legacy.pt", *(f"plain{p}" for p in range(2, 6))):
        refuses(tmp_path / name)
        refuses(tmp_path / name, entry="collections:OrderedDict")
    (tmp_path / "old_protocol").write_bytes(pickle.dumps(value, 0))
    refuses(tmp_path / "old_protocol", "not a model file")


def test_environment_cannot_switch_the_protection_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Hostile(), tmp_path / "x.pt")
    refuses(tmp_path / "x.pt", "mkdir.*--allow-pickle")
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_the_test_payload_would_run(tmp_path: Path) -> None:
    torch.save(Hostile(), tmp_path / "x.pt")
    with pytest.raises(LoadError, match="holds neither"):
        load(tmp_path / "x.pt", allow_pickle=True)
    (tmp_path / MARK).rmdir()


def test_untouched_archive_loads(exported: Path) -> None:
    loaded = load(exported)
    assert loaded.example_inputs is not None
    assert loaded.model(**loaded.example_inputs).shape == (2, 3, 2)


@pytest.mark.parametrize("name", ["data__sample_inputs__model_dot_pt", "data__weights__model_dot_pt"])
def test_archive_with_a_hostile_pickle_inside(exported: Path, tmp_path: Path, name: str) -> None:
    path = rewritten(exported, tmp_path / "h.pt2", **{name: lambda _: saved((Hostile(), {}))})
    refuses(path, "pickled objects|--allow-pickle")


@pytest.mark.parametrize("kind", ["weights", "constants"])
@pytest.mark.parametrize("prefix", ["weight_", "tensor_", "opaque_obj_", "custom_obj_"])
def test_archive_whose_tensor_is_a_pickle(exported: Path, tmp_path: Path, kind: str, prefix: str) -> None:
    def point(config: dict[str, Any]) -> None:
        first = next(iter(config["config"].values()))
        first["path_name"], first["use_pickle"] = f"{prefix}9", True

    payload = pickle.dumps(Hostile()) if prefix == "opaque_obj_" else saved(Hostile())
    edits = {f"model_{kind}_config_dot_json": in_json(point), f"data__{kind}__{prefix}9": lambda _: payload}
    refuses(rewritten(exported, tmp_path / "h.pt2", **edits))


def edit_program(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    return {"models__model_dot_json": in_json(change)}


def calls(target: str) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = target
        node["inputs"] = [{"name": "", "arg": {"as_string": MARK}, "kind": 1}]

    return change


@pytest.mark.parametrize(
    "target", ["torch.os.mkdir", "torch.hub.load", "torch.ops.load_library.__call__", "_operator.methodcaller", "#a:b"]
)
def test_archive_that_calls_python(exported: Path, tmp_path: Path, target: str) -> None:
    refuses(rewritten(exported, tmp_path / "h.pt2", **edit_program(calls(target))), "no tensor operator|cannot be read")


def test_archive_that_calls_an_op_on_files(exported: Path, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [{"name": "filename", "arg": {"as_string": MARK}, "kind": 1}]

    refuses(rewritten(exported, tmp_path / "h.pt2", **edit_program(change)), "from_file|cannot be read")


@pytest.mark.parametrize(
    "expression",
    [
        f"__import__('os').mkdir('{MARK}')",
        f"lambdify((), 'mkdir')('{MARK}')",
        "().__class__.__base__.__subclasses__()",
        "Symbol('s0').__class__",
        f"sympify(\"__import__('os').mkdir('{MARK}')\")",
        f"Integer(\"__import__('os').mkdir('{MARK}')\")",
        "(lambda: 1)()",
        "[1, 2]",
        "1 +",
    ],
)
def test_archive_whose_sizes_are_code(exported: Path, tmp_path: Path, expression: str) -> None:
    def change(program: dict[str, Any]) -> None:
        size = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]
        size["as_expr"]["expr_str"] = expression

    refuses(rewritten(exported, tmp_path / "h.pt2", **edit_program(change)), "size expression")


def test_guards_of_an_archive_are_not_run(exported: Path, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        program["guards_code"] = [f"__import__('os').mkdir('{MARK}') is None"]

    loaded = load(rewritten(exported, tmp_path / "h.pt2", **edit_program(change)))
    assert loaded.example_inputs is not None
    loaded.model(**loaded.example_inputs)


def test_names_that_would_be_source_code(exported: Path, tmp_path: Path) -> None:
    bad = f"x=__import__('os').mkdir('{MARK}')"

    def rename(data: bytes) -> bytes:
        return data.replace(b'"name": "x"', json.dumps({"name": bad}).encode()[1:-1])

    refuses(rewritten(exported, tmp_path / "h.pt2", models__model_dot_json=rename), "generated code")


@pytest.mark.parametrize("hidden", [False, True])
def test_tree_specification_that_imports(exported: Path, tmp_path: Path, hidden: bool) -> None:
    (tmp_path / "evil_module.py").write_text(f"import os; os.mkdir({MARK!r})")
    context = {"default_factory_module": "evil_module", "default_factory_name": "x", "dict_context": []}
    spec = [1, {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}]
    text = json.dumps(spec)

    def change(program: dict[str, Any]) -> None:
        for item in filter(lambda entry: entry["signature"], program["graph_module"]["module_call_graph"]):
            item["signature"]["out_spec"] = text.replace("default_factory", "def\\u0061ult_factory") if hidden else text

    refuses(rewritten(exported, tmp_path / "h.pt2", **edit_program(change)), "names a module to import|cannot be read")


def test_archive_with_a_compiled_library(exported: Path, tmp_path: Path) -> None:
    path = rewritten(exported, tmp_path / "h.pt2", data__aotinductor__model__lib_dot_so=lambda _: b"\x7fELF")
    refuses(path, "compiled libraries")


def test_torchscript_that_writes_files(tmp_path: Path) -> None:
    class Writer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, "executed")
            return x

    torch.jit.script(Writer()).save(str(tmp_path / "w.pt"))
    refuses(tmp_path / "w.pt", "reads or writes files")


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize("cut", [truncated, lambda d: d[:-30], lambda d: d[:40], lambda d: d[:3], lambda d: b""])
@pytest.mark.parametrize("kind", ["exported", "script", "weights", "legacy", "safetensors"])
def test_truncated_files(exported: Path, tmp_path: Path, kind: str, cut: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "file"
    weights = Doubling().state_dict()
    if kind == "exported":
        path.write_bytes(exported.read_bytes())
    elif kind == "script":
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "weights")
    path.write_bytes(cut(path.read_bytes()))
    refuses(path)


def damaged_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (bytes(range(256)) * 8, "not a model file"),
        (b"import torch\n", "not a model file"),
        (b'{"a": 1}', "not a model file"),
        (b"PK\x03\x04 and nothing else", "truncated or damaged"),
        (b"\x80\x02garbage that is no pickle", "a damaged pickle"),
        (struct.pack("<Q", 10**12) + b"{}", "truncated"),
        (struct.pack("<Q", 12) + b'{"a": 12345}', "damaged"),
        (damaged_zip({"hello.txt": b"hi"}), "neither torch.export"),
        (damaged_zip({"m/data.pkl": b"", "m/version": b"3"}), "truncated or damaged"),
        (damaged_zip({"m/archive_format": b"pt2"}), "holds no model|cannot be read"),
        (damaged_zip({"m/archive_format": b"pt2", "m/models/model.json": b"{"}), "cannot be read"),
        (damaged_zip({"m/archive_format": b"pt2", "m/models/model.json": b"[" * 90_000}), "cannot be read"),
        (damaged_zip({"m/data.pkl": b"x", "m/constants.pkl": b"x", "m/code/a.py": b"x"}), "TorchScript archive"),
        (damaged_zip({"serialized_exported_program.json": b"{}", "version": b"1"}), "before torch 2.8"),
    ],
)
def test_nonsense(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "file.pt").write_bytes(data)
    refuses(tmp_path / "file.pt", message)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    refuses(tmp_path / "absent.pt", "no such file")
    refuses(tmp_path, "without config.json")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "manifest.json").write_text("{}")
    refuses(tmp_path / "dir", "compiled artifact")
    os.mkfifo(tmp_path / "pipe")
    refuses(tmp_path / "pipe", "not a regular file")


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.pt").write_bytes(b"x")

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refuses(tmp_path / "secret.pt", "Permission denied")


def test_weights_that_are_no_weights(tmp_path: Path) -> None:
    for name, value in (("tensor", torch.ones(2)), ("empty", {}), ("mixed", {"a": torch.ones(1), "b": 3})):
        torch.save(value, tmp_path / name)
        refuses(tmp_path / name, "holds neither a module nor weights")
