"""The quick loader gives what Hydra's own gives, word for word."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from bpdiag.__main__ import _hydra_in_words, conf
from bpdiag.composing import Composer, configured
from bpdiag.config import Config, DataConfig, ModelConfig


class Counting:
    """A loader that counts how often it is asked."""

    def __init__(self, loader):
        self.loader, self.asked = loader, 0

    def load_sweep_config(self, *told):
        self.asked += 1
        return self.loader.load_sweep_config(*told)


@pytest.fixture
def loaders():
    """Hydra's own, ours on top of it, and the configuration of a command line."""
    with _hydra_in_words(), initialize_config_dir(str(conf()), version_base="1.3", job_name="bpdiag"):
        base = compose("config", ["seed=7", "hydra.sweep.dir=there"], return_hydra_config=True)
        theirs = GlobalHydra.instance().config_loader()
        yield Counting(theirs), Composer(theirs), base
    GlobalHydra.instance().clear()


WORDS = [
    [],
    ["seed=3"],
    ["experiment=vanishing", "model.depth=10", "model.weight_variance=torch", "optimizer.lr=1e-3"],
    ["model.depth=10", "experiment=seeds"],
    ["model.branch_scale='1/sqrt(blocks)'", "model.residual=identity"],
    ["data.root='/a b/c'", "watch.pictures=false", "optimizer.lr=1", "model.weight_variance=2"],
    ["++training.steps=3", "seed=1"],
    ["model={depth:3,width:4}", "seed=1"],
    ["hydra.job.name=x", "seed=1"],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_it_composes_what_hydra_composes(loaders, words):
    theirs, ours, base = loaders
    expected = OmegaConf.to_yaml(theirs.load_sweep_config(base, words))
    for _ in range(2):
        assert OmegaConf.to_yaml(ours.load_sweep_config(base, words)) == expected
    if words:
        assert expected != OmegaConf.to_yaml(theirs.load_sweep_config(base, ["seed=99"]))


def test_a_grid_is_read_once(loaders):
    theirs, _, base = loaders
    ours = Composer(theirs)
    jobs = [ours.load_sweep_config(base, ["experiment=seeds", f"seed={n}", f"model.depth={n + 2}"]) for n in range(50)]
    assert theirs.asked == 1
    assert [(job.seed, job.model.depth) for job in jobs] == [(n, n + 2) for n in range(50)]
    ours.load_sweep_config(base, ["++seed=1"])
    assert theirs.asked == 2


@pytest.mark.parametrize("word", ["model.depth=x", "optimizer.lr=abc", "seed=null"])
def test_it_refuses_what_hydra_refuses(loaders, word):
    theirs, ours, base = loaders
    for loader in (theirs, ours):
        with pytest.raises(HydraException):
            loader.load_sweep_config(base, [word])


def test_it_is_the_loader_otherwise(loaders):
    _, ours, _ = loaders
    assert "vanishing" in ours.get_group_options("experiment")


def test_a_composed_configuration_becomes_our_dataclasses(loaders):
    _, ours, base = loaders
    told = configured(ours.load_sweep_config(base, ["model.depth=3", "data.name=kmnist"]))
    assert told == Config(model=ModelConfig(depth=3), data=DataConfig(name="kmnist"))
    asked = configured(ours.load_sweep_config(base, ["experiment=seeds"])).expect
    assert asked[0].what == "verdict"
