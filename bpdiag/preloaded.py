"""What every process of a sweep needs, imported once: the server that forks them imports this, and nothing else does.

Torch takes seconds to import, and the digits to unpack; their 200 MB are then in memory once, not once a process.
"""

import contextlib

import matplotlib.figure  # noqa: F401  of the pictures, which import it when they draw
import torch
import torch._dynamo

from bpdiag import data, stacking  # noqa: F401
from bpdiag.config import DataConfig, UsageError

with contextlib.suppress(ImportError):
    import pandas  # noqa: F401  of pyarrow, which asks for it at its first table
torch.set_num_threads(1)  # a second thread would not outlive a fork
with contextlib.suppress(UsageError):  # a run that needs the digits says what is wrong with them
    data.load(DataConfig())
