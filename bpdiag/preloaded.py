"""What every process of a sweep needs, imported once: the server that forks them imports this, and nothing else does.

Torch takes seconds to import, and the digits to unpack; their 200 MB are then in memory once, not once a process.  They
are unpacked while the rest is imported.
"""

import contextlib
import threading

import torch

from bpdiag import data
from bpdiag.config import DataConfig, UsageError

torch.set_num_threads(1)  # a second thread would not outlive a fork


def _unpack() -> None:
    with contextlib.suppress(UsageError):  # a run that needs the digits says what is wrong with them
        data.load(DataConfig())


_unpacking = threading.Thread(target=_unpack)
_unpacking.start()

import torch._dynamo  # noqa: E402  of torch's optimizers

from bpdiag import stacking  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import pandas  # noqa: F401  of pyarrow, which asks for it at its first table
_unpacking.join()  # no thread outlives a fork
