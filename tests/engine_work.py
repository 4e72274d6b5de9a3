"""Work for engines that another process imports: it counts, fails, waits, or is killed; no net is trained."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from bpdiag import job
from bpdiag.config import UsageError


def count(task, tell):
    """Tell every number below."""
    for number in range(task):
        tell(number)


def fail(task, tell):
    """Tell once, then raise."""
    tell("begun")
    raise ValueError(f"no {task}")


def die_once(task, tell):
    """Killed at the first try of each file named; the second tells."""
    name, marker = task
    if not Path(marker).exists():
        Path(marker).write_text("killed here")
        tell(f"{name} begun")
        os.kill(os.getpid(), signal.SIGKILL)
    tell(f"{name} done")


def die(task, tell):
    """Killed at every try."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave(task, tell):
    """End the process without a word."""
    os._exit(3)


def wait(task, tell):
    """Wait; interrupted, say so in a file and go on being interrupted."""
    Path(task).touch()
    try:
        tell("begun")
        time.sleep(60)
    except KeyboardInterrupt:
        Path(task).write_text("interrupted")
        raise


def who(task, tell):
    """Process, its threads of torch, and what SIGINT does."""
    time.sleep(0.3)
    tell((os.getpid(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)))


def whoami():
    """The process that answers."""
    return os.getpid()


def fail_silently(task, tell):
    """Raise before anything is told."""
    raise ValueError("the whole stack")


def swallow(task, tell):
    """Interrupted, make something else of it."""
    try:
        tell("begun")
        time.sleep(60)
    except KeyboardInterrupt:
        raise ValueError("half a sample") from None


def train_two_at_most(task, tell):
    """Train a stack, of two members or fewer."""
    if len(task.members) > 2:
        raise UsageError("too many")
    job.train(task, tell)
