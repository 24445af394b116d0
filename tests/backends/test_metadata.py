"""Names, sizes, provenance, sharing and determinism of exported models."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
from seqc.backends.onnx import export
from seqc.errors import UnsupportedModelError
from seqc.frontend.capture import capture
from seqc.frontend.signature import bind
from seqc.program import Program
from tests.helpers.loops import loop_program
from tests.helpers.onnx import assert_same, checked, run, session


class Tied(nn.Module):
    """A token model whose head shares the embedding, and with two equal norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(6) for _ in range(2)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((6,), 0.5))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        for norm, linear in zip(self.norms, self.block, strict=True):
            x = x + F.silu(linear(norm(x))) * self.scale
        return {"logits": self.head(x), "last": F.pad(x, (0, 0, 2, 1))}


def traced(model: nn.Module, x: torch.Tensor) -> Program:
    signature = bind(model.eval(), (x,), None)
    return capture(model, signature, signature.trace_sizes()).program


@pytest.fixture(scope="module")
def tied() -> ir.Model:
    torch.manual_seed(0)
    return export(traced(Tied(), torch.randint(0, 11, (2, 5))))


@pytest.fixture(scope="module")
def loop() -> ir.Model:
    return export(looping())


def looping() -> Program:
    def outer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x[:, 0], x[:, 1:].transpose(0, 1)

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = 0.5 * h + x
        return h, h.tanh()

    dynamic = {"input_0": {0: "batch", 1: "sequence"}}
    return loop_program(outer, (torch.randn(2, 7, 4),), dynamic, step, carries=1, xs=1)


def test_inputs_and_outputs_have_the_names_and_symbolic_shapes_of_the_ports(tied: ir.Model) -> None:
    graph = tied.graph
    assert [(v.name, str(v.shape)) for v in graph.inputs] == [("ids", "[batch,sequence]")]
    assert [(v.name, str(v.shape)) for v in graph.outputs] == [
        ("logits", "[batch,sequence,11]"),
        ("last", "[batch,sequence + 3,6]"),
    ]


def test_values_inside_carry_the_users_dimension_names(loop: ir.Model) -> None:
    sizes = {str(d) for n in loop.graph.all_nodes() for v in n.outputs if v.shape is not None for d in v.shape}
    assert {"batch", "sequence - 1"} <= sizes
    assert not any(size.startswith("s") and size[1:].isdigit() for size in sizes)


def test_weights_keep_their_names_and_bytes(tied: ir.Model) -> None:
    found = tied.graph.initializers
    assert {"block.0.weight", "block.1.weight", "block.0.bias", "scale"} <= set(found)
    torch.manual_seed(0)
    source = Tied().state_dict()
    for name in ("block.0.weight", "block.1.weight", "scale"):
        assert (found[name].const_value.numpy() == source[name].numpy()).all()


def test_outputs_that_are_an_input_a_weight_or_another_output_have_values_of_their_own() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = x + self.w
            return {"input": x.clone(), "weight": self.w.view(4), "one": y, "other": y}

    model = Same()
    exported = export(traced(model, torch.randn(2, 5, 4)))
    assert [v.name for v in exported.graph.outputs] == ["input", "weight", "one", "other"]
    assert "w" in exported.graph.initializers
    x = torch.randn(1, 3, 4)
    assert_same(run(session(exported), (x,)), list(model(x).values()))


def test_input_and_output_of_one_name_are_refused() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x + 1}

    with pytest.raises(UnsupportedModelError, match="both called 'x'"):
        export(traced(Named(), torch.randn(2, 5, 4)))


def test_tied_weight_and_equal_weights_are_stored_once(tied: ir.Model) -> None:
    names = set(tied.graph.initializers)
    assert len(names & {"embed.weight", "head.weight"}) == 1
    assert len(names & {"norms.0.weight", "norms.1.weight"}) == 1
    assert len(names & {"norms.0.bias", "norms.1.bias"}) == 1


def test_weights_that_differ_in_the_sign_of_zero_stay_apart() -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(20))
            self.b = nn.Parameter(-torch.zeros(20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / self.a + x * 2 / self.b

    model = export(traced(Zeros(), torch.randn(2, 5, 20)))
    assert {"a", "b"} <= set(model.graph.initializers)


def test_weights_share_the_memory_of_the_program() -> None:
    program = traced(nn.Linear(4, 3), torch.randn(2, 5, 4))
    weight = next(t for n, t in program.weights.items() if program.weight_names[n] == "weight")
    assert export(program).graph.initializers["weight"].const_value.numpy().ctypes.data == weight.data_ptr()


def test_large_constants_are_not_folded_into_the_file() -> None:
    class Mask(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(512, 512).tril().sum(0)[:4]

    model = export(traced(Mask(), torch.randn(2, 5, 4)))
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values()) < 20_000


def test_every_node_says_which_module_and_source_line_it_comes_from(tied: ir.Model) -> None:
    for node in tied.graph.all_nodes():
        assert "test_metadata.py:" in node.metadata_props["seqc.source"], node.name
        assert set(node.metadata_props) <= {"seqc.module", "seqc.source"}
    modules = {n.metadata_props.get("seqc.module", "") for n in tied.graph.all_nodes() if n.op_type == "MatMul"}
    assert modules == {"block.0", "block.1", "head"}


def test_model_says_who_made_it_and_nothing_of_torchs_own_metadata_is_left(loop: ir.Model) -> None:
    assert loop.producer_name == "seqc"
    assert loop.producer_version == seqc.__version__ == loop.metadata_props["seqc.version"]
    assert "input_0[batch, sequence, 4]" in (loop.doc_string or "")
    assert b"pkg." not in checked(loop).SerializeToString()


def test_two_exports_give_the_same_bytes() -> None:
    program = looping()
    first, second = (ir.serde.serialize_model(export(program)).SerializeToString() for _ in range(2))
    assert first == second


def test_export_leaves_the_program_as_it_was() -> None:
    program = looping()
    before = str(program.graph), [str(gm.graph) for gm in program.graph_modules()]
    export(program)
    assert (str(program.graph), [str(gm.graph) for gm in program.graph_modules()]) == before


def test_bytes_do_not_depend_on_the_hash_seed() -> None:
    script = textwrap.dedent(
        """
        import hashlib, onnx_ir as ir, torch
        from seqc.backends.onnx import export
        from tests.backends.test_metadata import Tied, traced
        torch.manual_seed(0)
        model = export(traced(Tied(), torch.randint(0, 11, (2, 5))))
        print(hashlib.sha256(ir.serde.serialize_model(model).SerializeToString()).hexdigest())
        """
    )
    digests = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, check=True
        )
        digests.add(done.stdout.strip().splitlines()[-1])
    assert len(digests) == 1
