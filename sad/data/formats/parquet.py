"""Apache Parquet, ``.parquet``: one record per row. Needs pyarrow, of the extra ``data``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sad.config.sections import DataConfig
from sad.data.formats.base import (
    Document,
    columns_to_read,
    document_of,
    record_of_row,
)
from sad.environment import import_extra
from sad.errors import UnfitError, one_line

ROWS_PER_READ = 1024


def read(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """The document of each row; only the columns that matter, ``ROWS_PER_READ`` rows at a time."""
    pyarrow = import_extra("pyarrow", "data", f"to read {path}")
    parquet = import_extra("pyarrow.parquet", "data", f"to read {path}")
    try:
        with parquet.ParquetFile(path) as file:
            columns = columns_to_read(file.schema_arrow.names, config, str(path))
            records = (
                record
                for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns)
                for record in batch.to_pylist()
            )
            for row, record in enumerate(records):
                where = f"{path}, row {row}"
                yield document_of(record_of_row(record), config, f"{name}:{row}", where)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UnfitError(
            f"{path} must hold UTF-8 text, got byte {byte:#04x}; write it again as UTF-8"
        ) from error
    # Values that Python has no type for, such as a time past its years, are a ValueError.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UnfitError(
            f"{path} must be a valid Parquet file, got '{one_line(error)}'; write it again"
        ) from error
