"""What Hydra scans to find ``hydra/launcher=sequential``.  Imports no torch: every Hydra application pays for it."""

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from bpdiag.launcher import SequentialConfig, launch


class SequentialLauncher(Launcher):
    """One job after another in this process, one line each as it ends, one table at the end."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a job needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the grid."""
        return launch(self.hydra_context, self.task_function, self.config, job_overrides, initial_job_idx)


ConfigStore.instance().store(group="hydra/launcher", name="sequential", node=SequentialConfig, provider="bpdiag")
