"""Lower: dialect ops become what the target has, each in the form that is fastest on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc import _torch
from seqc.classify.confirm import largest_error_between
from seqc.emit import Emitter
from seqc.errors import UnsupportedOpError
from seqc.lowerings import SETTINGS, WHERE_POSSIBLE
from seqc.lowerings.base import Lowering, Refused, always_steps, short_name
from seqc.lowerings.by_length import by_length
from seqc.lowerings.table import forms_of
from seqc.ops.recurrence import is_branch, is_recurrence, parts
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code, replace_node, result_index
from seqc.target import Target


@dataclass(frozen=True)
class Lower:
    """Writes each dialect op in the first form that the target has and that takes it.

    ``forced`` names the form to use instead, by op (``{"linear_attention": "sequential"}``); it is an error where that
    form does not take a node, but for those of ``WHERE_POSSIBLE``: what they do not take gets the first form
    that does. ``settings`` holds what forms are told, by form. ``opset`` is the ONNX opset that will be emitted, by default
    the target's. Ops that a form is written with are lowered too.

    ``tolerance``: a form may sum in another order than the reference; each stays within the usual float32 error.
    """

    target: Target
    forced: dict[str, str] = field(default_factory=dict)
    opset: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SETTINGS)

    name: ClassVar[str] = "lower"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            emit = Emitter(gm, program.fake_mode)
            changes += self._each(program, emit, list(gm.graph.nodes))
        if changes:
            remove_dead_code(program)
        return changes

    def _check_dtype(self, node: fx.Node, what: str) -> None:
        """Raises UnsupportedOpError where the target cannot compute in the floating-point type of ``node``."""
        for operand in node.all_input_nodes:
            value = operand.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                dtype = str(value.dtype).removeprefix("torch.")
                if dtype not in self.target.dtypes:
                    raise UnsupportedOpError(
                        f"{what} computes in {dtype}, for which target {self.target.name!r} has no kernels: "
                        "convert the model with .float() or .half()"
                    )

    def _faster(self, form: Lowering, node: fx.Node, forms: tuple[Lowering, ...]) -> dict[Lowering, float]:
        """The forms that the target has and that are faster than ``form``, each with up to how many steps."""
        if self.target.avoids_loops:
            return {}
        named = {other.name: other for other in forms if other.domains <= set(self.target.domains)}
        return {named[name]: most for name, most in form.short(node).items() if name in named and most > 0}

    @property
    def _caveat(self) -> str:
        return "" if self.target.measured else f"; not measured on {self.target.name!r}"

    def _each(self, program: Program, emit: Emitter, nodes: list[fx.Node], of_form: bool = False) -> int:
        """Lower ``nodes``; ``of_form``: they are what a form was written with, where a loop is none that the model has."""
        changes = 0
        for node in nodes:
            if is_recurrence(node) and (emit.gm is not program.graph_module or is_branch(node)):
                continue  # what stands in a loop's body stays in it
            if not node.users:
                continue  # a form was written from it, and is read in its place
            if forms := forms_of(_op_name(node), self.target):
                mark = emit.mark()
                if self._lower(program, emit, node, forms, of_form):
                    changes += 1 + self._each(program, emit, emit.since(mark), True)
        return changes

    def _lower(
        self, program: Program, emit: Emitter, node: fx.Node, forms: tuple[Lowering, ...], of_form: bool
    ) -> bool:
        """Whether ``node`` was written in another form."""
        where = place_of(node)
        short = short_name(forms[0].op)
        forced = self.forced.get(short)
        self._check_dtype(node, f"{short} at {where}")
        if forced in WHERE_POSSIBLE:
            forms, forced = tuple(sorted(forms, key=lambda form: form.name != forced)), None
        faster = {form: {} if forced is not None else self._faster(form, node, forms) for form in forms}
        always = {form: [other for other, most in few.items() if most == math.inf] for form, few in faster.items()}
        forms = tuple(dict.fromkeys(each for form in forms for each in (*always[form], form)))
        refusals = []
        weights = program.weight_nodes if emit.gm is program.graph_module else []
        for form in forms:
            mark = emit.mark()
            try:
                if forced is not None and form.name != forced:
                    raise Refused(f"{forced} was asked for")
                if missing := form.domains - set(self.target.domains):
                    raise Refused(f"target {self.target.name!r} has no {', '.join(sorted(missing))} operators")
                opset = self.target.check_opset(self.opset)
                if opset < form.opset:
                    raise Refused(f"it needs opset {form.opset}, not {opset}")
                if not self.target.on_cpu and (why := form.cpu_only(node)):
                    raise Refused(why)
                some_steps = not form.timed or always_steps(program.dims, node, form)
                if form.needs_steps and not some_steps:
                    raise Refused("there may be no steps")
                others = {
                    other: int(most)
                    for other, most in faster[form].items()
                    if most != math.inf and (some_steps or not other.needs_steps)
                }
                with emit.before(node):
                    results: list[fx.Node] | None
                    if others:
                        results, few = by_length(emit, node, form, others, weights, some_steps)
                    else:
                        results, few = form.write(emit, node, **self.settings.get(form.name, {})), ""
                if results is not None and form.confirmed_over is not None:
                    _confirm(program, node, results, form)
            except Refused as reason:
                emit.undo(mark)
                refusals.append(f"{form.name}: {reason}")
                continue
            if results is None and of_form:
                return False
            refused = f" ({'; '.join(refusals)})" if refusals else ""
            why = form.why if isinstance(form.why, str) else form.why(node)
            short_ones = f", but {few}" if few else ""
            program.reasons.append(f"{where}: {short} as {form.name}: {why}{short_ones}{self._caveat}{refused}")
            if results is None:
                return False
            for reader in [] if isinstance(node.meta["val"], torch.Tensor) else list(node.users):
                reader.replace_all_uses_with(results[result_index(reader)])
                node.graph.erase_node(reader)
            replace_node(node, results[0])
            return True
        raise UnsupportedOpError(
            f"{short} at {where} has no form for target {self.target.name!r}: {'; '.join(refusals)}"
        )


def _confirm(program: Program, node: fx.Node, results: list[fx.Node], form: Lowering) -> None:
    """Compare ``results`` with those of the loop ``node`` by numbers. Raises Refused where they differ."""
    loop = parts(node)
    pairs = [(reader, results[result_index(reader)]) for reader in node.users]
    boundary = [*loop.carries, *loop.xs, *loop.invariants]
    trip = loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip
    assert form.confirmed_over is not None
    steps = _torch.size_expr(trip)
    error = largest_error_between(pairs, boundary, program.weights, steps, form.confirmed_over)
    if not error <= form.agreement:
        raise Refused(f"it differs by {error:.1e} on random numbers")


def _op_name(node: fx.Node) -> str:
    target = node.target
    if is_recurrence(node):
        return "seqc::recurrence"
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
