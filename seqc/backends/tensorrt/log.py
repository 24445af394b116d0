"""Reads what TensorRT logs of a build: the list of kernels, loops among them, memory, the node it was at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

# On the host, or between streams.
_CONTROL = frozenset({"shape_call", "signal", "wait", "cjmp", "jmp", "ShapeHostToDevice"})
_MEMORY = {
    "scratch_bytes": "Max Scratch Memory",
    "activation_bytes": "Total Activation Memory",
    "weight_bytes": "Total Weights Memory",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine: TensorRT's name and kind, what it gives (``Float[-1,32]``), and the ONNX nodes in it.

    ``in_loop`` says that the engine comes back to it: it runs once for each step of a loop.
    """

    name: str
    kind: str
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    in_loop: bool = False


@dataclass(frozen=True)
class BuildLog:
    """What is known of an engine from the log of its build."""

    kernels: tuple[Kernel, ...]
    has_loop: bool
    memory: dict[str, int]


def read_log(text: str) -> BuildLog:
    """Parse the log. Raises ValueError where it has no list of layers, or memory is not told."""
    _, found, rest = text.rpartition("] Layers:")
    if not found:
        raise ValueError("the log of the build lists no layers")
    lines = [line for line in rest.split("\n\n")[0].splitlines() if line.startswith("Name: ")]
    memory = {}
    for key, title in _MEMORY.items():
        told = re.findall(rf"{title}: (\d+)", text)
        if not told:
            raise ValueError(f"the log of the build does not tell the {title.lower()}")
        memory[key] = int(told[-1])
    layers = [_layer(line) for line in lines]
    loops = _loops(lines, [layer.name for layer in layers])
    kernels = [
        replace(layer, in_loop=any(i in loop for loop in loops))
        for i, (layer, line) in enumerate(zip(layers, lines, strict=True))
        if not _on_host(layer, line)
    ]
    return BuildLog(tuple(kernels), bool(loops), memory)


def parsed_last(text: str) -> str:
    """The node that the parser was at when the log ended; empty where it had begun none."""
    found = re.findall(r"Parsing node: (\S+) \[", text)
    return found[-1] if found else ""


def _layer(line: str) -> Kernel:
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    kind = rest.partition(",")[0]
    given = re.search(r"Outputs: \[(.*?)\}\], ", rest)
    outputs = re.findall(r"Dimensions: (\[[^\]]*\]).*?Datatype: (\w+)", given[1]) if given else []
    return Kernel(
        name, kind, tuple(f"{t}{d}" for d, t in outputs), tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", rest))
    )


def _on_host(layer: Kernel, line: str) -> bool:
    """Whether a layer is no kernel: control, or a counter or offset of a loop, a single number without a tactic."""
    counter = "TacticName: ," in line and all(d == "[1]" for d in re.findall(r"Dimensions: (\[[^\]]*\])", line))
    return layer.kind in _CONTROL or (counter and not layer.nodes)


def _loops(lines: Sequence[str], names: Sequence[str]) -> list[range]:
    """The layers between a jump and an earlier one that it goes back to: the body of a loop."""
    places = {name: i for i, name in enumerate(names)}
    return [
        range(places[target], i + 1)
        for i, line in enumerate(lines)
        for target in re.findall(r"JumpTarget(?:Then|Else)?: ([^,\s]+)", line)
        if places.get(target, i + 1) <= i
    ]
