"""Row plans on disk: which sequences make up the rows of each window, until their tokens are written to shards."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.windows import Member

PLAN = pa.schema(
    [
        ("row", pa.int32()),
        ("pair_id", pa.string()),
        ("lang", pa.string()),
        ("piece", pa.int32()),
        ("place", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("characters", pa.int32()),
    ]
)


def write_plan(path: Path, rows: list[list[Member]]) -> None:
    """Store the rows of one window."""
    numbers = [number for number, members in enumerate(rows) for _ in members]
    members = [member for row in rows for member in row]
    columns = [numbers, *zip(*members, strict=True)] if members else [[]] * len(PLAN)
    batch = pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, PLAN, strict=True)], PLAN)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, PLAN) as writer:
        writer.write_batch(batch)


def read_plan(folder: Path, starts: np.ndarray, first: int, stop: int) -> list[list[Member]]:
    """Rows first .. stop of all windows' rows in order; window w holds rows starts[w] .. starts[w + 1]."""
    rows: list[list[Member]] = []
    for window in range(int(np.searchsorted(starts, first, side="right")) - 1, len(starts) - 1):
        if starts[window] >= stop:
            break
        with pa.memory_map(str(folder / f"{window:05d}.arrow")) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
            numbers = batch.column("row").to_numpy()
            low, high = np.searchsorted(numbers, [first - starts[window], stop - starts[window]])
            columns = batch.slice(low, high - low).to_pydict()
        row_numbers = columns.pop("row")
        before = -1
        for number, member in zip(row_numbers, zip(*columns.values(), strict=True), strict=True):
            if number != before:
                rows.append([])
                before = number
            rows[-1].append(Member(*member))
    return rows
