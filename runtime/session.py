"""A session: a compiled artifact, loaded, that turns named arrays into named arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqc.errors import ArtifactError
from seqc.runtime import manifest as manifests
from seqc.runtime.files import check_files
from seqc.runtime.inputs import Array, prepare
from seqc.runtime.manifest import MODEL_FILE, DimRange, Manifest, Port
from seqc.runtime.ort import Provider, open_session, run_session


class Session:
    """A loaded artifact; make one with :func:`load`. ``run`` may be called from several threads."""

    def __init__(self, manifest: Manifest, ort_session: Any) -> None:
        self._manifest = manifest
        self._ort = ort_session
        for kind, ports, nodes in (
            ("inputs", manifest.inputs, ort_session.get_inputs()),
            ("outputs", manifest.outputs, ort_session.get_outputs()),
        ):
            named, found = [p.name for p in ports], [n.name for n in nodes]
            if sorted(named) != sorted(found):
                raise ArtifactError(
                    f"the manifest names the {kind} {', '.join(named)} but {MODEL_FILE} has {', '.join(found)}"
                )

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Name, dtype and shape of what ``run`` takes."""
        return self._manifest.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Name, dtype and shape of what ``run`` returns."""
        return self._manifest.outputs

    @property
    def dims(self) -> Mapping[str, DimRange]:
        """The range of each named dimension."""
        return self._manifest.dims

    @property
    def providers(self) -> tuple[str, ...]:
        """The onnxruntime execution providers in use, in order of preference."""
        return tuple(self._ort.get_providers())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once.

        Args:
            inputs: one array per name in :attr:`inputs`, of exactly its dtype and of a shape that fits.

        Returns:
            One array per name in :attr:`outputs`, in that order.

        Raises:
            ArtifactError: an input does not fit (one line: what was expected and what was given), or onnxruntime
                failed.
        """
        names = [port.name for port in self.outputs]
        arrays = prepare(self.inputs, self.dims, inputs)
        return dict(zip(names, run_session(self._ort, names, arrays), strict=True))


def load(directory: str | Path, providers: Sequence[Provider] | None = None) -> Session:
    """Load the artifact in ``directory`` after comparing every file in it with the hashes in its manifest.

    Args:
        directory: what ``seqc compile -o`` or ``Compiled.save`` wrote.
        providers: onnxruntime execution providers, as names or (name, options) pairs, passed through; by default a CUDA
            GPU where there is one, else the CPU.

    Raises:
        ArtifactError: the artifact is missing, damaged or altered, or a provider is not available.
        MissingExtraError: onnxruntime is not installed.
    """
    directory = Path(directory)
    manifest = manifests.read(directory)
    if manifest.states:
        raise ArtifactError(f"{directory} is a streaming artifact, which this version of the runtime cannot run")
    check_files(directory, manifest)
    return Session(manifest, open_session(directory / MODEL_FILE, providers, manifest.opset))
