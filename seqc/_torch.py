"""The only file that touches private torch API. Every other file calls these functions."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental import _config, proxy_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.sym_node import _NO_HINT, SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Max, Min
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


@contextlib.contextmanager
def replaced(owner: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Inside, a module or class of a library has these attributes instead of its own."""
    saved = {name: vars(owner)[name] for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)


@dataclass(frozen=True)
class Specialisation:
    """A symbolic size that Python turned into a number or a branch while the model was traced.

    ``expr`` is the size or condition, ``value`` what it was at the traced sizes, ``line`` the user's source line, and
    ``direct`` tells whether that line itself asked, not an operator of torch.
    """

    expr: Any
    value: int | bool
    line: str
    direct: bool


def shape_env_of(values: Any) -> ShapeEnv | None:
    """The ShapeEnv behind the first symbolic size among the tensors ``values``."""
    for value in values:
        for size in getattr(value, "shape", ()):
            if isinstance(size, torch.SymInt):
                env = size.node.shape_env
                assert env is None or isinstance(env, ShapeEnv)
                return env
    return None


# Between a size that Python turns into a number or a truth value, and the line that does so.
_CONVERSIONS = ("/torch/__init__.py", "/torch/fx/experimental/", "/seqc/_torch.py", "/torch/utils/")


def _user_line() -> tuple[str, bool]:
    """The innermost line outside torch, and whether no operator of torch lies between."""
    frame: types.FrameType | None = sys._getframe(2)
    direct = True
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/sympy/" not in file and not file.endswith("seqc/_torch.py"):
            return f"{file}:{frame.f_lineno}", direct
        direct = direct and any(part in file for part in _CONVERSIONS)
        frame = frame.f_back
    return "", False


@contextlib.contextmanager
def no_guards(env: ShapeEnv | None, log: list[Specialisation] | None = None) -> Iterator[None]:
    """Evaluate symbolic sizes by their traced value without freezing them; record each evaluation in ``log``.

    Inside, ``range(x.shape[1])`` sees a number while ``x.shape[1]`` stays symbolic everywhere else.
    """
    if env is None:
        yield
        return
    seen: set[tuple[Any, str]] = set()
    original: Callable[..., Any] = env.evaluate_expr

    known: dict[Any, Any] = {}

    def recording(expr: Any, hint: Any = None, fx_node: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Without guards an expression has one value throughout: torch's own cache of 256 entries is too small for us.
        key = (expr, args, tuple(sorted(kwargs.items())))
        if key not in known:
            known[key] = original(expr, hint, fx_node, *args, **kwargs)
        result = known[key]
        if log is not None and isinstance(expr, sympy.Basic) and expr.free_symbols:
            line, direct = _user_line()
            if (expr, line) not in seen:
                seen.add((expr, line))
                is_bool = isinstance(result, bool) or result in (sympy.true, sympy.false)
                log.append(Specialisation(expr, bool(result) if is_bool else int(result), line, direct))
        return result

    symbolic_config: Any = _config
    # backed_size_oblivious: broadcasting and contiguity rules are decided as for a general size, not for this one.
    with env.suppress_guards(), symbolic_config.patch(backed_size_oblivious=True), _shape_rules(), _quick_sizes():
        vars(env)["evaluate_expr"] = recording
        try:
            yield
        finally:
            del vars(env)["evaluate_expr"]


_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "int_floordiv",
    "sym_min",
    "sym_max",
    "eq",
    "ne",
    "ge",
    "gt",
    "le",
    "lt",
    "and_",
    "or_",
)


@contextlib.contextmanager
def _quick_sizes() -> Iterator[None]:
    """Inside, arithmetic on sizes that was done before in the same ShapeEnv is looked up: shape rules repeat the same few
    sums and comparisons for every operation, and sympy is a third of the time of a trace."""
    if getattr(SymNode._add, "remembers", False):  # type: ignore[attr-defined]
        yield
        return
    changed: dict[str, Any] = {f"_{name}": _remembered(getattr(SymNode, f"_{name}")) for name in _ARITHMETIC}
    changed["expr"] = property(_current_expr)
    # meta["tensor_meta"], which nothing of ours reads, asks whether each value is contiguous, in every memory format
    with replaced(SymNode, changed), replaced(proxy_tensor, {"_extract_tensor_metadata": lambda value: None}):
        yield


