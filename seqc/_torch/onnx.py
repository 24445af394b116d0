"""The ONNX exporter of torch: its table of translations, and the pieces of which an ONNX graph is built."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc._torch.quiet import errors_only
from seqc._torch.shape_rules import KEPT
from seqc._torch.tracing import fake_mode_of, no_guards


def onnx_decompositions(keep: frozenset[Any] = frozenset()) -> dict[Any, Callable[..., Any]]:
    """The decomposition table of torch.onnx: what has an ONNX translation stays whole, the rest is decomposed."""
    from torch.onnx._internal.exporter import _decomp

    registry = _torchlib(18)
    known = set(_decomp.get_onnx_implemented_overloads(registry)) | set(KEPT) | set(keep)
    return dict(_decomp.create_onnx_friendly_decomposition_table(known))


@functools.cache
def _torchlib(opset: int) -> Any:
    from torch.onnx._internal.exporter import _registration

    with quiet_onnx():
        return _registration.ONNXRegistry.from_torchlib(opset)


def onnx_registry(opset: int) -> Any:
    """A fresh copy of torch.onnx's table of ATen translations, for nodes of ``opset`` (18 or later)."""
    registry = copy.copy(_torchlib(opset))
    registry.functions = {target: list(found) for target, found in registry.functions.items()}
    return registry


@contextlib.contextmanager
def quiet_onnx() -> Iterator[None]:
    """Hide torch.onnx's warnings on its own metadata and packages not installed, and the optimiser's on what it left alone."""
    with errors_only("torch.onnx", "onnxscript", "onnx_ir"):
        yield


def register_translation(registry: Any, target: Any, function: Callable[..., Any]) -> None:
    """Let ``function(*args, **kwargs)``, which calls onnxscript opset ops, translate ``target`` before any other."""
    from torch.onnx._internal.exporter import _registration

    registry._register(
        target,
        _registration.OnnxDecompMeta(
            onnx_function=function, fx_target=target, signature=None, is_custom=True, skip_signature_inference=True
        ),
    )


def has_translation(registry: Any, node: fx.Node) -> bool:
    """Whether the registry holds a translation for the node's target and realness."""
    from torch.onnx._internal.exporter import _dispatching

    return _dispatching.dispatch(node, registry)[0] is not None


def translate_node(
    model: Any, graph: Any, node: fx.Node, values: dict[str, Any], constants: dict[Any, Any], registry: Any
) -> None:
    """Append the ONNX form of a call_function node to ``graph`` and put its results into ``values``, by node name."""
    from torch.onnx._internal.exporter import _core

    _core._handle_call_function_node_with_lowering(
        model,
        node,
        values,
        graph_like=graph,
        constant_farm=constants,
        registry=registry,
        opset=_core._get_onnxscript_opset(registry.opset_version),
        node_name_to_local_functions={},
    )


def add_opset_imports(model: Any) -> None:
    """Declare every operator domain that the ONNX model and its functions use."""
    from torch.onnx._internal.exporter import _ir_passes

    _ir_passes.add_opset_imports(model)


def onnx_tensor(tensor: torch.Tensor, name: str) -> Any:
    """An onnx_ir tensor that shares the memory of ``tensor``; a complex one becomes real pairs on a last axis."""
    from torch.onnx._internal.exporter import _core

    return _core.TorchTensor(torch.view_as_real(tensor) if tensor.is_complex() else tensor, name=name)


def onnx_value(name: str, opset: int) -> Any:
    """A fresh ONNX value that translations may do Python arithmetic on."""
    from torch.onnx._internal.exporter import _core, _tensors

    return _tensors.SymbolicTensor(_core._get_onnxscript_opset(opset), name=name)


def onnx_dtype(dtype: torch.dtype) -> Any:
    """The onnx_ir DataType of a torch dtype; complex types give their real counterpart."""
    from torch.onnx._internal.exporter import _core

    return _core.torch_dtype_to_onnx_dtype(dtype.to_real() if dtype.is_complex else dtype)


def insert_type_promotions(gm: fx.GraphModule) -> None:
    """Make the casts of ATen's type promotion explicit, in ``gm`` only; sizes stay symbolic.

    torch's own pass runs every node again; this one runs only nodes that it changes.
    """
    from torch.onnx._internal.fx.passes import type_promotion

    class Promote(type_promotion._TypePromotionInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            rule = type_promotion.get_type_promotion_rule(n, table) if n.op == "call_function" else None
            if rule is not None:
                with self._set_current_node(n):
                    self._maybe_promote_node(n, rule)
            return n.meta.get("val")

    table = type_promotion.TypePromotionTable()
    mode = fake_mode_of(gm)
    with mode, no_guards(mode.shape_env), torch.fx.traceback.preserve_node_meta():
        Promote(gm, table).run(*(n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"))
    gm.recompile()


def onnx_scan(
    step: Callable[..., Sequence[Any]], carries: Sequence[Any], xs: Sequence[Any], axes: Sequence[int], reverse: bool
) -> Sequence[Any]:
    """Inside a translation: an ONNX Scan of ``step(*carries, *xs at one step)``, which returns carries, then ys.

    ``axes`` holds the scanned axis of each x; every y gets the axis of the first x. Returns the final carries, then ys.
    """
    import onnx_ir as ir
    from onnxscript import evaluator
    from torch.onnx._internal.exporter import _building

    recorder: Any = _building.OpRecorder
    outer: Any = evaluator.default()
    inner = recorder(outer.opset, {})
    inputs = []
    for i, (value, axis) in enumerate((*((c, None) for c in carries), *zip(xs, axes, strict=True))):
        item = onnx_value(f"step_input_{i}", outer.opset.version)
        item.dtype = value.dtype
        if value.shape is not None:
            item.shape = ir.Shape([d for at, d in enumerate(value.shape) if axis is None or at != axis])
        inputs.append(item)
    with evaluator.default_as(inner):
        outputs = list(step(*inputs))
    body = ir.Graph(inputs, outputs, nodes=inner.nodes, name="scan_body")
    n_ys, direction = len(outputs) - len(carries), int(reverse)
    node = ir.Node(
        "",
        "Scan",
        [*carries, *xs],
        [
            ir.AttrGraph("body", body),
            ir.AttrInt64("num_scan_inputs", len(xs)),
            ir.AttrInt64s("scan_input_axes", list(axes)),
            ir.AttrInt64s("scan_output_axes", [axes[0]] * n_ys),
            ir.AttrInt64s("scan_input_directions", [direction] * len(xs)),
            ir.AttrInt64s("scan_output_directions", [direction] * n_ys),
        ],
        outputs=[onnx_value("scan_output", outer.opset.version) for _ in outputs],
    )
    outer.nodes.append(node)
    return node.outputs
