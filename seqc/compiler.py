"""``seqc.compile``: the pipeline from a source model to a checked artifact."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.artifact import write_artifact
from seqc.backends.onnx.float32_twin import float32_twin, has_bfloat16
from seqc.backends.onnx.quantize import INT4_OPSET
from seqc.backends.tensorrt.engines import Plan, plan
from seqc.check import LONGEST_BRANCH, CheckReport, check, first_divergence, to_numpy
from seqc.description import manifest_of, memory_of, tolerances
from seqc.errors import UsageError, VerificationError
from seqc.exact import in_float64
from seqc.frontend.outputs import keep_tensors
from seqc.frontend.signature import Signature, bind
from seqc.frontend.source import evaluating, traceable
from seqc.frontend.trace import trace_signature
from seqc.lowerings import SETTINGS
from seqc.lowerings.lower import Lower
from seqc.options import DTYPES, parse_options
from seqc.passes import (
    BY_NAME,
    DEFAULT,
    FillLoops,
    FoldConstants,
    GroupQueries,
    MakeStateful,
    Narrow,
    NarrowNumbers,
    RepeatKeys,
    Sink,
    WidenStates,
)
from seqc.pipeline import Progress, run_passes
from seqc.program import Port, Program, State
from seqc.rewrite import Pass
from seqc.runtime import Session, load
from seqc.runtime.manifest import MODEL_FILE, STEP_FILE
from seqc.streaming.chunks import first_states, in_chunks
from seqc.target import Target, get_target
from seqc.text import text
from seqc.verify import verify

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(repr=False)
class Compiled:
    """A compiled model: call it, look at it, save it.

    ``program``  the Program after all passes
    ``report``   what was done: stages with seconds and node counts, passes with change counts, the check's results
    """

    program: Program
    model: ir.Model
    manifest: dict[str, Any]
    report: dict[str, Any]
    step_model: ir.Model | None = None
    """Of a streaming artifact: the form for one new step, which shares the weights of ``model``."""
    engines: dict[str, bytes] = field(default_factory=dict)
    """What a target that has engines builds of these models, by file name."""
    _session: Session | None = field(default=None)
    _directory: tempfile.TemporaryDirectory[str] | None = field(default=None)

    def __repr__(self) -> str:
        """One line; ``manifest`` and ``report`` say the rest."""
        return f"<Compiled for {self.manifest['target']}: {self.program!r}>"

    def save(self, directory: str | Path) -> Path:
        """Write the artifact; the directory appears complete or not at all. Raises ArtifactError."""
        return write_artifact(
            directory,
            self.model,
            self.manifest,
            self.report,
            text(self.program),
            step=self.step_model,
            engines=self.engines,
        )

    @property
    def session(self) -> Session:
        """A Session on a temporary copy of the artifact, exactly as ``save`` writes it."""
        if self._session is None:
            self._directory = tempfile.TemporaryDirectory(prefix="seqc-")
            self._session = load(self.save(Path(self._directory.name) / "artifact"))
        return self._session

    def run(self, inputs: Arrays) -> Arrays:
        """Run the artifact in ONNX Runtime: arrays by input name to arrays by output name."""
        return self.session.run(inputs)

    def __call__(self, *inputs: torch.Tensor, **named: torch.Tensor) -> Any:
        """Run the artifact on tensors, given by position or by name; returns what the source model returns."""
        names = [p.name for p in self.program.given_inputs]
        if len(inputs) > len(names):
            raise UsageError(f"the model takes {len(names)} inputs ({', '.join(names)}), {len(inputs)} were given")
        given = {**dict(zip(names, inputs, strict=False)), **named}
        outputs = self.run({k: to_numpy(v) for k, v in given.items()})
        leaves = [torch.from_numpy(outputs[p.name]) for p in self.program.own_outputs]
        spec = self.program.out_spec
        return leaves if spec is None else pytree.tree_unflatten(leaves, spec)


def compile(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    *,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    target: str = "onnx",
    stateful: bool = False,
    passes: Sequence[Pass | str] | None = None,
    options: Mapping[str, Any] | Iterable[str] = (),
    opset: int | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a sequence model to an ONNX model of dynamic length, and check it against the source.

    model           nn.Module or ExportedProgram; run in eval mode
    example_inputs  tuple of tensors, or dict by parameter name
    dynamic_shapes  ``{"input_ids": {0: "batch", 1: "sequence"}}``, names or torch.export.Dim; None makes axis 0 of
                    every input of rank two or more ``batch`` and axis 1 ``sequence``
    target          see ``seqc targets``
    stateful        take the sequence piece by piece: states become inputs and outputs, and the runtime's Session gives a
                    Stream that keeps them; what looks ahead is refused
    passes          Pass objects to run instead of the default ones, or "+name" / "-name" to change the default list
    options         ``{"loops": "unroll"}`` or ``["loops=unroll"]``; see ``seqc compile --help``
    opset           of ONNX, 18 to 27; None takes the target's default
    check           compare with the source at lengths 1, the example's, a prime and four times the example's, at
                    batch 1 and 3; a difference raises VerificationError naming the first pass after which it shows
    progress        called as ``progress(stage, nodes, seconds)`` when a stage has ended

    Raises UsageError, UnsupportedModelError (with the source line), UnsupportedOpError, VerificationError, and where engines
    are built MissingExtraError and EngineError.
    """
    chosen = parse_options(options)
    goal = get_target(target)
    engines = plan(goal, chosen)
    if opset is None and chosen["weights"] == "int4":
        opset = max(goal.default_opset, INT4_OPSET)
    version = goal.check_opset(opset)
    if chosen["weights"] == "int4" and version < INT4_OPSET:
        raise UsageError(f"weights=int4 needs opset {INT4_OPSET}, not {version}")
    forced = {k.removeprefix("lowering."): v for k, v in chosen.items() if k.startswith("lowering.") and v != "auto"}
    if chosen["cache"] != "float" and not stateful:
        raise UsageError(f"cache={chosen['cache']} is about what streams keep: compile with --stateful")
    settings = {form: {name: chosen[f"{form}.{name}"] for name in told} for form, told in SETTINGS.items()}
    before = _passes(passes, chosen)
    asked = DTYPES.get(chosen["dtype"])
    narrow: list[Pass] = []
    if asked is not None:
        goal.check_dtype(asked)
        narrow = [Narrow(getattr(torch, asked))]
    if "float64" not in goal.dtypes:
        narrow = [*narrow, NarrowNumbers()]
    # Once more behind Lower: ops written as loops read at full size what Sink moves into them, and what Hoist took out of
    # loops may depend on weights alone.
    again = [p for name in (Sink.name, FoldConstants.name) for p in before if p.name == name]
    steps = [*before, *narrow, Lower(goal, forced, opset=version, settings=settings), *again]
    if goal.engines:
        steps = [*steps, RepeatKeys(), FillLoops()]
    if stateful:
        # before it is decided what is kept: keys are, not their repetitions
        first = [step for step in steps if step.name == GroupQueries.name]
        steps = [*first, WidenStates(), MakeStateful(), *(step for step in steps if step not in first)]
    elif asked is not None:
        steps = [WidenStates(), *steps]
    module, examples, shapes = traceable(model, example_inputs, dynamic_shapes)
    # what is tried on random numbers leaves the user's own sequence of them as it was
    with evaluating(module), torch.random.fork_rng(devices=()):
        signature = bind(module, examples, shapes)
        planned = engines(signature, stateful) if engines is not None else None
        if planned is not None:
            signature = planned.signature
        return _compile(module, signature, goal, version, steps, chosen, check, progress, planned)