def _remembered(original: Callable[[SymNode, SymNode], SymNode]) -> Callable[[SymNode, SymNode], SymNode]:
    def operation(a: SymNode, b: SymNode) -> SymNode:
        env = a.shape_env
        if env is None or get_proxy_mode() is not None:  # a trace records the operation itself
            return original(a, b)
        known = vars(env).setdefault("_seqc_arithmetic", {})
        # types, since equal numbers of different types are equal keys
        key = (original, a._expr, a.pytype, a.hint, b._expr, b.pytype, b.hint, env._replacements_version_counter)
        result = known.get(key)
        if result is None:
            result = known[key] = original(a, b)
        # A node of its own: a trace tells values apart by the identity of their nodes.
        hint = _NO_HINT if result.hint is None else result.hint
        summation = result._optimized_summation
        return SymNode(result._expr, env, result.pytype, hint, result.constant, result.fx_node, summation)

    operation.remembers = True  # type: ignore[attr-defined]
    return operation


def _current_expr(node: SymNode) -> Any:
    """``SymNode.expr`` without the question, at each use, whether all of it is a number: nothing replaces numbers anyway."""
    env = node.shape_env
    if env is None or env._replacements_version_counter == 0 or isinstance(node._expr, int):
        return node._expr
    return env.replace(node._expr)


