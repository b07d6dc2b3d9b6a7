"""A tokenizer of a few words, in the file that `tokenizers` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

WORDS = ("[PAD]", "[UNK]", "</s>", "a", "b", "c", "d", "e")


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> str:
    """Words are tokens, numbered as in `WORDS`."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")