def _compile(
    module: nn.Module,
    signature: Signature,
    goal: Target,
    opset: int,
    steps: list[Pass],
    options: dict[str, Any],
    checked: bool,
    progress: Progress | None,
    engines: Plan | None,
) -> Compiled:
    from seqc.backends.onnx import export

    stages: list[dict[str, Any]] = []

    def stage(name: str, nodes: int, seconds: float) -> None:
        stages.append({"stage": name, "nodes": nodes, "seconds": round(seconds, 3)})
        if progress is not None:
            progress(name, nodes, seconds)

    start = time.perf_counter()
    program = trace_signature(module, signature, loops=options["loops"])
    bound(program, goal.longest)
    verify(program)
    stage("trace", program.node_count(), time.perf_counter() - start)
    traced = program.copy()
    records = run_passes(program, steps, stage)
    step = _one_step(traced, steps, program) if program.states else None
    step_model = export(step, opset) if step is not None else None
    start = time.perf_counter()
    model = export(program, opset)
    stage("export", sum(1 for _ in model.graph.all_nodes()), time.perf_counter() - start)
    signature = fixed(signature, program)
    memory = memory_of(traced, program)
    report: dict[str, Any] = {
        "stages": stages,
        "passes": [vars(r) for r in records],
        "peak_activations": memory,
        "check": None,
    }
    tolerance = tolerances(program, options)
    manifest = manifest_of(module, program, goal.name, opset, records, memory, tolerance)
    compiled = Compiled(program, model, manifest, report, step_model)
    narrow = any(map(has_bfloat16, filter(None, (model, step_model))))
    if narrow:
        manifest["computes_in"] = "bfloat16"
        manifest["notes"].append(
            "computes in bfloat16, for which ONNX Runtime has no kernels on a CPU: it runs as an engine"
            + ("; what was checked is the Program in PyTorch, and the ONNX model with float32 in its place" * checked)
        )
    if checked:
        start = time.perf_counter()
        runnable = float32_form(compiled) if narrow else compiled
        source = source_function(module, program, signature.positional)
        exact = in_float64(module, lambda wide: source_function(wide, program, signature.positional))
        result = run_check(source, runnable.run, signature, program, tolerance, exact)
        report["check"] = result.to_json()
        if result.ok and narrow:
            result = run_check(source, on_arrays(runner(program)), signature, program, tolerance, exact)
            report["check_in_bfloat16"] = result.to_json()
        if result.ok and program.states:
            chunks = in_chunks(runnable.session)
            result = run_check(source, chunks, signature, program, tolerance, exact)
            report["check_in_chunks"] = result.to_json()
        manifest["notes"] += _float64_note(result)
        if not result.ok:
            _fail(result, source, traced, steps, runnable, signature, tolerance)
        stage("check", len(result.cases), time.perf_counter() - start)
    if options["weights"] != "float" or options["cache"] != "float":
        from seqc.quantized import Checks, quantized

        start = time.perf_counter()
        checks = Checks(source_function(module, program, signature.positional), signature, tolerance)
        compiled = quantized(compiled, step, options, checks if checked else None)
        stage("quantize", sum(1 for _ in compiled.model.graph.all_nodes()), time.perf_counter() - start)
    if engines is not None:
        _build(engines, compiled, stage)
    return compiled


