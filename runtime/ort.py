"""The one place that touches onnxruntime: imported when first needed, its errors told in one line."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqc.errors import ArtifactError, MissingExtraError
from seqc.runtime.backend import Kept
from seqc.runtime.inputs import Array, nearest

Provider = str | tuple[str, dict[str, Any]]

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_LOG_ERRORS = 3
_LOG_FATAL = 4

RELEASED_OPSET = 26
"""The newest opset that onnxruntime 1.31 loads without being told to."""

_RELEASED_ONLY = "ALLOW_RELEASED_ONNX_OPSET_ONLY"
_environment = threading.Lock()


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingExtraError: it is not installed, or what is installed cannot be imported; names the extras that
            provide it.
    """
    install = "install it with pip install 'seqc[cpu]', or 'seqc[gpu]' for an NVIDIA GPU (not both)"
    try:
        module = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise MissingExtraError(f"onnxruntime needs {error.name}, which is not installed: {install}") from error
        raise MissingExtraError(f"onnxruntime is not installed: {install}") from error
    except ImportError as error:
        raise MissingExtraError(f"onnxruntime cannot be imported ({_line(error)}): {install}") from error
    # removing one of onnxruntime and onnxruntime-gpu while both were installed leaves an empty package behind
    if not hasattr(module, "InferenceSession"):
        raise MissingExtraError(f"the onnxruntime that is installed is damaged: uninstall it, then {install}")
    return module


def open_session(path: Path, providers: Sequence[Provider] | None, opset: int = 0, computes_in: str = "") -> Any:
    """An ``onnxruntime.InferenceSession`` of the model at ``path``, which declares ``opset``, and has values of the type
    ``computes_in`` where it has some for which there may be no kernels.

    Without ``providers`` a CUDA GPU is used where there is one, and the CPU otherwise. An opset that onnxruntime takes for
    unreleased is loaded all the same, unless the environment variable ALLOW_RELEASED_ONNX_OPSET_ONLY says otherwise.

    Raises:
        MissingExtraError: onnxruntime is missing.
        ArtifactError: a provider is unknown or cannot start on this machine, or onnxruntime cannot load the model.
    """
    with unreleased_opset() if opset > RELEASED_OPSET else contextlib.nullcontext():
        try:
            return _open_session(path, providers)
        except ArtifactError as error:
            lacking = re.search(r"Could not find an implementation for (\w+)\(\d+\) node", str(error))
            if not computes_in or lacking is None:
                raise
            where = f"with {', '.join(map(_name, providers))}" if providers else "here"
            raise ArtifactError(
                f"onnxruntime {where} has no {lacking[1]} in {computes_in}, in which {path} computes: that is for engines: run "
                "them on a GPU (--provider tensorrt-rtx, or tensorrt), or compile with --dtype fp16 for onnxruntime"
            ) from error


@contextlib.contextmanager
def unreleased_opset() -> Iterator[None]:
    """Inside, onnxruntime loads models of opsets that were not released when it was; it has no session option for that."""
    with _environment:
        given = os.environ.get(_RELEASED_ONLY)
        os.environ.setdefault(_RELEASED_ONLY, "0")
        try:
            yield
        finally:
            if given is None:
                del os.environ[_RELEASED_ONLY]


def _open_session(path: Path, providers: Sequence[Provider] | None) -> Any:
    ort = import_onnxruntime()
    available: list[str] = ort.get_available_providers()
    if providers is None:
        try:
            return _open(ort, path, [p for p in (_CUDA, _CPU) if p in available])
        except ArtifactError:
            if _CUDA not in available:
                raise
            return _open(ort, path, [_CPU])
    if isinstance(providers, str) or not providers:
        raise ArtifactError(f"providers must be a list of names out of {', '.join(available)}, got {providers!r}")
    names = [_name(provider) for provider in providers]
    for name in names:
        if names.count(name) > 1:
            raise ArtifactError(f"provider {name!r} is named twice: onnxruntime would drop the second with its options")
        if name not in available:
            known: list[str] = ort.get_all_providers()
            hint = ", it was built without it:" if name in known else nearest(name, known) or ":"
            raise ArtifactError(f"onnxruntime here has no provider {name!r}{hint} available are {', '.join(available)}")
    if any(not isinstance(p, str) and p[0] == _CPU and p[1] for p in providers):
        raise ArtifactError(f"provider {_CPU!r} takes no options: onnxruntime would ignore them")
    session = _open(ort, path, list(providers))
    active = session.get_providers()
    for name in names:
        # onnxruntime drops a provider whose libraries or device are missing, and runs on the CPU instead
        if name not in active:
            raise ArtifactError(f"provider {name!r} cannot start on this machine: started are {', '.join(active)}")
    return session


