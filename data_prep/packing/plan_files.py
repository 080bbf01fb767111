"""Row plans: which sequences make up the rows of each window, on disk until their tokens are written to shards."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.packing.pieces import TokenReader
from data_prep.shards.format import IGNORE, PIVOT, TRANSLATION, PackedRow


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


def packed_rows(planned: pa.Table, reader: TokenReader, pivot: str) -> list[PackedRow]:
    """Planned sequences with their tokens, as rows."""
    rows = []
    columns = {name: planned[name].to_pylist() for name in ("pair_id", "lang", "piece", "offset", "length")}
    starts = np.flatnonzero(np.diff(planned["row"].to_numpy(), prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(planned)]):
        pair_id, lang, piece, offset, length = (column[start:stop] for column in columns.values())
        sequences = [reader.read(*one) for one in zip(piece, offset, length, strict=True)]
        role = [PIVOT if one == pivot else TRANSLATION for one in lang]
        rows.append(PackedRow.from_encoded(sequences, pair_id, lang, role))
    return rows


def count_languages(planned: pa.Table, packed: list[PackedRow]) -> dict[str, dict[str, int]]:
    """Per language: sequences, tokens, supervised tokens, characters."""
    lengths = planned["length"].to_numpy()
    supervised = np.add.reduceat(
        np.concatenate([row.labels for row in packed]) != IGNORE, np.cumsum(lengths) - lengths, dtype=np.int64
    )
    counted = pa.table(
        {
            "lang": planned["lang"],
            "sequences": np.ones(len(planned), np.int64),
            "tokens": lengths.astype(np.int64),
            "supervised_tokens": supervised,
            "characters": planned["characters"].cast(pa.int64()),
        }
    )
    names = counted.column_names[1:]
    sums = counted.group_by("lang").aggregate([(name, "sum") for name in names]).to_pylist()
    return {found["lang"]: {name: found[f"{name}_sum"] for name in names} for found in sums}
