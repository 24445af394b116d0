"""The errors seqc raises. Each has one clear line as its message and an exit code for the command line."""

from __future__ import annotations


class SeqcError(Exception):
    """Base of every error that seqc raises on purpose.

    The message is one line (further lines are detail). ``exit_code`` is what the command line returns:
    1 verification failed, 2 wrong usage or unreadable input, 3 unsupported model.
    """

    exit_code = 2


class UsageError(SeqcError):
    """Wrong arguments, an unknown option, or an input that cannot be read."""


class LoadError(UsageError):
    """A model file or directory that cannot be loaded."""


class ArtifactError(UsageError):
    """A compiled artifact that is missing, damaged or altered, or inputs that do not fit it."""


class MissingExtraError(UsageError):
    """A package that an optional extra provides is not installed."""


class VerificationError(SeqcError):
    """The compiled model does not compute what the source model computes, or the IR broke an invariant."""

    exit_code = 1


class UnsupportedModelError(SeqcError):
    """The model does something seqc cannot compile; names the source line and what to try."""

    exit_code = 3


class UnsupportedOpError(UnsupportedModelError):
    """No lowering of the target accepts an op; lists every refusal."""


class EngineError(UnsupportedModelError):
    """TensorRT builds no engine of a model; names the node where that is known, and what to try."""
