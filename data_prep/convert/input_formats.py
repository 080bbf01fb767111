"""The formats that `convert` reads, by name."""

from data_prep.convert.benchmark_formats import reader
from data_prep.convert.benchmarks import BENCHMARKS
from data_prep.convert.column_formats import read_canonical, read_datasets
from data_prep.convert.corpus_formats import read_mathoctopus, read_mcot, read_parallel
from data_prep.convert.examples import Reader

# Formats whose readers yield the examples of each group consecutively, and formats whose readers do not.
Readers = dict[str, Reader]
GROUPED_FORMATS: Readers = {"mcot": read_mcot, "parallel": read_parallel}
SCATTERED_FORMATS: Readers = {"canonical": read_canonical, "datasets": read_datasets, "mathoctopus": read_mathoctopus}
for _name, _benchmark in BENCHMARKS.items():
    (SCATTERED_FORMATS if _benchmark.key else GROUPED_FORMATS)[_name] = reader(_name, _benchmark)


def default_pivot(format_name: str) -> str:
    """Return the pivot of a format if none is given: that of the benchmark, or English."""
    return BENCHMARKS[format_name].pivot if format_name in BENCHMARKS else "en"


def is_unpaired(format_name: str) -> bool:
    """Return whether the languages of a format are not translations of each other."""
    return format_name in BENCHMARKS and BENCHMARKS[format_name].unpaired
