"""The recorder: what every layer gave out and what came back to it, for any ``nn.Module`` run eagerly.

On a sampled step a forward hook on each leaf reduces its output to a few numbers at once, or copies it where it is
small (``shelf``), and puts a hook on the output *tensor*, which sees the cotangent.  Never a full backward hook on a
module: those break on every in-place operation.  The numbers stay on the device until the step ends; then the host
reads all of them in one go.  Between sampled steps there is no hook on any module; while every step is sampled the
hooks stand.  What they cost stands in docs/overhead.md.

Hooks only read: no result of the model changes by a bit, no random number is drawn, nothing is left behind.
"""

from __future__ import annotations

from bpdiag.hooks.loss import kind_of_loss
from bpdiag.hooks.optimizer import describe
from bpdiag.hooks.pace import Pace
from bpdiag.hooks.recorder import Recorder

__all__ = ["Pace", "Recorder", "describe", "kind_of_loss"]
