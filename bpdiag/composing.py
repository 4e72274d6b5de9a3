"""A grid's jobs composed once where they agree: Hydra reads all its files anew for each, which takes 0.1 s a job."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from bpdiag.config import Config, flat


def configured(composed: Any) -> Config:
    """A composed configuration as our dataclasses; its types are those of the schema it was composed with."""
    from omegaconf import OmegaConf

    parts: dict[str, Any] = {key: composed[key] for key in composed if key != "hydra"}
    told: dict[str, Any] = {key: OmegaConf.to_object(x) if OmegaConf.is_config(x) else x for key, x in parts.items()}
    return Config(**told)


class Composer:
    """Hydra's loader of configurations, quick where jobs differ in values only.

    What it gives is what Hydra's own gives.  Anything but ``KEY=VALUE`` of our schema and an experiment (a group of
    another kind, ``+``, ``~``, a whole dictionary) is left to that.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._shared: dict[tuple[str, ...], Any] = {}
        self._keys = set(flat(Config()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: Any, sweep_overrides: Sequence[str]) -> Any:
        """The configuration of one job."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
        from omegaconf import OmegaConf, open_dict

        words = list(sweep_overrides)
        own = [word for word in words if word.partition("=")[0] in self._keys]
        files = tuple(word for word in words if word not in own)
        if not all(word.startswith("experiment=") for word in files):
            return self._loader.load_sweep_config(master_config, words)
        if files not in self._shared:
            self._shared[files] = self._loader.load_sweep_config(master_config, list(files))
        job = copy.deepcopy(self._shared[files])
        ConfigLoaderImpl._apply_overrides_to_config([_parsed(word) for word in own], job)
        with open_dict(job):
            job.hydra.overrides.task = words
            named = job.hydra.job.config.override_dirname
            job.hydra.job.override_dirname = get_overrides_dirname(
                [_parsed(word) for word in words],
                exclude_keys=named.exclude_keys,
                kv_sep=named.kv_sep,
                item_sep=named.item_sep,
            )
        OmegaConf.copy_cache(from_config=master_config, to_config=job)
        return job


@functools.lru_cache(maxsize=10_000)
def _parsed(word: str) -> Any:
    """By Hydra's grammar, which is slow; a grid has few words and many jobs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word)
