"""Several shard directories as one source of rows, with sampling weights."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards.format import COUNTS, PackedRow, ShardSet
from pipeline.data.loader import row_weights


def shard_directories(shards: str | Sequence[str]) -> list[Path]:
    """Return the directories that `data.shards` names."""
    return [Path(path) for path in ([shards] if isinstance(shards, str) else shards)]


class ShardMixture:
    """Rows of one or several shard directories, one directory after the other.

    With several, the `pair_id` of a row begins with its directory, because directories may use the same ids for
    different examples.

    Attributes:
        sources: the shard directories.
        manifest: see `merge_manifests`.
    """

    def __init__(self, sources: Sequence[ShardSet]) -> None:
        self.sources = list(sources)
        self.manifest = merge_manifests([source.manifest for source in sources])
        self._starts = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        source = self.sources[number]
        row = source[index - int(self._starts[number])]
        if len(self.sources) == 1:
            return row
        return replace(row, pair_id=[f"{source.path}:{pair_id}" for pair_id in row.pair_id])

    def __iter__(self) -> Iterator[PackedRow]:
        return (self[index] for index in range(len(self)))

    def sampling_weights(
        self, source_weights: Sequence[float] | None, language_weights: dict[str, float]
    ) -> np.ndarray | None:
        """Return the sampling weight of each row, [num_rows], or None if every row is drawn once per epoch.

        Args:
            source_weights: `data.source_weights`, one for each source. The rows of a source share its weight equally.
            language_weights: `data.language_weights`, see `row_weights`. Both factors are multiplied.
        """
        by_language = row_weights(self, language_weights)
        if source_weights is None:
            return by_language
        sizes = [len(source) for source in self.sources]
        by_source = np.repeat(np.array(source_weights) / sizes, sizes)
        return by_source if by_language is None else by_source * by_language


def merge_manifests(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the manifests of shard directories, as far as training uses them.

    Directories of one mixture have the same tokenizer and chat template, which `prepare_run` checks. The
    fingerprints that the manifests record can differ nevertheless, if different versions of this project packed the
    directories. The result has those of the first directory.
    """
    first, *others = manifests
    if not others:
        return first
    totals = Counter({name: 0 for name in COUNTS})
    for manifest in manifests:
        totals.update(manifest["totals"])
    return {
        **{
            key: first.get(key)
            for key in (
                "tokenizer",
                "chat_template",
                "chat_template_kwargs",
                "chat_template_sha256",
                "chat_template_date",
            )
        },
        "max_seq_length": max(manifest["max_seq_length"] for manifest in manifests),
        "languages": sorted({lang for manifest in manifests for lang in manifest["languages"]}),
        "shards": [shard for manifest in manifests for shard in manifest["shards"]],
        "totals": dict(totals),
    }
