"""A tokenizer file on disk (`tokenizer.json` of Hugging Face's `tokenizers`), and documents as token ids by it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.data import optional
from dpdist.data.sources import ArraySource, BadRecordError
from dpdist.errors import InputError

#: What tokenizers call the token that begins a document, the one that pads, and the one that ends a document.
_BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "[BOS]")
_PADS = ("[PAD]", "<pad>", "<|pad|>", "<|finetune_right_pad_id|>")
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]", "[EOS]")


class Tokenizer:
    """A tokenizer file and how documents become token ids by it.

    Args:
        file: `tokenizer.json`, or a directory that holds it.
        length: number of token ids of an example.

    Raises:
        InputError: `tokenizers` is not installed, the file cannot be used, or `length` is no number of tokens.
    """

    def __init__(self, file: Any, length: Any) -> None:
        library = optional.load("tokenizers", "text")
        if not isinstance(file, str):
            raise InputError("data.options.tokenizer", file, "name a tokenizer.json on disk, or the directory of one.")
        if type(length) is not int or length < 1:
            raise InputError("data.options.length", length, "give the number of token ids of an example, such as 128.")
        path = Path(file).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError("data.options.tokenizer", file, "no such file; name a tokenizer.json on disk.")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower one
            remedy = f"is no tokenizer.json that tokenizers {library.__version__} reads; write it again."
            raise InputError("data.options.tokenizer", file, remedy) from error
        self.length = length
        self.vocabulary = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        padding = self._tokenizer.padding or {}
        pad = padding.get("pad_id", self._first(_PADS))
        #: The id behind the end of a short document, where the attention mask is 0; 0 where the tokenizer has none.
        self.pad = 0 if pad is None else pad
        #: The id that ends a document; None where the tokenizer has none.
        self.end = self._first(_ENDS)
        named = {"bos_token_id": self._first(_BEGINS), "eos_token_id": self.end, "pad_token_id": pad}
        #: Ids of the special tokens that it has, by their keys in a config.json of `transformers`.
        self.special = {key: number for key, number in named.items() if number is not None}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.identity = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest() + f" {length}"
        self._cut = library.Tokenizer.from_str(self._tokenizer.to_str())
        self._cut.enable_truncation(length)

    def _first(self, names: Sequence[str]) -> int | None:
        """The id of the first of these tokens that the tokenizer has."""
        return next((number for name in names if (number := self._tokenizer.token_to_id(name)) is not None), None)

    def encode(self, document: str) -> dict[str, np.ndarray]:
        """`input_ids` int32[length], cut off or padded, and `attention_mask` int32[length], 1 where tokens are."""
        return self._padded(self._cut.encode(document).ids)

    def _padded(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        tokens, mask = np.full(self.length, self.pad, np.int32), np.zeros(self.length, np.int32)
        tokens[: len(ids)], mask[: len(ids)] = ids, 1
        return {"input_ids": tokens, "attention_mask": mask}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def pack(self, documents: Sequence[Any], indices: Sequence[int], where: str) -> ArraySource:
        """Blocks of `length` tokens of the documents at `indices`, one after the other; the last one is padded.

        Each document ends with the tokenizer's token for that, added where it does not do so itself.

        Raises:
            InputError: the tokenizer has no such token, or there are no documents.
        """
        if (end := self.end) is None:
            raise InputError(
                "data.options.pack",
                True,
                f"the tokenizer has no token that ends a document ({', '.join(_ENDS)}); add one.",
            )
        ids: list[np.ndarray] = []
        for index in indices:
            if (text := documents[index]) is None:
                raise InputError("data.source", "a missing document", "take it out.") from BadRecordError(
                    f"row {index}"
                )
            found = self._tokenizer.encode(text).ids
            ids.append(np.array(found if found and found[-1] == end else [*found, end], np.int32))
        stream = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        blocks = -(-len(stream) // self.length)
        tokens, mask = np.full(blocks * self.length, self.pad, np.int32), np.zeros(blocks * self.length, np.int32)
        tokens[: len(stream)], mask[: len(stream)] = stream, 1
        shape = (blocks, self.length)
        return ArraySource({"input_ids": tokens.reshape(shape), "attention_mask": mask.reshape(shape)}, name=where)


class Documents:
    """Documents, tokenized when an example is read."""

    kind = "a document"

    def __init__(self, texts: Sequence[Any], tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer = texts, tokenizer
        self.identity = tokenizer.identity

    def __len__(self) -> int:
        return len(self._texts)

    def stored(self, index: int) -> bytes:
        return self._text(index).encode()

    def decode(self, index: int) -> dict[str, np.ndarray]:
        return self._tokenizer.encode(self._text(index))

    def name(self, index: int) -> str:
        return f"document {index}"

    def _text(self, index: int) -> str:
        text = self._texts[index]
        if text is None:
            raise ValueError("the document is missing")
        return text
