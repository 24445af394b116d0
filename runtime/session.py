"""A session: a compiled artifact, loaded, that turns named arrays into named arrays."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from seqc.errors import ArtifactError, UsageError
from seqc.runtime import manifest as manifests
from seqc.runtime import tensorrt
from seqc.runtime.backend import Backend, Kept
from seqc.runtime.files import check_files
from seqc.runtime.generate import Generator, OnToken, prompts_of, token_ports
from seqc.runtime.inputs import Array, prepare
from seqc.runtime.manifest import MODEL_FILE, STEP_FILE, DimRange, Manifest, Port
from seqc.runtime.ort import OnnxModel, Provider, open_session
from seqc.runtime.rows import Rows
from seqc.runtime.sampling import Sampling
from seqc.runtime.states import StateMemory, StatePort, memory, state_port
from seqc.runtime.stream import Stream


class Session:
    """A loaded artifact; make one with :func:`load`. ``run`` may be called from several threads.

    ``step`` runs the form of a streaming artifact for one new step; None takes the general one, ``model``.
    """

    def __init__(self, manifest: Manifest, model: Backend, step: Backend | None = None) -> None:
        self._manifest = manifest
        self._model, self._step = model, step
        self.states: tuple[StatePort, ...] = tuple(
            state_port(s, manifest.dims, functools.partial(model.keep, s.port.name)) for s in manifest.states
        )
        self._rows = Rows(manifest)
        for found in (model, step) if step is not None else (model,):
            self._check_names(found)

    def _check_names(self, model: Backend) -> None:
        for kind, names, found in (
            ("inputs", [s.port.name for s in self.states], model.inputs),
            ("outputs", [s.following for s in self.states], model.outputs),
        ):
            named = [p.name for p in getattr(self._manifest, kind)] + names
            if sorted(named) != sorted(found):
                raise ArtifactError(
                    f"the manifest names the {kind} {', '.join(named)} but the model has {', '.join(found)}"
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
        """What computes, in order of preference: execution providers of onnxruntime, or one package of TensorRT."""
        return self._model.providers

    @property
    def identity(self) -> str:
        """What tells this artifact's states from those of others: a hash over those of its models and weights."""
        files = sorted((n, e.sha256) for n, e in self._manifest.files.items() if n.endswith((".onnx", ".onnx.data")))
        return hashlib.sha256(repr(files).encode()).hexdigest()

    @property
    def counts_steps(self) -> bool:
        """Whether rows that have seen different numbers of steps cannot go through the model together."""
        return self.grows or any(s.batch_axis is None or s.pending is not None for s in self.states)

    @property
    def grows(self) -> bool:
        """Whether a state has a place for each step."""
        return any(s.grows is not None for s in self.states)

    @property
    def most_steps(self) -> int | None:
        """How many places growing states may have; None: any number."""
        return min((top for dim in self._places_dims() if (top := dim.max) is not None), default=None)

    @property
    def least_places(self) -> int:
        """How many places growing states have at least, filled or not: an engine may be built for no fewer."""
        return max((dim.min for dim in self._places_dims()), default=0)

    def _places_dims(self) -> list[DimRange]:
        return [self.dims[str(s.port.shape[s.grows])] for s in self.states if s.grows is not None]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once: a streaming artifact from its first states on.

        Args:
            inputs: one array per name in :attr:`inputs`, of exactly its dtype and of a shape that fits.

        Returns:
            One array per name in :attr:`outputs`, in that order.

        Raises:
            ArtifactError: an input does not fit (one line: what was expected and what was given), or the model failed.
        """
        arrays = prepare(self.inputs, self.dims, inputs)
        names = [port.name for port in self.outputs]
        rows = self._rows.count(arrays)
        places = max(self._rows.steps(arrays), self.least_places)
        arrays |= {s.port.name: s.start(rows, places) for s in self.states}
        return dict(zip(names, self._model.run(names, arrays), strict=True))

    def memory(self) -> StateMemory:
        """What the states of a stream take: bytes of a row, and more for each step."""
        return memory(self.states)

    def stream(self, batch_size: int = 1) -> Stream:
        """A stream of ``batch_size`` sequences that come piece by piece, before their first step.

        Raises ArtifactError where the artifact was not compiled for that.
        """
        if self._manifest.steps_dim is None:
            raise ArtifactError("the artifact takes whole sequences: compile it with --stateful to stream")
        return Stream(self, batch_size)

    def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]] | Array,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos: int | Collection[int] = (),
        seed: int | None = None,
        on_token: OnToken | None = None,
        speculate: int = 0,
    ) -> list[Array]:
        """Write on from prompts, with a streaming artifact whose input is tokens and whose output is logits.

        Args:
            ids: the tokens of one prompt, or of several, of any lengths.
            max_new_tokens: at most so many for each prompt; fewer where a token of ``eos`` comes, which is kept.
            temperature, top_k, top_p, repetition_penalty: see :class:`~seqc.runtime.sampling.Sampling`.
            seed: of the random numbers; rows have their own, so that what a row says depends on its number alone.
            on_token: called as ``on_token(row, token)`` as soon as a token is known.
            speculate: so many tokens are guessed from the text so far and read in one step with the last one; what is
                written is the same. Takes the prompts one after the other.

        Returns:
            The new tokens of each prompt, int64.

        Raises:
            ArtifactError: the artifact does not stream, or has other inputs and outputs.
            UsageError: a prompt is empty, a token or a number is out of range.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        if max_new_tokens < 1 or speculate < 0:
            raise UsageError("max_new_tokens must be 1 or more, speculate 0 or more")
        vocabulary = token_ports(self._manifest)[1].shape[-1]
        prompts = prompts_of(ids, int(vocabulary))
        stops = {eos} if isinstance(eos, int) else set(eos)
        generator = Generator(self, prompts, sampling, max_new_tokens, stops, seed, on_token)
        if speculate:
            generator.speculatively(speculate)
        else:
            generator.plainly()
        return generator.written

    def prepare_step(self, inputs: Mapping[str, Array], rows: int) -> tuple[dict[str, Array], int]:
        """The inputs of new steps, checked, and the number of steps."""
        arrays = prepare(self.inputs, self.dims, inputs)
        given = self._rows.count(arrays)
        if given != rows and self._rows.batch is not None:
            raise ArtifactError(f"the inputs have {given} rows, but {rows} are to take the steps")
        return arrays, self._rows.steps(arrays)

    def rows_in(self, inputs: Mapping[str, Array]) -> int:
        """The number of independent sequences in ``inputs``. Raises ArtifactError where these do not fit."""
        return self._rows.count(prepare(self.inputs, self.dims, inputs))

    def rows_of_inputs(self, arrays: Mapping[str, Array], rows: Sequence[int], count: int) -> dict[str, Array]:
        """Some of the ``count`` rows of the inputs."""
        return self._rows.taken(arrays, rows, count)

    def rows_of_outputs(self, parts: Sequence[tuple[list[int], dict[str, Array]]], count: int) -> dict[str, Array]:
        """The outputs of all ``count`` rows, from those of some rows each."""
        return self._rows.put_together(parts, count)

    def run_step(
        self, inputs: Mapping[str, Array], states: Sequence[Kept], steps: int
    ) -> tuple[dict[str, Array], tuple[Kept, ...]]:
        """(outputs, next states) of new steps from ``states`` on, whose growing ones have places for them."""
        names = [port.name for port in self.outputs]
        given = {s.port.name: value for s, value in zip(self.states, states, strict=True)}
        model = self._step if steps == 1 and self._step is not None else self._model
        # a growing state can be written in place: what takes it also gives it
        kept = {s.following: given[s.port.name] if s.grows is not None else None for s in self.states}
        arrays, following = model.run_bound(inputs, given, names, kept)
        return dict(zip(names, arrays, strict=True)), following


