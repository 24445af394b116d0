"""What the TensorRT backend reads and computes without its package: logs, ranges, options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from seqc.backends.tensorrt.build import build_engine
from seqc.backends.tensorrt.log import parsed_last, read_log
from seqc.backends.tensorrt.package import PACKAGES
from seqc.backends.tensorrt.profiles import asked_ranges, bounded, ranges_of, shapes
from seqc.backends.tensorrt.refused import check_taken
from seqc.backends.tensorrt.settings import Range, parse_bytes, parse_range, parse_sms
from seqc.backends.tensorrt.where import Origins
from seqc.errors import EngineError, UnsupportedOpError, UsageError
from seqc.frontend.signature import bind

MEMORY = "Max Scratch Memory: 10 bytes\nTotal Activation Memory: 20 bytes\nTotal Weights Memory: 30 bytes\n"
NUMBER = "{ Name: n, Dimensions: [1], Strides: [1], Datatype: Int32, Format: x }"
TENSOR = "{ Name: y, Dimensions: [-1,4], Strides: [4,1], Datatype: Float, Format: x }"


def layer(name: str, kind: str, outputs: str = "", tactic: str = "", jump: str = "", nodes: str = "") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [], Constants: [], Outputs: [ {outputs}], TacticName: {tactic}, "
        f"StreamId: 0, {jump}Metadata: {nodes}\n"
    )


def log(*layers: str) -> str:
    return f"{MEMORY}[VERBOSE] Layers:\n{''.join(layers)}\nI/O Tensors:\n Name: x, IOMode: Input\n"


def test_kernels_are_what_runs_on_the_gpu() -> None:
    found = read_log(
        log(
            layer("a", "shape_call"),
            layer("b", "kgen", TENSOR, "t", nodes="[ONNX Layer: Add_y][ONNX Layer: Mul_z]"),
            layer("c", "memset", NUMBER),  # a counter
            layer("d", "memset", TENSOR),  # a tensor is set
            layer("e", "signal"),
        )
    )
    assert [(k.name, k.nodes, k.outputs, k.in_loop) for k in found.kernels] == [
        ("b", ("Add_y", "Mul_z"), ("Float[-1,4]",), False),
        ("d", (), ("Float[-1,4]",), False),
    ]
    assert found.memory == {"scratch_bytes": 10, "activation_bytes": 20, "weight_bytes": 30}
    assert not found.has_loop


def test_a_jump_back_is_a_loop_and_a_jump_ahead_is_a_branch() -> None:
    body = [layer("a", "kgen", TENSOR, "t"), layer("b", "kgen", TENSOR, "t")]
    back = read_log(log(*body, layer("c", "cjmp", jump="JumpTargetThen: b, JumpTargetElse: <EXIT>, ")))
    assert back.has_loop and [k.in_loop for k in back.kernels] == [False, True]
    ahead = read_log(log(layer("c", "cjmp", jump="JumpTargetThen: a, JumpTargetElse: b, "), *body))
    assert not ahead.has_loop and not any(k.in_loop for k in ahead.kernels)


def test_a_log_without_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="lists no layers"):
        read_log(MEMORY)
    with pytest.raises(ValueError, match="max scratch memory"):
        read_log("[VERBOSE] Layers:\n")


def test_the_node_that_the_parser_was_at_is_known() -> None:
    assert parsed_last("[VERBOSE] Parsing node: Add_y [Add]\n[VERBOSE] Parsing node: Mul_z.1 [Mul]\n") == "Mul_z.1"
    assert parsed_last("") == ""


def test_shapes_follow_from_ranges() -> None:
    ranges = {"batch": Range(1, 2, 4), "sequence": Range(1, 9, 32)}
    found = shapes([("x", ["batch", "sequence", 3]), ("y", ["2*sequence + 1", "sequence//2"])], ranges)
    assert found == {"x": [[1, 1, 3], [2, 9, 3], [4, 32, 3]], "y": [[3, 0], [19, 4], [65, 16]]}
    with pytest.raises(UsageError, match="no range is known for an input of size 'other'"):
        shapes([("x", ["other"])], ranges)


def test_a_cache_may_have_more_room_than_one_call_has_steps() -> None:
    signature = bind(torch.nn.Identity(), (torch.zeros(2, 9, 3),), None)
    asked = asked_ranges({"profile.sequence": Range(1, 8, 16), "profile.capacity": Range(1, 64, 128)}, signature, True)
    limited = bounded(signature, asked)
    assert {n: d.max for n, d in limited.dims.items()} == {"batch": 8, "sequence": 128}
    dims = {n: {"min": 1, "max": m, "traced": 7} for n, m in (("batch", 8), ("sequence", 128), ("capacity", 128))}
    assert ranges_of(dims, {"batch": 2, "sequence": 9}, asked) == {
        "batch": Range(1, 2, 8),
        "sequence": Range(1, 8, 16),
        "capacity": Range(1, 64, 128),
    }


def test_what_would_be_dropped_is_refused() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 11, opset_import: ["" : 24]>
        attends (float[1,2,4,8] q, float[1,2,4,8] k, float[1,2,4,8] v, int64[1] length) => (float[1,2,4,8] y)
        { y = Attention(q, k, v, , , , length) }"""
    )
    with pytest.raises(UnsupportedOpError, match="nonpad_kv_seqlen, which is dropped: mask the padded steps"):
        check_taken(model, "TensorRT")


