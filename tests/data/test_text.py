"""Documents as token ids: one an example, padded or cut off; or packed into blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpdist.config import Data, from_dict
from dpdist.data import ArraySource, fingerprint, open_dataset, read_rows
from dpdist.errors import InputError
from dpdist.release.statement import UNIT, unit_of

DOCUMENTS = ["a b", "c", "a b c d e", "x a"]
#: Of `DOCUMENTS` at length 3; 0 is [PAD], 1 [UNK].
IDS = [[3, 4, 0], [5, 0, 0], [3, 4, 5], [1, 3, 0]]
MASKS = [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]


def text(path: Path, tokenizer_file: str, columns: dict[str, Any] | None = None, /, **options: Any) -> Data:
    options = {"tokenizer": tokenizer_file, "length": 3} | options
    return Data(source="text", path=str(path), columns=columns, options=options)


def write(kind: str, path: Path) -> None:
    rows = [{"text": document, "label": index % 2} for index, document in enumerate(DOCUMENTS)]
    table = pa.Table.from_pylist(rows)
    path.mkdir()
    for part in ("train", "test"):
        if kind == "txt":
            (path / f"{part}.txt").write_text("\n\n".join(DOCUMENTS) + "\n \n")
        elif kind == "jsonl":
            (path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        elif kind == "csv":
            lines = [f'"{document}",{index % 2}' for index, document in enumerate(DOCUMENTS)]
            (path / f"{part}.csv").write_text("\n".join(["text,label", *lines]))
        elif kind == "parquet":
            pq.write_table(table, path / f"{part}.parquet")
    if kind == "hf":
        part = datasets.Dataset(datasets.table.InMemoryTable(table))
        datasets.DatasetDict(train=part, test=part).save_to_disk(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "hf"])
def test_a_document_is_an_example_padded_or_cut_off(tmp_path: Path, tokenizer_file: str, kind: str) -> None:
    write(kind, tmp_path / "data")
    dataset = open_dataset(text(tmp_path / "data", tokenizer_file))
    assert dataset.vocabulary == 8
    for source in (dataset.train, dataset.test):
        assert source is not None
        rows = read_rows(source, np.arange(len(source)))
        assert rows["input_ids"].tolist() == IDS
        assert rows["attention_mask"].tolist() == MASKS
        assert rows["input_ids"].dtype == rows["attention_mask"].dtype == np.int32
        assert ("label" in rows) == (kind != "txt")
        if kind != "txt":
            assert rows["label"].tolist() == [0, 1, 0, 1]


def test_columns_are_renamed_and_labels_named(tmp_path: Path, tokenizer_file: str) -> None:
    (tmp_path / "x.csv").write_text("review,stars,id\na b,good,1\nc,bad,2\na,good,3\n")
    columns = {"text": "review", "label": "stars"}
    dataset = open_dataset(text(tmp_path / "x.csv", tokenizer_file, columns, classes=["bad", "good"], length=2))
    rows = read_rows(dataset.train, np.arange(2))
    assert sorted(rows) == ["attention_mask", "input_ids", "label"]
    assert (dataset.classes, dataset.label_names) == (2, ("bad", "good"))


def test_packed_documents_fill_blocks_and_end_with_their_token(tmp_path: Path, tokenizer_file: str) -> None:
    write("txt", tmp_path / "data")
    dataset = open_dataset(text(tmp_path / "data", tokenizer_file, pack=True, length=4))
    assert isinstance(dataset.train, ArraySource)
    rows = read_rows(dataset.train, np.arange(len(dataset.train)))
    stream = [3, 4, 2, 5, 2, 3, 4, 5, 6, 7, 2, 1, 3, 2]  # 2 ends a document
    assert rows["input_ids"].ravel().tolist() == [*stream, 0, 0]
    assert rows["attention_mask"].ravel().tolist() == [1] * 14 + [0, 0]


def test_documents_are_split_before_they_are_packed(tmp_path: Path, tokenizer_file: str) -> None:
    """A block that held documents of both parts would test on what was trained on."""
    (tmp_path / "x.txt").write_text("\n".join(["a a a"] * 5 + ["b b b"] * 5))
    dataset = open_dataset(text(tmp_path / "x.txt", tokenizer_file, pack=True, length=8))
    assert dataset.test is not None
    tokens = [read_rows(part, np.arange(len(part)))["input_ids"] for part in (dataset.train, dataset.test)]
    assert [int((rows == 2).sum()) for rows in tokens] == [8, 2]


def test_the_fingerprint_changes_with_every_document_and_the_tokenizer(tmp_path: Path, tokenizer_file: str) -> None:
    file = tmp_path / "train.txt"
    lines = [f"a {i}" for i in range(300)]
    found = []
    for change in ({}, {7: "b"}, {299: "c"}):
        file.write_text("\n".join(change.get(i, line) for i, line in enumerate(lines)))
        found.append(fingerprint(open_dataset(text(file, tokenizer_file)).train))
    found.append(fingerprint(open_dataset(text(file, tokenizer_file, length=4)).train))
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"tokenizer": None}, None, r"data\.options\.tokenizer = None: name a tokenizer\.json on disk"),
        ({"tokenizer": "/nowhere"}, None, r"data\.options\.tokenizer = '/nowhere': no such file"),
        ({"length": 0}, None, r"data\.options\.length = 0: give the number of token ids"),
        ({"length": "long"}, None, r"data\.options\.length = 'long'"),
        ({"pack": "yes"}, None, r"data\.options\.pack = 'yes': give true \(a block is the protected record\)"),
        ({}, {"label": "text"}, r"data\.columns = .*name the column of the documents, {text: NAME}"),
        ({}, {"text": "txt"}, r"data\.columns\.text = 'txt': no such column in .*, which has 1"),
        ({"pack": True}, {"text": "text", "label": "text"}, r"data\.columns = .*a packed block has no label"),
    ],
)
def test_options_of_text_that_cannot_be_used_are_refused(
    tmp_path: Path, tokenizer_file: str, options: dict[str, Any], columns: dict[str, Any] | None, message: str
) -> None:
    write("txt", tmp_path / "data")
    with pytest.raises(InputError, match=message):
        open_dataset(text(tmp_path / "data", tokenizer_file, columns, **options))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "x.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"data\.options\.tokenizer = .*is no tokenizer\.json"):
        open_dataset(text(tmp_path / "x.txt", str(tmp_path)))


def test_damaged_lines_are_refused_and_the_cause_alone_quotes_them(tmp_path: Path, tokenizer_file: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": Alice}\n')
    with pytest.raises(InputError, match="needs one JSON object a line") as caught:
        open_dataset(text(tmp_path / "x.jsonl", tokenizer_file))
    assert "document 1" in str(caught.value.__cause__)
    (tmp_path / "x.txt").write_bytes(b"\xff\n" * 3)
    with pytest.raises(InputError, match="a document that cannot be decoded"):
        open_dataset(text(tmp_path / "x.txt", tokenizer_file))


def test_the_statement_says_that_a_packed_block_is_the_unit() -> None:
    def said(**options: Any) -> str:
        section = {"source": "text", "path": "x", "options": options}
        return unit_of(from_dict({"data": section, "privacy": {"enabled": False}, "training": {"steps": 1}}))

    assert said(length=64) == said(length=64, pack=False) == UNIT
    assert said(length=64, pack=True).startswith(
        "what stands in one BLOCK of 64 tokens, not one document and not one person"
    )
