"""Tables on disk, in several files of perhaps several versions: read in part, joined as one, written whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read(path: Path, keys: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Of a file its keys and, of the columns wanted, those that it has; None: all.

    Keys of text come as a dictionary: a name is decoded once, not in each row.

    Raises:
        ValueError: A key is not there.
    """
    told = pq.read_metadata(path)
    schema = told.schema.to_arrow_schema()
    if lacking := [name for name in keys if name not in schema.names]:
        raise ValueError(f"a part without {', '.join(lacking)}")
    text = [name for name in keys if schema.field(name).type == pa.string()]
    with pq.ParquetFile(path, metadata=told, read_dictionary=text) as file:
        return file.read([name for name in schema.names if columns is None or name in (*keys, *columns)])


def joined(schema: pa.Schema, tables: Sequence[pa.Table]) -> pa.Table:
    """The tables as one of this schema: a column that one of them lacks is null there.

    Example:
        >>> schema = pa.schema([("step", pa.int64()), ("loss", pa.float64())])
        >>> joined(schema, [pa.table({"step": [1], "loss": [2.3]}), pa.table({"step": [2]})]).to_pylist()
        [{'step': 1, 'loss': 2.3}, {'step': 2, 'loss': None}]
    """
    known = [[field for field in schema if field.name in table.column_names] for table in tables]
    alike = [table.select([f.name for f in own]).cast(pa.schema(own)) for table, own in zip(tables, known, strict=True)]
    return pa.concat_tables([schema.empty_table(), *alike], promote_options="default")


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` write a file aside and give it its name when it is whole: no reader meets a torn one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write(table: pa.Table, path: Path) -> None:
    """As a file, whole or not at all."""
    replace(path, lambda aside: pq.write_table(table, aside, compression="zstd"))
