"""Row plans: temporary files that list the sequences of each packed row of a window."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.packing.token_files import TokenReader
from data_prep.shards.format import PIVOT, TRANSLATION, PackedRow


def plan_file(folder: Path, window: int) -> Path:
    """Return the path of the row plan of a window."""
    return folder / f"{window:05d}.arrow"


def write_row_plan(path: Path, table: pa.Table) -> None:
    """Write the sequences of one window. The column `row` holds their row number, from 0 in ascending order."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_row_plan(folder: Path, starts: np.ndarray, first: int, stop: int) -> pa.Table:
    """Read the sequences of a range of rows. Rows are numbered across all windows.

    Args:
        folder: Folder of the row plans.
        starts: int [windows + 1]. Window w contains the rows [starts[w], starts[w + 1]).
        first, stop: The rows [first, stop) to read.

    Returns:
        The sequences in row order. The column `row` is relative to `first`.
    """
    tables = []
    for window in range(int(np.searchsorted(starts, first, side="right")) - 1, len(starts) - 1):
        if starts[window] >= stop:
            break
        with pa.memory_map(str(plan_file(folder, window))) as source:
            table = pa.ipc.open_file(source).read_all()
            rows = table["row"].to_numpy() + (starts[window] - first)
            low, high = np.searchsorted(rows, [0, stop - first])
            part = table.slice(low, high - low).drop_columns(["row"])
            tables.append(part.append_column("row", pa.array(rows[low:high])))
    return pa.concat_tables(tables)


def build_rows(plan: pa.Table, reader: TokenReader, pivot: str, with_copies: bool) -> list[PackedRow]:
    """Read the tokens of a row plan and build its packed rows.

    Args:
        plan: The sequences of the rows.
        reader: Reader of their tokens.
        pivot: Language of the pivots.
        with_copies: Whether the rows get the field `copies`. They do if any group of the whole output is split.
    """
    rows = []
    copies = plan["copies"].to_numpy()
    columns = {name: plan[name].to_pylist() for name in ("pair_id", "lang", "piece", "offset", "length")}
    starts = np.flatnonzero(np.diff(plan["row"].to_numpy(), prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(plan)]):
        pair_id, lang, splits, offsets, lengths = (column[start:stop] for column in columns.values())
        sequences = [reader.read(*location) for location in zip(splits, offsets, lengths, strict=True)]
        role = [PIVOT if code == pivot else TRANSLATION for code in lang]
        rows.append(PackedRow.from_encoded(sequences, pair_id, lang, role, copies[start:stop] if with_copies else None))
    return rows


def count_languages(plan: pa.Table, rows: list[PackedRow]) -> dict[str, dict[str, int]]:
    """Count the sequences, tokens, target tokens and characters of each language.

    Args:
        plan: The sequences of the rows.
        rows: The rows that `build_rows` returned for the plan.
    """
    supervised = np.concatenate([row.count_targets() for row in rows])
    columns = {"tokens": plan["length"], "supervised_tokens": supervised, "characters": plan["characters"]}
    # Not `Table.group_by`: its first call imports libraries for longer than the counting takes.
    lang = plan["lang"].combine_chunks().dictionary_encode()
    codes, names = lang.indices.to_numpy(), lang.dictionary.to_pylist()
    counts = {name: {"sequences": n} for name, n in zip(names, np.bincount(codes).tolist(), strict=True)}
    for column, values in columns.items():
        for name, total in zip(names, np.bincount(codes, np.asarray(values)).tolist(), strict=True):
            counts[name][column] = int(total)
    return counts
