"""The runtime alone as a wheel: pure Python, without torch and without the compiler."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from importlib import resources

import seqc
from seqc.deploy.archive import add
from seqc.runtime.manifest import Manifest

DISTRIBUTION = "seqc-runtime"
NUMPY, ONNXRUNTIME, ONNXRUNTIME_GPU = "numpy>=2.0", "onnxruntime>=1.24", "onnxruntime-gpu>=1.24"
CUDA = "cuda-bindings>=12.9"
"""Through which the runtime of engines has memory of a GPU."""

_FROM_SEQC = ("errors.py", "py.typed")
"""What the runtime needs of the package ``seqc`` besides its own folder."""

_INIT = '''"""The runtime of seqc alone: ``seqc.runtime.load(directory)`` runs artifacts that seqc compiled."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "{version}"

# both distributions own these files: pip lets one overwrite the other, and nobody could say which version runs
if any(Path(__file__).resolve().parents[1].glob("seqc-*.dist-info")):
    raise ImportError("seqc and seqc-runtime are installed over each other: uninstall both, then install one of them")


def __getattr__(name: str) -> Any:
    if name in ("runtime", "errors"):
        return importlib.import_module(f"seqc.{{name}}")
    if name in ("compile", "Compiled", "trace", "Program", "passes"):
        raise AttributeError(f"seqc.{{name}} is part of the compiler, and this is the runtime alone: install seqc")
    raise AttributeError(f"module 'seqc' has no attribute {{name!r}}")
'''


def wheel_name() -> str:
    """The file name of the wheel, as PEP 427 has it."""
    return f"seqc_runtime-{seqc.__version__}-py3-none-any.whl"


def needed(manifest: Manifest, gpu: bool = False) -> tuple[str, ...]:
    """What runs an artifact, besides numpy: the package that built its engines, in that version, which alone reads them, or
    where it has none onnxruntime (``gpu``: onnxruntime-gpu).
    """
    packages = {str(e["package"]): str(e["version"]) for e in manifest.engines if "package" in e and "version" in e}
    if not packages:
        return (ONNXRUNTIME_GPU if gpu else ONNXRUNTIME,)
    return (*(f"{name}=={version}" for name, version in sorted(packages.items())), CUDA)


def runtime_wheel(needs: Sequence[str] = (ONNXRUNTIME,)) -> bytes:
    """The wheel (PEP 427): the same bytes for the same seqc. It requires numpy and ``needs``, see :func:`needed`.

    Its package ``seqc`` has ``seqc.runtime`` and ``seqc.errors``; what needs the compiler says so. Where the full seqc lies in
    the same folder, importing it is an error.
    """
    files = {"seqc/__init__.py": _INIT.format(version=seqc.__version__).encode()}
    files |= {f"seqc/{name}": resources.files("seqc").joinpath(name).read_bytes() for name in _FROM_SEQC}
    files |= {
        f"seqc/runtime/{file.name}": file.read_bytes()
        for file in sorted(resources.files("seqc.runtime").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".py")
    }
    info = f"seqc_runtime-{seqc.__version__}.dist-info"
    files[f"{info}/METADATA"] = _metadata(needs).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: seqc\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD").encode()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            add(archive, name, io.BytesIO(content), len(content))
    return data.getvalue()


def _metadata(needs: Sequence[str]) -> str:
    lines = (
        "Metadata-Version: 2.1",
        f"Name: {DISTRIBUTION}",
        f"Version: {seqc.__version__}",
        "Summary: Runs artifacts that seqc compiled. Needs neither torch nor the compiler.",
        "License: Apache-2.0",
        "Requires-Python: >=3.11",
        f"Requires-Dist: {NUMPY}",
        *(f"Requires-Dist: {need}" for need in needs),
    )
    return "\n".join(lines) + "\n"


def _record(files: Mapping[str, bytes], itself: str) -> str:
    """Hash and size of each file; those of the record itself stay empty."""
    rows = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    return "\n".join([*rows, f"{itself},,"]) + "\n"


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
