"""The report and the plot of a manifest."""

import pytest

from data_prep.shards.statistics import plot_statistics, report_lines
from pipeline.common.errors import UserError

MANIFEST = {
    "shards": [{}],
    "languages": ["en", "sw", "th"],
    "totals": {"rows": 2, "tokens": 150, "sequences": 3, "pairs": 1},
    "fill": 0.75,
    "per_language": {
        "en": {"sequences": 2, "tokens": 100, "supervised_tokens": 60, "characters": 200},
        "sw": {"sequences": 1, "tokens": 50, "supervised_tokens": 20, "characters": 200},
        "th": {},
    },
    "drops": {"too_long": {"th": 3, "sw": 1}},
}


def test_report_lines_show_manifest_counts(tmp_path):
    lines = report_lines(tmp_path, MANIFEST)
    assert "2 rows, 150 tokens, 3 sequences, 1 pairs, packing efficiency 75.00%" in lines[0]
    assert [line.split() for line in lines[2:4]] == [
        ["en", "2", "100", "60.0%", "0.500"],
        ["sw", "1", "50", "40.0%", "0.250"],
    ]
    assert lines[4:] == ["too_long: sw 1, th 3"]


def test_plot_statistics_writes_png(tmp_path):
    plot_statistics(MANIFEST, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        plot_statistics(MANIFEST, tmp_path / "none" / "x.png")
