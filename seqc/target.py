"""What a model is compiled for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from seqc.errors import UsageError


@dataclass(frozen=True)
class Target:
    """What a runtime can execute: the range of ONNX opsets it takes, and the one used where none is asked for;
    ``opsets_end`` says why it takes none beyond.

    ``runs_on`` names the program that loads the artifact; ``dtypes`` the element types (numpy names) it computes with;
    ``domains`` the operator domains it has besides the standard one. ``avoids_loops`` says that a loop costs a kernel for each
    operation of each step there. ``longest`` is the size up to which a dimension without an upper bound can be used (None:
    any). ``on_cpu`` says that it runs on a CPU; ``measured`` is False where the order of forms follows from what is known of
    the runtime, not from measurements on it. ``engines`` is the package that builds engines of the ONNX model, empty where none
    are built.
    """

    name: str
    summary: str
    runs_on: str
    opsets: range
    default_opset: int
    opsets_end: str = ""
    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "int64", "int32", "bool")
    domains: tuple[str, ...] = ()
    avoids_loops: bool = False
    longest: int | None = None
    on_cpu: bool = True
    measured: bool = True
    engines: str = ""

    def check_dtype(self, asked: str) -> None:
        """Raises UsageError where the target does not compute in the floating-point type ``asked``."""
        if asked not in self.dtypes:
            raise UsageError(f"target {self.name!r} has no kernels for {asked}: take float16, or target tensorrt-rtx")

    def check_opset(self, asked: int | None) -> int:
        """The opset to emit. Raises UsageError where ``asked`` is outside the range."""
        if asked is None:
            return self.default_opset
        if asked not in self.opsets:
            why = "" if asked < self.opsets.stop else self.opsets_end
            raise UsageError(
                f"target {self.name!r} takes opsets {self.opsets.start} to {self.opsets.stop - 1}, not {asked}{why}"
            )
        return asked


_OWN_ARE_FASTER = ": by default ONNX Runtime refuses newer ones, and for what 27 adds it has operators of its own"

_TENSORRT = Target(
    name="tensorrt",
    summary="engines of TensorRT, built on the GPU they are for: standard operators without plugins, scans without loops",
    runs_on="onnxruntime",
    opsets=range(18, 25),
    default_opset=20,
    dtypes=("float32", "float16", "bfloat16", "int64", "int32", "bool"),
    avoids_loops=True,
    longest=65536,
    engines="tensorrt",
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnx",
            summary="standard ONNX operators only; runs on ONNX Runtime on CPUs and GPUs",
            runs_on="onnxruntime",
            opsets=range(18, 28),
            default_opset=20,
            opsets_end=": ONNX Runtime, in which compiled models are checked, cannot load newer ones",
        ),
        Target(
            name="ort-cpu",
            summary="ONNX Runtime on a CPU, with its own operators where they are faster",
            runs_on="onnxruntime",
            opsets=range(18, 27),
            default_opset=20,
            opsets_end=_OWN_ARE_FASTER,
            domains=("com.microsoft",),
        ),
        Target(
            name="ort-cuda",
            summary="ONNX Runtime on an NVIDIA GPU: its own operators first, then forms without loops; not measured yet",
            runs_on="onnxruntime",
            opsets=range(18, 27),
            default_opset=20,
            opsets_end=_OWN_ARE_FASTER,
            domains=("com.microsoft",),
            avoids_loops=True,
            longest=65536,
            on_cpu=False,
            measured=False,
        ),
        _TENSORRT,
        replace(
            _TENSORRT,
            name="tensorrt-rtx",
            summary="engines of TensorRT for RTX, built without a GPU for the compute capabilities named (--opt sm=89,120)",
            engines="tensorrt_rtx",
        ),
    )
}


def get_target(name: str) -> Target:
    """The target of that name. Raises UsageError that suggests the nearest name."""
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown target {name!r}{hint} (targets: {', '.join(TARGETS)})")
