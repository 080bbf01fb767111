"""Find the pivots that occur in several rows: packing repeats the pivot of a split group in each of its parts."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.shards.format import COPIES, IGNORE, PIVOT, ShardSet


@dataclass(frozen=True)
class RepeatedPivots:
    """Pivots with more than one copy in a shard directory.

    Attributes:
        pivots: Number of such pivots.
        copies: Number of their copies.
        target_fraction: Fraction of all target tokens that are in these copies.
        recorded: Whether the shards record the number of copies.
    """

    pivots: int
    copies: int
    target_fraction: float
    recorded: bool

    def __str__(self) -> str:
        if not self.pivots:
            return "repeated pivots: none"
        weight = (
            "each copy has weight 1/copies in the cross entropy"
            if self.recorded
            else "each copy has weight 1 in the cross entropy, because the shards do not record copies; pack again"
        )
        return (
            f"repeated pivots: {self.pivots} of split groups, in {self.copies} copies with {self.target_fraction:.1%} "
            f"of the target tokens; {weight}"
        )


def count_repeated_pivots(shards: ShardSet) -> RepeatedPivots:
    """Count the pivots that occur more than once in a shard directory."""
    pivots = pivot_copies(shards)
    repeated = pivots.filter(pc.greater(pivots["copies"], 1))
    total, in_copies = 0, 0
    if len(repeated):
        for table in shards.read_columns(["pair_id", "role", "seq_lens", "labels"]):
            lengths = _flatten(table, "seq_lens").to_numpy()
            is_target = _flatten(table, "labels").to_numpy() != IGNORE
            targets = np.add.reduceat(is_target, np.cumsum(lengths) - lengths, dtype=np.int64)
            is_repeated = pc.and_(
                pc.equal(_flatten(table, "role"), PIVOT), pc.is_in(_flatten(table, "pair_id"), repeated["pair_id"])
            )
            total += int(targets.sum())
            in_copies += int(targets[is_repeated.to_numpy(zero_copy_only=False)].sum())
    return RepeatedPivots(
        pivots=len(repeated),
        copies=pc.sum(repeated["copies"]).as_py() or 0,
        target_fraction=in_copies / total if total else 0.0,
        recorded="recorded_min" in pivots.column_names,
    )


def find_copies_error(shards: ShardSet) -> str | None:
    """Return a description of the first pivot whose recorded number of copies is wrong, or None."""
    pivots = pivot_copies(shards)
    if "recorded_min" not in pivots.column_names:
        return None
    for name in ("recorded_min", "recorded_max"):
        wrong = pivots.filter(pc.not_equal(pivots[name], pivots["copies"]))
        if len(wrong):
            pair_id, recorded, copies = (wrong[column][0].as_py() for column in ("pair_id", name, "copies"))
            return f"pivot of pair_id {pair_id} is recorded with {recorded} copies, but has {copies}"
    return None


def pivot_copies(shards: ShardSet) -> pa.Table:
    """Count the copies of each pivot.

    Returns:
        A table with the columns `pair_id` and `copies`. If the shards record the number of copies, also `recorded_min`
        and `recorded_max`: the smallest and the largest number recorded with any copy of the pivot.
    """
    tables = []
    for table in shards.read_columns(["pair_id", "role", COPIES.name]):
        is_pivot = pc.equal(_flatten(table, "role"), PIVOT)
        names = [name for name in ("pair_id", COPIES.name) if name in table.column_names]
        tables.append(pa.table({name: _flatten(table, name).filter(is_pivot) for name in names}))
    pivots = pa.concat_tables(tables) if tables else pa.table({"pair_id": pa.array([], pa.string())})
    recorded = [(COPIES.name, "min"), (COPIES.name, "max")] if COPIES.name in pivots.column_names else []
    grouped = pivots.group_by("pair_id", use_threads=False).aggregate([([], "count_all"), *recorded])
    new = {"count_all": "copies", "copies_min": "recorded_min", "copies_max": "recorded_max"}
    return grouped.rename_columns([new.get(name, name) for name in grouped.column_names])


def _flatten(table: pa.Table, name: str) -> pa.Array:
    """Return the values of a list column of all rows."""
    return table[name].combine_chunks().flatten()
