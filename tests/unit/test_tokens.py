"""Text to tokens and back on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from seqc.cli.tokens import Bytes, tokenizer
from seqc.errors import UsageError

TEXT = "naïve – 語"


def test_bytes_are_the_tokens_of_a_model_with_256() -> None:
    found = tokenizer(None, 256)
    assert found.encode(TEXT) == list(TEXT.encode())
    assert found.decode(found.encode(TEXT)) == TEXT
    assert Bytes().decode([104, 105, 258]) == "hi"


def test_a_character_of_several_bytes_is_told_when_it_is_whole() -> None:
    decode = Bytes().decoder()
    told = [decode(token) for token in (*TEXT.encode(), 300)]
    assert "".join(told) == TEXT
    assert told[2:4] == ["", "ï"] and told[-1] == ""


@pytest.fixture
def words(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel({"to": 0, "be": 1, "or": 2, "[UNK]": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_is_read_from_its_file_or_directory(words: Path) -> None:
    for path in (words, words / "tokenizer.json"):
        found = tokenizer(str(path), 4)
        assert found.encode("to be or") == [0, 1, 2]
        assert found.decode([0, 1]) == "to be"
        decode = found.decoder()
        assert "".join(decode(token) for token in (0, 1, 2)) == "to be or"


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has 97 tokens: give --tokenizer"):
        tokenizer(None, 97)
    with pytest.raises(UsageError, match="the model has 97 tokens, which are no bytes"):
        tokenizer("bytes", 97)
    with pytest.raises(UsageError, match=r"no such tokenizer\.json"):
        tokenizer(str(tmp_path), 97)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"not a readable tokenizer\.json"):
        tokenizer(str(tmp_path), 97)
