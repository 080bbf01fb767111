"""Row plans on disk: which sequences make up the rows of each window, until their tokens are written to shards."""

from pathlib import Path

import numpy as np
import pyarrow as pa


def write_plan(path: Path, table: pa.Table) -> None:
    """Store the sequences of one window's rows; column `row` is their row, from 0, ascending."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_plan(folder: Path, starts: np.ndarray, first: int, stop: int) -> pa.Table:
    """The sequences of rows first .. stop of all windows in order; window w holds rows starts[w] .. starts[w + 1].

    Column `row` counts from 0 at `first`.
    """
    tables = []
    for window in range(int(np.searchsorted(starts, first, side="right")) - 1, len(starts) - 1):
        if starts[window] >= stop:
            break
        with pa.memory_map(str(folder / f"{window:05d}.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
            rows = table["row"].to_numpy() + (starts[window] - first)
            low, high = np.searchsorted(rows, [0, stop - first])
            part = table.slice(low, high - low).drop_columns(["row"])
            tables.append(part.append_column("row", pa.array(rows[low:high])))
    return pa.concat_tables(tables)
