"""FoldConstants: what depends on weights alone is computed at compile time."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.errors import UnsupportedModelError
from seqc.memory import node_bytes
from seqc.outside import is_pure
from seqc.program import Program, module_path, place_of, source_line
from seqc.rewrite import remove_dead_code, replace_node

aten = torch.ops.aten

# They compute nothing: other passes know them, runtimes make them where they are needed, and a view of a weight shares it.
_FILLS = frozenset({
    aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, aten.arange.default,
    aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
})  # fmt: skip
_MOVES = frozenset({
    aten.permute.default, aten.transpose.int, aten.t.default, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.select.int, aten.slice.Tensor, aten.flatten.using_ints, aten.unflatten.int,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default,
    aten._to_copy.default, aten.view_as_real.default, aten.view_as_complex.default,
    aten.split_with_sizes.default, aten.unbind.int,
})  # fmt: skip
_FLAGGED = {
    aten.linalg_inv_ex.default: "inverse",
    aten._linalg_solve_ex.default: "solution",
    aten.linalg_cholesky_ex.default: "Cholesky factor",
}
"""Operations whose last result is not 0 where they failed."""


@dataclass(frozen=True)
class FoldConstants:
    """Replaces what is computed from weights and literals alone by new weights.

        a = -exp(a_log);  step = solve(1 - m / 2, 1 + m / 2)      ->      weight a_log.neg;  weight m.solve

    The values are computed in PyTorch, in the types and layouts of the model: bitwise those of the source. A value is
    folded where it takes at most ``max_growth`` times the bytes of the weights it is computed from, or ``small_bytes``;
    where it takes more, what it is computed from may be. Fills, views and casts stay, but for casts to fewer bytes: they
    cost less as they are. Weights that nothing reads any more are dropped. Random numbers are drawn at run time.

    Some operations have no form in ONNX (inverses, eigenvalues, matrix exponentials): models that apply them to weights,
    as S4 and LSSL do, compile because of this.
    """

    max_growth: float = 4.0
    small_bytes: int = 1 << 20

    name: ClassVar[str] = "fold_constants"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, program: Program) -> int:
        constants = _Constants(program)
        needed: set[fx.Node] = set()
        chosen = []
        for node in reversed(program.graph.nodes):
            if node in constants.sources and node not in needed:
                continue
            if self._folds(node, constants):
                chosen.append(node)
            else:
                needed.update(node.all_input_nodes)
        values = {node: constants.value(node) for node in reversed(chosen)}
        for node, value in values.items():
            where = place_of(node)
            sources = ", ".join(program.weight_names.get(w.name, w.name) for w in constants.sources[node]) or "literals"
            name = constants.name_of(node)
            replace_node(node, program.add_weight(value, name))
            program.reasons.append(f"{where}: {name} is computed at compile time from {sources}")
        if chosen:
            remove_dead_code(program)
        return len(chosen)

    def _folds(self, node: fx.Node, constants: _Constants) -> bool:
        if (
            node.op != "call_function"
            or node not in constants.sources
            or not isinstance(node.meta.get("val"), torch.Tensor)
        ):
            return False
        if node.target in _FILLS or (node.target in _MOVES and not _narrows(node)):
            return False
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source.target in _MOVES:
            return False
        return node_bytes([node]) <= max(self.small_bytes, self.max_growth * node_bytes(constants.sources[node]))


@dataclass
class _Constants:
    """The values of a Program that depend on weights and literals only; ``sources`` are the weights of each."""

    program: Program
    sources: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    _values: dict[fx.Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.program.weight_nodes:
            self.sources[node] = [node]
            self._values[node] = self.program.weights[node.name].detach()
        for node in self.program.graph.nodes:
            known = all(a in self.sources for a in node.all_input_nodes)
            if known and node.op == "call_function" and is_pure(node) and _is_tensor(node.meta.get("val")):
                self.sources[node] = list(dict.fromkeys(s for a in node.all_input_nodes for s in self.sources[a]))

    def value(self, node: fx.Node) -> torch.Tensor:
        """The value of ``node``. Raises UnsupportedModelError where a linear system has no solution."""
        pending = [node]
        while pending:
            current = pending[-1]
            waiting = [a for a in current.all_input_nodes if a not in self._values]
            pending += waiting
            if not waiting:
                pending.pop()
                if current not in self._values:
                    self._values[current] = self._computed(current)
        result: torch.Tensor = self._values[node]
        return result

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._values[n])
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target in _FLAGGED and bool(result[-1].any()):
            raise UnsupportedModelError(f"a matrix has no {_FLAGGED[node.target]} at {source_line(node) or node.name}")
        return result

    def name_of(self, node: fx.Node) -> str:
        """A name that tells what was computed, and from which weight first, or where."""
        target = node.args[0].target if node.target is operator.getitem else node.target  # type: ignore[union-attr]
        operation = str(getattr(target, "__name__", target)).split(".")[0].strip("_").removesuffix("_ex")
        weights = [self.program.weight_names.get(w.name, w.name) for w in self.sources[node]]
        own = weights[0] if weights else module_path(node) or "constant"
        name = f"{own}.{operation.removeprefix('linalg_')}"
        taken = set(self.program.weight_names.values())
        return next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)


def _narrows(node: fx.Node) -> bool:
    """Whether a cast takes fewer bytes than what it casts."""
    source = node.args[0] if node.target is aten._to_copy.default else None
    return isinstance(source, fx.Node) and node_bytes([node]) < node_bytes([source])


def _is_tensor(value: Any) -> bool:
    return all(isinstance(v, torch.Tensor) for v in (value if isinstance(value, (tuple, list)) else (value,)))
