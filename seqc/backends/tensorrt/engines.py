"""The engines of a compiled model: what is asked of them, their build, and what the manifest and the report say of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from seqc.backends.tensorrt.build import build_engine, refused_sm
from seqc.backends.tensorrt.log import Kernel, read_log
from seqc.backends.tensorrt.package import PACKAGES, Package
from seqc.backends.tensorrt.profiles import asked_ranges, bounded, ranges_of, shapes, sizes
from seqc.backends.tensorrt.refused import check_taken
from seqc.backends.tensorrt.settings import Range
from seqc.backends.tensorrt.where import Origins
from seqc.errors import EngineError, UsageError
from seqc.frontend.signature import Signature
from seqc.pipeline import Progress
from seqc.target import Target


@dataclass(frozen=True)
class Engines:
    """Engines by file name, their entries in the manifest, and what the report says of each."""

    files: dict[str, bytes]
    entries: list[dict[str, Any]]
    report: list[dict[str, Any]]
    notes: list[str]
    """What the user is to know of them."""


@dataclass(frozen=True)
class Plan:
    """What is asked of the engines of one model, checked before anything is traced."""

    package: Package
    version: str
    sms: tuple[int, ...]
    named: bool
    """Whether the user named these."""
    workspace: int
    ranges: dict[str, Range]
    signature: Signature
    """With an upper bound of every dimension."""
    notes: tuple[str, ...]
    """What the user is to know, such as bounds that nobody gave."""

    def build(self, folder: Path, models: Mapping[str, ir.Model], dims: Mapping[str, Any], stage: Progress) -> Engines:
        """An engine of each of ``models``, by the name of its ONNX file in ``folder``; ``dims`` are the manifest's.

        A GPU that nobody named, and for which the package cannot build, is left out with a note.

        Raises UnsupportedOpError and EngineError, see :func:`seqc.backends.tensorrt.build.build_engine`.
        """
        for model in models.values():
            check_taken(model, self.package.title)
        try:
            return self._build(folder, models, dims, stage)
        except EngineError as error:
            without = refused_sm(str(error))
            if self.named or without not in self.sms:
                raise
            note = f"there is no engine for sm={without}, which --opt sm did not name: {error}"
            fewer = replace(self, sms=tuple(sm for sm in self.sms if sm != without), notes=(*self.notes, note))
            return fewer.build(folder, models, dims, stage)

    def _build(self, folder: Path, models: Mapping[str, ir.Model], dims: Mapping[str, Any], stage: Progress) -> Engines:
        ranges = ranges_of(dims, self.signature.example_sizes(), self.ranges)
        engines = Engines({}, [], [], list(self.notes))
        for name, model in models.items():
            file = Path(name).with_suffix(".engine").name
            ports = [(v.name or "", sizes(v)) for v in model.graph.inputs]
            origins, count = Origins(model), sum(1 for _ in model.graph.all_nodes())
            content, log = build_engine(
                self.package,
                folder / name,
                origins,
                shapes(ports, ranges),
                sms=self.sms,
                workspace=self.workspace,
                phase=functools.partial(_show, stage, file, count),
            )
            built = read_log(log)
            used = {size for _, port in ports for size in port if isinstance(size, str)}
            engines.files[file] = content
            engines.entries.append(
                {
                    "file": file,
                    "sm": list(self.sms),
                    "profiles": [{n: vars(r) for n, r in ranges.items() if n in used}],
                    "kernels": len(built.kernels),
                    "has_step_loop": built.has_loop,
                    **built.memory,
                    "precision": _precision(model),
                    "package": self.package.distribution,
                    "version": self.version,
                }
            )
            engines.report.append({"file": file, "kernels": [_kernel(k, origins) for k in built.kernels]})
        return engines


def plan(target: Target, options: Mapping[str, Any]) -> Callable[[Signature, bool], Plan] | None:
    """What of a plan is known without a model: call it with the signature. None where no engines are built.

    Raises UsageError for compute capabilities that the package does not know, and for options that the target does not take;
    MissingExtraError where the package is not installed.
    """
    given = [k for k in options if k.startswith("profile.") or (k in ("sm", "workspace") and options[k])]
    if not target.engines or options["engines"] == "off":
        if given:
            why = "with engines=off" if target.engines else f"for target {target.name!r}"
            raise UsageError(f"option {given[0]!r} is about engines, and none are built {why}")
        return None
    package = PACKAGES[target.engines]
    sms = package.check_sms(options["sm"])
    version = package.version()

    def of(signature: Signature, stateful: bool) -> Plan:
        ranges = asked_ranges(options, signature, stateful)
        limited = bounded(signature, ranges)
        assumed = [
            f"dimension {n!r} is at most {limited.dims[n].max}, for want of a bound: set --opt profile.{n}=MIN,OPT,MAX"
            for n, axis in signature.dims.items()
            if axis.max is None and n not in ranges
        ]
        notes = ("the engines were built and not run: what was checked is the ONNX model they are built of", *assumed)
        return Plan(package, version, sms, bool(options["sm"]), options["workspace"], ranges, limited, notes)

    return of


def _show(stage: Progress, file: str, nodes: int, phase: str, seconds: float) -> None:
    stage(f"{file}: {phase}", nodes, seconds)


def _precision(model: ir.Model) -> list[str]:
    """The floating-point types that the model computes with."""
    types = {value.dtype for node in model.graph.all_nodes() for value in node.outputs}
    return sorted(str(t.numpy()) for t in types if t is not None and t.is_floating_point())


def _kernel(kernel: Kernel, origins: Origins) -> dict[str, Any]:
    """A kernel with the modules and lines whose operations it computes."""
    found = [origin for node in kernel.nodes if (origin := origins.get(node)) is not None]
    return {
        **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(kernel).items()},
        "modules": list(dict.fromkeys(o.module for o in found if o.module)),
        "source": list(dict.fromkeys(o.source for o in found if o.source)),
    }
