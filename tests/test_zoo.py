"""The quick part of the zoo, the faults that its checks must catch, and the page that ``make zoo`` writes."""

import pytest
import torch
from torch import nn
from zoo import FAMILIES, PAGE, judged, main, page
from zoo_suite import Entry, Verdict, examine
from zoo_torch import TORCH, TORCHVISION
from zoo_twins import HARMFUL, INCOMPLETE, WRONG, sound

QUICK = TORCH | {
    name: TORCHVISION[name]
    for name in ("resnet18", "mobilenet_v3_small", "densenet", "googlenet", "vit", "swin", "convnext", "raft_small")
}


@pytest.mark.parametrize("name", QUICK)
def test_nothing_changed_nothing_missed_every_cotangent_autograds(name):
    verdict = examine(QUICK[name])
    assert verdict.faults == []
    assert verdict.cotangents + verdict.without_gradient >= verdict.rows == verdict.calls > 0


class Small(nn.Module):
    """All that the checks look for, in one: in place, called twice, never called, without gradient, normalized."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)
        self.middle, self.drop, self.last = nn.Linear(5, 5), nn.Dropout(0.2), nn.Linear(5, 3)
        self.spare, self.cut = nn.Linear(2, 2), nn.Linear(6, 5)

    def forward(self, x):
        h = self.relu(self.norm(self.first(x))) + self.cut(x).detach()
        return self.last(self.drop(h + self.relu(self.middle(h))))


SMALL = Entry(Small, lambda: (torch.randn(8, 6),))


def test_the_twin_without_a_fault_passes():
    verdict = examine(SMALL, sound)
    assert verdict.faults == []
    assert (verdict.calls, verdict.rows, verdict.listed, verdict.cotangents, verdict.sums) == (8, 8, 1, 7, 1)


TWINS = {"changed": HARMFUL, "incomplete": INCOMPLETE, "wrong": WRONG}


@pytest.mark.parametrize(("check", "fault"), [(check, fault) for check, twins in TWINS.items() for fault in twins])
def test_each_check_catches_its_faults(check, fault):
    assert getattr(examine(SMALL, TWINS[check][fault]), check)


# ---- the page ---------------------------------------------------------------------------------------------


def test_the_page_tells_of_every_architecture_and_all_are_sound():
    written = PAGE.read_text()
    for family, entries in FAMILIES.items():
        assert f"## {family}: {len(entries)} of {len(entries)}\n" in written
        assert [name for name in entries if f"| {name} | " not in written] == []
    every = sum(map(len, FAMILIES.values()))
    assert f"**{every} of {every}** architectures" in written
    assert f"{every} architectures" in (PAGE.parents[1] / "README.md").read_text()
    assert len(TORCHVISION) >= 20
    assert len(FAMILIES["timm"]) >= 20
    assert len(FAMILIES["transformers"]) >= 10


def test_a_page_says_what_is_wrong_and_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("zoo.installed", lambda package: None if package == "timm" else "1")
    monkeypatch.setattr("zoo.examine", lambda entry: Verdict(calls=3, rows=2, changed=["a buffer"]))
    assert main(["timm", "LSTM"]) == 1
    assert capsys.readouterr().out.count("not installed") == len(FAMILIES["timm"])
    found = {family: {name: judged(family, e) for name, e in FAMILIES[family].items()} for family in ("torch", "timm")}
    written = page(found)
    assert "| LSTM | 3 | 2 | 0 | 0 | 0 | 0 | 0 | **no** | **a buffer** |" in written
    assert "| resnet10t |  |  |  |  |  |  |  |  | not installed |" in written
    assert f"## timm: 0 of {len(FAMILIES['timm'])}" in written
    assert main(["resnet81"]) == 2
