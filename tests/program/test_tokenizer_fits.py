"""A tokenizer with more token ids than the model has words is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from dpdist.config import Config, from_dict
from dpdist.data import open_dataset
from dpdist.errors import InputError
from dpdist.program.build import open_model


def config(tmp_path: Path, model: str, vocabulary: int) -> Config:
    """A text of 5 token ids, the last of which no document uses."""
    words = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "a", "b", "rare"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.csv").write_text("text,label\na b,0\nb,1\na a,0\n")
    options = {"width": 8, "depth": 1, "heads": 2, "mlp": 16, "vocabulary": vocabulary}
    if model != "llama":
        options |= {"positions": 4}
    return from_dict(
        {
            "data": {
                "source": "text",
                "path": str(tmp_path / "x.csv"),
                "options": {"tokenizer": str(tmp_path / "tokenizer.json"), "length": 4},
            },
            "model": {"name": model, "classes": 2 if model == "bert" else None, "options": options},
            "privacy": {"enabled": False},
            "training": {"steps": 1},
        }
    )


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
def test_too_small_a_vocabulary_is_refused_and_a_padded_one_is_not(tmp_path: Path, model: str) -> None:
    small, padded = (config(tmp_path, model, vocabulary) for vocabulary in (4, 8))
    dataset = open_dataset(small)
    with pytest.raises(InputError, match=r"model\.options\.vocabulary = 4: the tokenizer has 5 token ids; give 5"):
        open_model(small, dataset)
    open_model(padded, dataset)