def load(directory: str | Path, providers: Sequence[Provider] | None = None) -> Session:
    """Load the artifact in ``directory`` after comparing every file in it with the hashes in its manifest.

    Args:
        directory: what ``seqc compile -o`` or ``Compiled.save`` wrote.
        providers: execution providers of onnxruntime, as names or (name, options) pairs, passed through; by default a CUDA
            GPU where there is one, else the CPU. ``tensorrt-rtx`` or ``tensorrt``, alone, runs the artifact's engines; their
            options are those of :class:`~seqc.runtime.tensorrt.Options`.

    Raises:
        ArtifactError: the artifact is missing, damaged or altered, or a provider is not available; of engines, that there is
            no GPU, that they were not built for it, or by another version of the package.
        MissingExtraError: onnxruntime, or the package of the engines, is not installed.
    """
    directory = Path(directory)
    manifest = manifests.read(directory)
    check_files(directory, manifest)
    engines = tensorrt.asked(providers)
    if engines is not None:
        return Session(*tensorrt.open_engines(directory, manifest, engines))
    files = [MODEL_FILE, *([STEP_FILE] if STEP_FILE in manifest.files else [])]
    opened = (open_session(directory / name, providers, manifest.opset, manifest.computes_in) for name in files)
    return Session(manifest, *map(OnnxModel, opened))
