"""Random access to examples: sources, the built-in datasets, and the checks made before training.

To use your own dataset, write a function that returns a `Dataset` or `(train, test)` and name it in the config as
`data.source: module:function`. Train and test are objects with `__len__` and `__getitem__`, dicts of arrays, data
frames or `datasets.Dataset`s.
"""

from dpdist.data.checks import fingerprint
from dpdist.data.datasets import Dataset, open_dataset
from dpdist.data.sources import ArraySource, Source, Subset, TakeSource, read_rows

__all__ = [
    "ArraySource",
    "Dataset",
    "Source",
    "Subset",
    "TakeSource",
    "fingerprint",
    "open_dataset",
    "read_rows",
]