def _build(engines: Plan, compiled: Compiled, stage: Progress) -> None:
    """Build the engines of the models and hold them in ``compiled``."""
    models = {MODEL_FILE: compiled.model} | ({STEP_FILE: compiled.step_model} if compiled.step_model else {})
    with tempfile.TemporaryDirectory(prefix="seqc-") as folder:
        artifact = compiled.save(Path(folder) / "artifact")
        built = engines.build(artifact, models, compiled.manifest["dims"], stage)
    compiled.engines.update(built.files)
    compiled.manifest["engines"] = built.entries
    compiled.manifest["tools"][engines.package.distribution] = engines.version
    compiled.manifest["notes"] += built.notes
    compiled.report["engines"] = built.report


def _one_step(traced: Program, steps: list[Pass], general: Program) -> Program:
    """The form for one new step, with the states of the general one."""
    program = traced.copy()
    run_passes(program, [MakeStateful(steps=1) if isinstance(step, MakeStateful) else step for step in steps])

    def kinds(states: Sequence[State]) -> list[Any]:
        return [(s.name, s.grows, s.pending, s.initial.dtype) for s in states]

    if kinds(program.states) != kinds(general.states):
        raise VerificationError("the form for one step has other states than the general one")
    return program


def bound(program: Program, longest: int | None) -> None:
    """Give every dimension an upper bound where a target wants one."""
    if longest is None:
        return
    for dim in program.dims:
        if dim.max is None:
            _torch.set_largest(dim.symbol, program.fake_mode, longest)
            program.notes.append(f"dimension {dim.name!r} is at most {longest}: give it an upper bound of its own")
    program.dims = tuple(replace(d, max=longest) if d.max is None else d for d in program.dims)


def run_check(
    source: Callable[[dict[str, torch.Tensor]], Arrays],
    compiled: Callable[[Arrays], Arrays],
    signature: Signature,
    program: Program,
    tolerance: Mapping[str, float],
    exact: Callable[[dict[str, torch.Tensor]], Mapping[str, np.ndarray[Any, Any]]] | None = None,
) -> CheckReport:
    """The check of the design, also beyond long traced lengths and on both sides of every branch on a size."""
    longest = max((d.traced for d in program.dims), default=1)
    extra = [longest, 2 * longest + 1] if longest > 16 else []
    for size in (size for d in program.dims for size, _ in d.branches if size <= LONGEST_BRANCH):
        extra += [size] if size <= longest else [size, size + 1, 2 * size + 1]
    return check(source, compiled, signature, extra, tolerance, exact=exact)


def _float64_note(result: CheckReport) -> list[str]:
    errors = [case.source_error for case in result.cases if case.source_error is not None]
    if not errors:
        return []
    return [
        f"at {len(errors)} of {len(result.cases)} sizes the source model is off from itself in float64 by up to "
        f"{max(errors):.2g} of an output's scale; there the compiled model, which is nearer, was compared with float64"
    ]


