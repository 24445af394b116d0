"""The only package that touches private torch API: everything else calls these functions."""

from __future__ import annotations

from seqc._torch.archives import (
    foreign_calls,
    load_exported_program,
    weights_only,
)
from seqc._torch.onnx import (
    add_opset_imports,
    has_translation,
    insert_type_promotions,
    onnx_decompositions,
    onnx_dtype,
    onnx_registry,
    onnx_scan,
    onnx_tensor,
    onnx_value,
    quiet_onnx,
    register_translation,
    translate_node,
)
from seqc._torch.quick_sizes import (
    replaced,
)
from seqc._torch.shape_rules import (
    shape_rule,
)
from seqc._torch.sizes import (
    alike,
    bounds,
    emit_expr,
    floor_div,
    hint,
    largest,
    lower_bound,
    new_symbol,
    set_largest,
    size_expr,
    symint,
    unclamped,
    without_bounds,
)
from seqc._torch.tracing import (
    Specialisation,
    fake_mode_of,
    faking,
    lazy_graph_module,
    lazy_graph_modules,
    no_guards,
    quiet_export,
    shape_env_of,
    without_effect_tokens,
    without_fake_cache,
)

__all__ = [
    "Specialisation",
    "add_opset_imports",
    "alike",
    "bounds",
    "emit_expr",
    "fake_mode_of",
    "faking",
    "floor_div",
    "foreign_calls",
    "has_translation",
    "hint",
    "insert_type_promotions",
    "largest",
    "lazy_graph_module",
    "lazy_graph_modules",
    "load_exported_program",
    "lower_bound",
    "new_symbol",
    "no_guards",
    "onnx_decompositions",
    "onnx_dtype",
    "onnx_registry",
    "onnx_scan",
    "onnx_tensor",
    "onnx_value",
    "quiet_export",
    "quiet_onnx",
    "register_translation",
    "replaced",
    "set_largest",
    "shape_env_of",
    "shape_rule",
    "size_expr",
    "symint",
    "translate_node",
    "unclamped",
    "weights_only",
    "without_bounds",
    "without_effect_tokens",
    "without_fake_cache",
]