def _unbind_shapes(t: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
    return tuple(t.select(dim, i) for i in range(int(t.shape[dim])))


def _layer_shapes(x: torch.Tensor, hx: Any, *settings: Any) -> tuple[torch.Tensor, ...]:
    bidirectional = bool(settings[5])  # after params, has_biases, num_layers, dropout, train
    states = hx if isinstance(hx, (list, tuple)) else [hx]
    features = states[0].shape[-1] * (1 + bidirectional)
    return (x.new_empty((*x.shape[:-1], features)), *(torch.empty_like(s) for s in states))


# Kept whole in the IR beyond what torch.onnx knows: the backend has forms of them far cheaper than their decomposition
# (a loop over time, or a product over [length, length]).
_aten = torch.ops.aten
_RECURRENT_LAYERS = (_aten.lstm.input, _aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input)
_KEPT = (*_RECURRENT_LAYERS, _aten.cumprod.default)
_SHAPE_RULES: dict[Any, Callable[..., Any]] = {
    _aten.unbind.int: _unbind_shapes,
    **dict.fromkeys(_RECURRENT_LAYERS, _layer_shapes),
}


def shape_rule(target: Any) -> Any:
    """What to call on fake tensors for the shape of ``target``'s result: for most operations themselves.

    With torch's Python dispatcher a recurrent layer is a loop over its time, and its length a literal.
    """
    return _SHAPE_RULES[target] if target in _RECURRENT_LAYERS else target


@contextlib.contextmanager
def _shape_rules() -> Iterator[None]:
    """Shape rules for ops whose decompositions give wrong shapes where a symbolic size is read as its traced value.

    unbind becomes tensor_split of a symbolic size and keeps the axis; recurrent layers unbind time; a slice whose bound
    may be negative gets an unknown size, though its sign is the same at every length in practice.
    """
    from torch._decomp import decomposition_table
    from torch._subclasses import fake_impls

    rules: Any = fake_impls
    original = rules._compute_slice_index

    def slice_index(size: int | torch.SymInt, index: int | torch.SymInt) -> Any:
        found = original(size, index)
        if found is None and (isinstance(index, int) or index.node.has_hint()):
            symbolic: Any = torch
            found = symbolic.sym_max(index + size, 0) if hint(index) < 0 else symbolic.sym_min(index, size)
        return found

    saved = {op: decomposition_table[op] for op in _SHAPE_RULES}
    decomposition_table.update(_SHAPE_RULES)
    rules._compute_slice_index = slice_index
    try:
        yield
    finally:
        rules._compute_slice_index = original
        decomposition_table.update(saved)


@contextlib.contextmanager
def lazy_graph_modules() -> Iterator[None]:
    """GraphModules that torch makes inside write their Python code when it is first called, not after each change."""
    with _use_lazy_graph_module(True):
        yield


def lazy_graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule, whose copies are such too, that writes its Python code when it is called, not after each change."""
    return _LazyGraphModule(root, graph)


@contextlib.contextmanager
def without_fake_cache() -> Iterator[None]:
    """Fake tensor modes made inside compute every shape: looking symbolic shapes up in torch's cache costs more."""
    import torch._dynamo.config

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, x.layout


def alike(a: Any, b: Any) -> bool:
    """Whether two arguments or results are equal, fake tensors by shape and dtype, sizes by expression."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, FakeTensor):
        known = a.constant is None and b.constant is None
        return known and a.fake_mode is b.fake_mode and _layout(a) == _layout(b) and alike((*a.shape,), (*b.shape,))
    if isinstance(a, torch.Tensor):
        return False
    if isinstance(a, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return bool(a == b)


@contextlib.contextmanager
def faking(mode: FakeTensorMode) -> Iterator[None]:
    """Compute on the fake tensors of ``mode`` without freezing a size, composite operators included."""
    with mode, no_guards(mode.shape_env), enable_python_dispatcher():
        yield


def bounds(expr: Any, symbol: sympy.Symbol) -> list[int]:
    """The numbers c of all min(symbol, c) in a size."""
    found = [e for e in expr.atoms(Min) if symbol in e.args]
    return [min(int(a) for a in e.args if a.is_Integer) for e in found if any(a.is_Integer for a in e.args)]


def without_bounds(expr: Any, symbol: sympy.Symbol, most: int) -> Any:
    """A size with ``symbol`` in place of each min(symbol, c), where that is at most ``most`` and c is no less."""

    def idle(e: Any) -> bool:
        return isinstance(e, Min) and symbol in e.args and all(a == symbol or bool(a.is_Integer) for a in e.args)

    return expr.replace(idle, lambda e: symbol if all(a == symbol or a >= most for a in e.args) else e)


def size_expr(size: int | torch.SymInt) -> Any:
    """The sympy expression of a size."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def hint(size: int | torch.SymInt) -> int:
    """What a size was when the model was traced."""
    return size if isinstance(size, int) else int(size.node.hint)


def unclamped(size: torch.SymInt) -> int | None:
    """``size`` where no bound in it is clamped, min(n, ...) being n and max(0, e) being e; None if that is no number,
    or is not what the size was when traced."""
    expr = size.node.expr.replace(lambda e: isinstance(e, (Min, Max)), _unclamped)
    return int(expr) if expr.is_Integer and int(expr) == hint(size) else None


def _unclamped(bound: Any) -> Any:
    numbers = [a for a in bound.args if a.is_Integer]
    others = [a for a in bound.args if not a.is_Integer]
    if len(numbers) != 1 or len(others) != 1:
        return bound
    return numbers[0] if isinstance(bound, Min) else others[0]


def emit_expr(expr: Any, symbols: dict[sympy.Symbol, Any]) -> Any:
    """Evaluate a sympy size expression with Python operators on ``symbols`` (numbers, SymInts or fx proxies)."""
    return sympy_interp(PythonReferenceAnalysis, symbols, expr)


def floor_div(expr: Any, by: int) -> Any:
    """``expr // by`` as torch writes it in sizes."""
    return FloorDiv(expr, sympy.Integer(by))


def symint(env: ShapeEnv, expr: Any, hint: int) -> int | torch.SymInt:
    """A SymInt for ``expr`` in ``env``."""
    if expr.is_Integer:
        return int(expr)
    result = env.create_symintnode(expr, hint=hint)
    assert isinstance(result, (int, torch.SymInt))
    return result


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The FakeTensorMode of the values in ``gm``."""
    for node in gm.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise ValueError("the graph holds no fake tensors")


def without_effect_tokens(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with operators that only raise errors called plainly: torch orders them by tokens, which are no tensors."""
    from torch.export._remove_effect_tokens_pass import _remove_effect_tokens

    return _remove_effect_tokens(exported)


def onnx_decompositions(keep: frozenset[Any] = frozenset()) -> dict[Any, Callable[..., Any]]:
    """The decomposition table of torch.onnx: what has an ONNX translation stays whole, the rest is decomposed."""
    from torch.onnx._internal.exporter import _decomp

    registry = _torchlib(18)
    known = set(_decomp.get_onnx_implemented_overloads(registry)) | set(_KEPT) | set(keep)
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
    """Hide torch.onnx's warnings about its own metadata and attributes, and about packages that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, every ``torch.load``, also those deep inside torch.export, refuses pickles that would run code."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def load_exported_program(path: str, vet: Callable[[str, Any], None]) -> torch.export.ExportedProgram:
    """The program of a torch.export archive, without running anything that the archive brings along.

    ``torch.export.load`` is no way to read a file one does not trust: it unpickles without limits, loads compiled
    libraries, hands strings to sympy's ``eval`` and lets a node call any function below ``torch``. Here ``vet`` sees
    first, as parsed JSON, the list of records ("names"), "program", "weights" and "constants", and raises on what it
    refuses (it may edit what it sees); pickled tensors are read with ``weights_only``.
    """
    from torch._export.serde import schema, serialize
    from torch.export.pt2_archive import _package
    from torch.export.pt2_archive import constants as layout

    reader = _package.PT2ArchiveReader(path)
    names = set(reader.get_file_names())
    vet("names", sorted(names))
    start, end = layout.MODELS_FILENAME_FORMAT.split("{}")
    models = [name[len(start) : -len(end)] for name in names if name.startswith(start) and name.endswith(end)]
    model = models[0] if len(models) == 1 else "model"
    program = json.loads(reader.read_bytes(layout.MODELS_FILENAME_FORMAT.format(model)))
    vet("program", program)
    program["guards_code"] = []  # Python source that ExportedProgram.module() would execute
    for kind, config in (
        ("weights", layout.WEIGHTS_CONFIG_FILENAME_FORMAT),
        ("constants", layout.CONSTANTS_CONFIG_FILENAME_FORMAT),
    ):
        if config.format(model) in names:
            vet(kind, json.loads(reader.read_bytes(config.format(model))))
    with weights_only():
        sample = reader.read_bytes(layout.SAMPLE_INPUTS_FILENAME_FORMAT.format(model))
        examples = torch.load(io.BytesIO(sample), weights_only=True) if sample else None
        result: torch.export.ExportedProgram = serialize.ExportedProgramDeserializer().deserialize(
            serialize._dict_to_dataclass(schema.ExportedProgram, program),  # type: ignore[no-untyped-call]
            _package._load_state_dict(reader, model),
            _package._load_constants(reader, model),
            examples,
        )
    return result


def foreign_calls(gm: fx.GraphModule) -> list[str]:
    """What a deserialised graph calls, or hands to an op, that is no torch operator or reads or writes files."""
    from torch._export.serde.serialize import _SYM_OPS

    allowed = (*_SYM_OPS, operator.getitem)
    found = []
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            leaves = [node.target] if node.op == "call_function" else []
            leaves += [x for x in pytree.tree_leaves((node.args, node.kwargs)) if callable(x)]
            for value in leaves:
                if isinstance(value, torch._ops.OpOverload):
                    schema = value._schema
                    if any("file" in a.name or "path" in a.name for a in schema.arguments):
                        found.append(str(value))
                elif not isinstance(value, torch._ops.HigherOrderOperator) and not any(value is op for op in allowed):
                    found.append(getattr(value, "__name__", str(value)))
            if node.op in ("call_module", "call_method"):
                found.append(str(node.target))
    return found


def lower_bound(size: int | torch.SymInt, ranges: dict[sympy.Symbol, tuple[int, int | None]]) -> int | None:
    """The least value ``size`` is proved to take while each symbol stays in its range; None where nothing is proved."""
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    expr = size_expr(size)
    top = sympy.Integer(2**31)
    known = {s: ValueRanges(low, top if high is None else high) for s, (low, high) in ranges.items()}
    if not expr.free_symbols <= set(known):
        return None
    low = bound_sympy(expr, known).lower
    return int(low) if low.is_Integer else None


def largest(size: int | torch.SymInt) -> int | None:
    """The largest value that the declared ranges of dimensions allow a size; None where there is none."""
    if isinstance(size, int):
        return size
    high = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(high) if high.is_Integer else None


def set_largest(symbol: sympy.Symbol, mode: Any, most: int) -> None:
    """Narrow the range of a dimension: it is at most ``most``."""
    from torch.utils._sympy.value_ranges import ValueRanges

    ranges = mode.shape_env.var_to_range
    ranges[symbol] = ValueRanges(ranges[symbol].lower, sympy.Integer(most))


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


def new_symbol(mode: FakeTensorMode, name: str, hint: int) -> sympy.Symbol:
    """A new dimension of any size from 0 on, which is ``hint`` while shapes are computed."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
    from torch.utils._sympy.value_ranges import ValueRanges

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    value = mode.from_tensor(torch.empty(hint), source=ConstantSource(name), symbolic_context=context)
    symbol = size_expr(value.shape[0])
    assert isinstance(symbol, sympy.Symbol) and mode.shape_env is not None
    mode.shape_env.var_to_range[symbol] = ValueRanges(sympy.Integer(0), mode.shape_env.var_to_range[symbol].upper)
    return symbol