def fixed(signature: Signature, program: Program) -> Signature:
    """The signature without the dimensions that the program holds at one size."""
    names = {d.name for d in program.dims}
    axes = {n: {a: d for a, d in axes.items() if d in names} for n, axes in signature.axes.items()}
    dims = {n: d for n, d in signature.dims.items() if n in names}
    return Signature(signature.examples, axes, dims, signature.positional)


def source_function(
    module: nn.Module, program: Program, positional: bool
) -> Callable[[dict[str, torch.Tensor]], Arrays]:
    """The source model as a function from tensors by input name to arrays by output name."""

    def run(inputs: dict[str, torch.Tensor]) -> Arrays:
        with torch.no_grad():
            out = module(*inputs.values()) if positional else module(**inputs)
        leaves = pytree.tree_leaves(keep_tensors(out, "output", []))
        return {p.name: _array(p, leaf) for p, leaf in zip(program.own_outputs, leaves, strict=True)}

    return run


def _array(port: Port, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.is_complex() and not port.dtype.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj())
    return to_numpy(tensor)


def _fail(
    result: CheckReport,
    source: Callable[[dict[str, torch.Tensor]], Arrays],
    traced: Program,
    steps: list[Pass],
    compiled: Compiled,
    signature: Signature,
    tolerance: Mapping[str, float],
) -> None:
    """Raise, naming the first stage after which the outputs differ."""
    from seqc.check import case_inputs

    case = next(c for c in result.cases if not c.ok)
    snapshots: list[tuple[str, Callable[[dict[str, torch.Tensor]], Arrays]]] = [("trace", runner(traced.copy()))]
    for step in steps:
        step(traced)
        snapshots.append((f"pass {step.name}", runner(traced.copy())))
    snapshots.append(("export", lambda inputs: compiled.run({k: to_numpy(v) for k, v in inputs.items()})))
    inputs = case_inputs(signature, case.sizes, case.seed)
    guilty = first_divergence(source, snapshots, inputs, tolerance)
    lines = dict.fromkeys(line for d in traced.dims for _, line in d.branches)
    hint = f"; the model branches on a size, which the graph cannot follow, at {', '.join(lines)}" if lines else ""
    try:
        result.raise_if_failed()
    except VerificationError as error:
        stage = guilty or "unknown"
        raise VerificationError(f"{error}; the first stage after which it differs is {stage}{hint}") from None


def float32_form(compiled: Compiled) -> Compiled:
    """``compiled`` with float32 in place of bfloat16, to be run and not to be kept."""
    step = compiled.step_model
    return replace(
        compiled,
        model=float32_twin(compiled.model),
        step_model=None if step is None else float32_twin(step),
        _session=None,
        _directory=None,
    )


def on_arrays(run: Callable[[dict[str, torch.Tensor]], Arrays]) -> Callable[[Arrays], Arrays]:
    """``run`` as a function of arrays."""
    return lambda arrays: run({name: torch.from_numpy(array) for name, array in arrays.items()})


def runner(program: Program) -> Callable[[dict[str, torch.Tensor]], Arrays]:
    """The Program in PyTorch, from its first states on, as a function from tensors to arrays, both by name."""

    def run(inputs: dict[str, torch.Tensor]) -> Arrays:
        values = [inputs[p.name] for p in program.given_inputs]
        values = [
            torch.view_as_real(v) if v.is_complex() and not p.dtype.is_complex else v
            for v, p in zip(values, program.given_inputs, strict=True)
        ]
        results = program(*values, *first_states(program, inputs))
        return {p.name: _array(p, v) for p, v in zip(program.own_outputs, results, strict=False)}

    return run


def _passes(passes: Sequence[Pass | str] | None, options: dict[str, Any]) -> list[Pass]:
    """The passes to run: the default list, changed by "+name" and "-name", or the given Pass objects."""
    default = [p for p in DEFAULT if options.get(p.name) != "off"]
    if passes is None:
        return default
    objects = [p for p in passes if not isinstance(p, str)]
    changes = [p for p in passes if isinstance(p, str)]
    if objects and changes:
        raise UsageError("passes takes Pass objects, or '+name' and '-name', not both")
    if not changes:
        return objects
    chosen = list(default)
    for change in changes:
        sign, name = change[:1], change[1:]
        if sign not in "+-" or name not in BY_NAME:
            raise UsageError(f"passes takes +NAME or -NAME with one of {', '.join(BY_NAME)}, not {change!r}")
        chosen = [p for p in chosen if p.name != name] + ([BY_NAME[name]] if sign == "+" else [])
    return chosen
