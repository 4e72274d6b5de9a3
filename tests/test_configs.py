"""Every file of conf/ composes, fits the schema, has its header and runs for two steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from bpdiag.__main__ import conf, main
from bpdiag.config import Config, flat

EXPERIMENTS = sorted((conf() / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_has_its_header(path):
    text = path.read_text()
    assert text.startswith("# @package _global_\n")
    for word in ("Question", "Run", "Expect", "Takes"):
        assert re.search(rf"^# {word}: +\S", text, re.M), word
    assert f"bpdiag experiment={path.stem}" in text


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_runs_for_two_steps(path, capsys):
    assert main([f"experiment={path.stem}", "training.steps=2", "model.width=8"]) == 0
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(conf().rglob("*.yaml")), ids=lambda p: p.stem)
def test_no_code_is_named_and_no_default_repeated(path):
    text = path.read_text()
    assert "_target_" not in text
    assert "bpdiag." not in text
    content, defaults = yaml.safe_load(text), flat(Config())
    own = {k: v for k, v in content.items() if k not in ("hydra", "defaults")}
    leaves = {f"{k}.{leaf}": value for k, v in own.items() if isinstance(v, dict) for leaf, value in v.items()}
    assert all(defaults[key] != value for key, value in leaves.items())


def test_no_key_is_named_like_a_group():
    groups = {p.name for p in conf().iterdir() if p.is_dir()}
    assert not groups & {key.rpartition(".")[2] for key in flat(Config())}


def test_a_wheel_would_carry_it():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"conf" = "bpdiag/conf"' in project
