from __future__ import annotations

import pytest

from bpdiag.launcher import LONGEST_NAME, _varying, job_folder


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.activation=relu", "model.depth=5"], "activation=relu,depth=5"),
        (["optimizer.name=adam", "optimizer.lr=1e-3"], "optimizer=adam,lr=1e-3"),
        (["data.root=a/../b c;d"], "root=a-..-b-c-d"),
        (["data.root=täglich/数字"], "root=t-glich-"),
        (["experiment=vanishing", "hydra.sweep.dir=x"], "job"),
        ([], "job"),
        (["+model.depth=3"], "depth=3"),
    ],
)
def test_a_jobs_folder_is_flat_and_plain(overrides, name):
    assert job_folder(overrides) == name


def test_a_long_name_is_cut_and_stays_its_own():
    long = [[f"data.root={'x' * 300}{end}"] for end in "ab"]
    names = {job_folder(o) for o in long}
    assert len(names) == 2
    assert all(len(n) == LONGEST_NAME for n in names)


def test_only_what_differs_is_told_of_a_job():
    jobs = [["experiment=e", "seed=0", "model.depth=3", f"model.width={w}"] for w in (8, 16)]
    assert _varying(jobs) == ["model.width"]
    assert _varying(jobs[:1]) == ["seed", "model.depth", "model.width"]
