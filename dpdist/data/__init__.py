"""Examples by index: sources, the datasets built in, and the checks made before training.

A dataset of one's own is a function, named in the config as `data.source: module:function`, that returns
a `Dataset` or `(train, test)`; each is any object with `__len__` and `__getitem__`, or an `ArraySource`.
"""

from dpdist.data.checks import check_labels, fingerprint
from dpdist.data.datasets import Dataset, open_dataset
from dpdist.data.sources import ArraySource, Source, Subset, read_rows

__all__ = ["ArraySource", "Dataset", "Source", "Subset", "check_labels", "fingerprint", "open_dataset", "read_rows"]