def _name(provider: Provider) -> str:
    match provider:
        case str():
            return provider
        case (str(name), dict()):
            return name
    raise ArtifactError(f"a provider is a name or a pair of a name and a dict of options, not {provider!r}")


def keep(array: Array, device: str = "cpu") -> Kept:
    """``array``, which must not be written to any more, as an OrtValue."""
    plain = np.ascontiguousarray(array).reshape(array.shape)
    value: Kept = import_onnxruntime().OrtValue.ortvalue_from_numpy(plain, device)
    return value


class OnnxModel:
    """A model that onnxruntime runs: a :class:`~seqc.runtime.backend.Backend`."""

    def __init__(self, ort_session: Any) -> None:
        self._session = ort_session
        self._device = "cuda" if ort_session.get_providers()[0] == _CUDA else "cpu"
        self.inputs = tuple(node.name for node in ort_session.get_inputs())
        self.outputs = tuple(node.name for node in ort_session.get_outputs())

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self._session.get_providers())

    def keep(self, name: str, array: Array) -> Kept:
        return keep(array, self._device)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        return run_session(self._session, outputs, dict(inputs))

    def run_bound(
        self,
        inputs: Mapping[str, Array],
        states: Mapping[str, Kept],
        outputs: Sequence[str],
        kept: Mapping[str, Kept | None],
    ) -> tuple[list[Array], tuple[Kept, ...]]:
        """See :meth:`~seqc.runtime.backend.Backend.run_bound`; what has a value already is written to it."""
        binding = self._session.io_binding()
        # held until the run is over: a binding does not keep what it reads alive
        given = {**{n: keep(a) for n, a in inputs.items()}, **states}
        with _running() as options:
            for name, value in given.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            for name, place in kept.items():
                if place is None:
                    binding.bind_output(name, self._device)
                else:
                    binding.bind_ortvalue_output(name, place)
            self._session.run_with_iobinding(binding, options)
            values = binding.get_outputs()
        # what comes back of a value that was given does not keep its memory alive
        following = tuple(place or new for place, new in zip(kept.values(), values[len(outputs) :], strict=True))
        return [v.numpy().copy() for v in values[: len(outputs)]], following


def run_session(ort_session: Any, outputs: Sequence[str], inputs: dict[str, Any]) -> list[Any]:
    """Run with checked inputs.

    Raises:
        ArtifactError: onnxruntime failed inside the model.
    """
    with _running() as options:
        result: list[Any] = ort_session.run(list(outputs), inputs, options)
    return result


@contextlib.contextmanager
def _running() -> Iterator[Any]:
    """Options for a run; what onnxruntime raises inside becomes an ArtifactError."""
    options = import_onnxruntime().RunOptions()
    # the exception says it; onnxruntime would print it a second time
    options.log_severity_level = _LOG_FATAL
    try:
        yield options
    except MemoryError:
        raise
    except Exception as error:
        raise ArtifactError(f"onnxruntime failed while running the model: {_line(error)}") from error


def _open(ort: Any, path: Path, providers: list[Provider]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    # else products with int4 weights would round what they are multiplied with to int8
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        # without enable_fallback=0 a failing provider is reported on stdout and replaced by the CPU
        return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except MemoryError:
        raise
    except Exception as error:
        raise ArtifactError(f"onnxruntime cannot load {path}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The first line of an error, without onnxruntime's own prefix."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0]) if lines else type(error).__name__
