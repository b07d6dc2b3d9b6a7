"""Text as examples of `length` token ids.

One document is one example, and so one protected record: cut off at `length` tokens, or padded up to it. With `pack`,
the documents of a part are written one after the other and cut into blocks of `length` tokens. Then a block is the
protected record: a document that several blocks share is protected in each of them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpdist.config import Data
from dpdist.data.columns import named
from dpdist.data.documents import read_documents
from dpdist.data.encoded import EncodedSource
from dpdist.data.parts import Parts, split, split_indices
from dpdist.data.sources import Source
from dpdist.data.table import Reading, Table, Texts, given, names_of_classes, numbers
from dpdist.data.tokens import Documents, Tokenizer
from dpdist.errors import InputError


def open_text(
    path: Path,
    data: Data,
    *,
    tokenizer: Any,
    length: Any,
    pack: Any,
    classes: Any,
    train: str | None,
    test: str | None,
) -> Parts:
    """Open the documents at `path`: `input_ids` and `attention_mask`, int32[length], and the other columns chosen.

    `data.columns` says which column is the `text`, and which others to take; None takes `text`, and `label` if there
    is one.

    Args:
        tokenizer: as `dpdist.data.tokens.Tokenizer` takes it, as is `length`.
        pack: whether to cut packed documents into blocks, which have no other columns.
        classes: the public list of class names, as in `dpdist.data.table.Reading`.
        train: the word, or the split, of the train part where it is not `train`.
        test: likewise.

    Raises:
        InputError: an option, a file or a column cannot be used.
    """
    if not isinstance(pack, bool):
        raise InputError("data.options.pack", pack, "give true (a block is the protected record) or false.")
    tokens, reading = Tokenizer(tokenizer, length), Reading(classes=classes, given=given(data.columns, data.unit))
    first, second = read_documents(path, train=train, test=test)
    columns = _columns(first, data, pack, str(path))

    def source(table: Table, part: str, indices: np.ndarray | None = None) -> Source:
        where = f"{part} columns of {path}"
        texts = _texts(table, columns, where)
        if pack:
            return tokens.pack(texts, range(len(texts)) if indices is None else indices.tolist(), where)
        others = {ours: name for ours, name in columns.items() if ours != "text"}
        named(others, table, where)
        arrays = {ours: numbers(name, table, reading, where, label=ours == "label") for ours, name in others.items()}
        return EncodedSource(arrays, [Documents(texts, tokens)])

    if second is not None:
        parts = source(first, "train"), source(second, "test")
    elif pack:
        kept, held_out = split_indices(len(_texts(first, columns, str(path))), data)
        parts = source(first, "train", kept), source(first, "test", held_out)
    else:
        parts = split(source(first, "train"), data)
    names = names_of_classes(first, columns, reading)
    count = None if names is None else len(names)
    return Parts(train=parts[0], test=parts[1], classes=count, label_names=names, vocabulary=tokens.vocabulary)


def _columns(table: Table, data: Data, pack: bool, where: str) -> dict[str, Any]:
    columns = data.columns
    if columns is None:
        others = [name for name in ("label", data.unit) if name in table and not pack]
        columns = {"text": "text"} | {name: name for name in others if name is not None}
    named(columns, table, where)
    lists = [ours for ours, theirs in columns.items() if not isinstance(theirs, str)]
    if "text" not in columns or lists or (pack and len(columns) > 1):
        remedy = "and nothing else, since a packed block has no label" if pack else "and others of one column each"
        raise InputError("data.columns", columns, f"name the column of the documents, {{text: NAME}}, {remedy}.")
    return columns


def _texts(table: Table, columns: dict[str, Any], where: str) -> Sequence[Any]:
    column = table[columns["text"]]
    if not isinstance(column, Texts):
        raise InputError("data.columns.text", columns["text"], f"is no column of text in {where}; name one.")
    return column.values
