"""The formats that `convert` reads, by name."""

from data_prep.convert.benchmark_formats import read_mathoctopus, read_mcot, read_mgsm, read_msvamp, read_parallel
from data_prep.convert.column_formats import read_canonical, read_datasets
from data_prep.convert.examples import Reader

# Formats whose readers yield the examples of each group consecutively, and formats whose readers do not.
Readers = dict[str, Reader]
GROUPED_FORMATS: Readers = {"mcot": read_mcot, "mgsm": read_mgsm, "msvamp": read_msvamp, "parallel": read_parallel}
SCATTERED_FORMATS: Readers = {"canonical": read_canonical, "datasets": read_datasets, "mathoctopus": read_mathoctopus}
