"""Builds one engine; runs in a process of its own, since TensorRT's parser may abort it and its logger is one per process.

``python -m seqc.backends.tensorrt.child SETTINGS.json``. The settings name the files; see :func:`build`. Phases go to stdout,
one line ``@phase NAME SECONDS`` as each ends, what TensorRT logs to the file ``log`` at once, so that it is there after
an abort. ``result`` is written last.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_SHOWN = 2  # Phases nested deeper are thousands.
_SHORT = {
    "Cloning network graph": "clone",
    "Preparing graph for optimization": "prepare",
    "Building engine from subgraph": "build",
}
_WORST = ("INTERNAL_ERROR", "ERROR")


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    with Path(settings["log"]).open("w", encoding="utf-8", errors="replace", buffering=1) as log:
        result = build(settings, log)
    Path(settings["result"]).write_text(json.dumps(result), "utf-8")


def build(settings: dict[str, Any], log: Any) -> dict[str, Any]:
    """Build the engine; returns {} or, where it cannot be built, {stage, message, node, operator}.

    Settings: ``module``, ``onnx``, ``engine`` and ``parent`` (a process id); ``sms``; ``shapes``, by input the smallest, best
    and largest; ``workspace`` in bytes (0: no limit).
    """
    phase = _Phases()
    if problem := _check(settings["onnx"]):
        return {"stage": "check", "message": problem}
    phase("check")
    trt = importlib.import_module(settings["module"])
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rpartition(".")[2]
            if name in _WORST:
                errors.append(message)
            log.write(f"[{name}] {message}\n")

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.depth: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.depth[name] = self.depth.get(parent or "", 0) + 1

        def step_complete(self, name: str, step: int) -> bool:
            return os.getppid() == int(settings["parent"])  # False cancels: nobody waits for the engine

        def phase_finish(self, name: str) -> None:
            if self.depth.get(name, 0) == _SHOWN:
                phase(_SHORT.get(name, name))

    logger, monitor = Log(), Monitor()
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        return {"stage": "start", "message": _first(errors, str(error))}
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(settings["onnx"]):
        return {"stage": "parse", "message": _first(errors, "no reason given"), **_refusal(parser)}
    phase("parse")
    config = builder.create_builder_config()
    if settings["sms"]:
        config.num_compute_capabilities = len(settings["sms"])
        for i, sm in enumerate(settings["sms"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    if settings["workspace"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace"])
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        profile.set_shape(name, *settings["shapes"][name])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"stage": "build", "message": _first(errors, "no reason given")}
    Path(settings["engine"]).write_bytes(memoryview(engine))
    phase("write")
    return {}


class _Phases:
    def __init__(self) -> None:
        self.since = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        print(f"@phase {now - self.since:.3f} {name}", flush=True)
        self.since = now


def _check(path: str) -> str:
    """What is wrong with the model: TensorRT takes empty files, unknown attributes and wrong shapes without a word."""
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        return str(error)
    return ""


def _refusal(parser: Any) -> dict[str, str]:
    """The parser's first error, if it tells any."""
    if not parser.num_errors:
        return {}
    refusal = parser.get_error(0)
    reason = refusal.desc() if refusal.desc() != "false" else "it has no such operator"  # the text of an assertion
    return {"message": reason, "node": refusal.node_name(), "operator": refusal.node_operator()}


def _first(errors: list[str], otherwise: str) -> str:
    return errors[0] if errors else otherwise


if __name__ == "__main__":
    main()
