"""Text to tokens and back, for the command line."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from seqc.errors import MissingExtraError, UsageError


class Tokenizer(Protocol):
    """Text to tokens, tokens to text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def decoder(self) -> Callable[[int], str]:
        """A function that gives the text of token after token; what a later token may change comes with that one."""
        ...


class Bytes:
    """Each byte of UTF-8 is a token; others that a model may have are no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def decoder(self) -> Callable[[int], str]:
        incremental = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: incremental.decode(bytes([token])) if token < 256 else ""


class FromFile:
    """A ``tokenizer.json`` of Hugging Face's tokenizers."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as HuggingFace
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"{path} needs tokenizers: pip install 'seqc[hf]'") from error
        try:
            self._tokenizer: Any = HuggingFace.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"{path}: not a readable tokenizer.json ({str(error).splitlines()[0]})") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def decoder(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""


def tokenizer(name: str | None, vocabulary: int) -> Tokenizer:
    """``bytes``, a tokenizer.json or a directory with one; None takes bytes where there are 256 tokens.

    Raises UsageError where it cannot be read or the model's vocabulary does not fit.
    """
    if name is None and vocabulary != 256:
        raise UsageError(
            f"the model has {vocabulary} tokens: give --tokenizer (a tokenizer.json or its directory), or --ids"
        )
    if name is None or name == "bytes":
        if vocabulary < 256:
            raise UsageError(f"the model has {vocabulary} tokens, which are no bytes")
        return Bytes()
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such tokenizer.json")
    return FromFile(path)
