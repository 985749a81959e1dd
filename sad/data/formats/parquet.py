"""Apache Parquet, ``.parquet``: one row per document, its text in the column ``data.text_field``.

Needs pyarrow, of the extra ``data``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sad.config.sections import DataConfig
from sad.data.formats.base import Document, import_extra, require_field, require_text
from sad.errors import UnfitError, one_line

ROWS_PER_READ = 1024


def read(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """The text of each row; one column is read, ``ROWS_PER_READ`` rows at a time."""
    field = config.text_field
    pyarrow = import_extra("pyarrow", f"to read {path}")
    parquet = import_extra("pyarrow.parquet", f"to read {path}")
    try:
        with parquet.ParquetFile(path) as file:
            require_field(field, file.schema_arrow.names, str(path))
            values = (
                value.as_py()
                for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=[field])
                for value in batch.column(0)
            )
            for row, value in enumerate(values):
                yield Document(f"{name}:{row}", require_text(value, field, f"{path}, row {row}"))
    except pyarrow.ArrowException as error:
        raise UnfitError(
            f"{path} must be a valid Parquet file, got '{one_line(error)}'; write it again"
        ) from error
