"""What Hydra scans to find ``hydra/launcher=stack``.  Imports no torch: every Hydra application pays for it."""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from bpdiag.launcher import StackConfig, Sweep, register_resolvers


class StackLauncher(Launcher):
    """Jobs that share a shape are trained as stacks, one process a core; the others alone in the same processes."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a job needs."""
        self.sweep = Sweep(hydra_context, config, StackConfig(**self.options))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the grid."""
        return self.sweep.launch(job_overrides, initial_job_idx)


register_resolvers()  # here, for the processes in which another launcher of Hydra's runs a job of ours
ConfigStore.instance().store(group="hydra/launcher", name="stack", node=StackConfig, provider="bpdiag")