def test_doubles_are_refused_wherever_they_come_in() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        f (double[2] x) => (double[2] y) { y = Sin(x) }"""
    )
    with pytest.raises(UnsupportedOpError) as caught:
        check_taken(model, "TensorRT")
    head, first, second = str(caught.value).splitlines()
    assert head == "TensorRT would not compute this model as it is written"
    assert "the input 'x' is float64, which becomes float32: convert the model to float32 first" in first
    assert "Sin () computes in float64, which becomes float32: compute it in float32" in second


def test_a_parser_that_aborts_names_the_node_it_was_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child is replaced by one that writes the parser's log and aborts, as TensorRT's parser may."""
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        f (float[2] x) => (float[2] y) { y = Sin(x) }"""
    )
    node = next(iter(model.graph))
    node.name = "Sin_y"
    node.metadata_props.update({"seqc.module": "layers.0", "seqc.source": "model.py:3: y = sin(x)"})
    (tmp_path / "fake_child.py").write_text(
        "import json, os, sys\n"
        "log = json.load(open(sys.argv[-1]))['log']\n"
        "open(log, 'w').write('[VERBOSE] Parsing node: Sin_y [Sin]\\n')\n"
        "print('terminate called', file=sys.stderr, flush=True)\n"
        "os.abort()\n"
    )
    real = subprocess.Popen

    def child(command: list[str], **given: Any) -> Any:
        return real([sys.executable, str(tmp_path / "fake_child.py"), command[-1]], **given)

    monkeypatch.setattr(subprocess, "Popen", child)
    said = (
        r"the process in which TensorRT for RTX builds model.onnx was ended by SIGABRT, near Sin \(Sin_y\) at layers.0 "
        r"model.py:3: y = sin\(x\): terminate called; try smaller ranges .*another form of the recurrence"
    )
    with pytest.raises(EngineError, match=said):
        build_engine(PACKAGES["tensorrt_rtx"], tmp_path / "model.onnx", Origins(model), {})


def test_names_in_messages_lead_to_nodes() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        f (float[2] x) => (float[2] y_1) { y_1 = Sin(x) }"""
    )
    node = next(iter(model.graph))
    node.name = "Sin_y_1"
    node.metadata_props.update({"seqc.module": "layers.0", "seqc.source": "model.py:3: y = sin(x)"})
    for message in ("Cannot compile operation 'Sin_y_1' for", "in {y_1.4, z}"):
        assert str(Origins(model).first_in(message)) == "Sin (Sin_y_1) at layers.0 model.py:3: y = sin(x)"
    assert Origins(model).first_in("out of memory") is None


@pytest.mark.parametrize(("text", "value"), [("89,120", (89, 120)), ([120, 89], (89, 120)), (89, (89,)), ("all", ())])
def test_compute_capabilities(text: object, value: tuple[int, ...]) -> None:
    assert parse_sms(text) == value and parse_sms(value) == value


def test_ranges_and_sizes_of_memory() -> None:
    assert parse_range("1,16,4096") == Range(1, 16, 4096) and parse_range(8) == Range(8, 8, 8)
    assert parse_range(Range(1, 2, 3)) == Range(1, 2, 3)
    assert [parse_bytes(text) for text in ("2GiB", "1.5 MB", "7", 0)] == [2 * 2**30, 1500000, 7, 0]
    for wrong in ("0,1,2", "1,2", "1,2,3,4", "a", True):
        with pytest.raises(ValueError):
            parse_range(wrong)
    for wrong in ("2 lots", "-1", True, None):
        with pytest.raises(ValueError):
            parse_bytes(wrong)
