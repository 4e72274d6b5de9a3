"""What every sub-command says: words, JSON, or nothing."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from run_folders import sick, write_run
from typed import net

from bpdiag import terminal
from bpdiag.__main__ import COMMANDS, main

ASKED = {
    "chain": ["w=1x3"],
    "diagnose": ["{sick}"],
    "diff": ["{sick}", "{well}"],
    "plot": ["{sick}", "-o", "{out}.svg"],
    "predict": ["model.depth=3", "model.width=8"],
    "report": ["{sick}", "{well}", "-o", "{out}.html"],
}


@pytest.fixture
def asked(tmp_path):
    """The words of a sub-command on two stored runs."""
    folders = {"sick": write_run(tmp_path / "sick", sick(8)), "well": write_run(tmp_path / "well", net(4))}
    return lambda command: [command, *(word.format(**folders, out=tmp_path / "out") for word in ASKED[command])]


def test_every_sub_command_is_asked():
    assert ASKED.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", ASKED)
def test_a_sub_command_speaks_json_or_is_quiet(capsys, asked, command):
    words = asked(command)
    assert main(words) == 0
    told = capsys.readouterr().out
    assert told.strip()
    with pytest.raises(ValueError, match=r"Expecting value|Extra data"):  # the twin: words are no JSON
        json.loads(told)
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main([*words, "--json", "--quiet"]) == 0  # the last counts
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ASKED)
def test_a_quiet_sub_command_still_says_what_is_wrong(capsys, command):
    assert main([command, "--quiet", "nowhere/at=all"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("bpdiag: ")


def test_diff_as_json_tells_both_sides_and_where_they_part(capsys, asked):
    assert main([*asked("diff"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parting"]["step"] == 0
    assert told["common_steps"] == 20
    assert len(told["parting"]["values"]) == 2


def test_diagnose_fails_on_harm_also_when_it_is_quiet(asked, capsys):
    assert main([*asked("diagnose"), "--quiet", "--fail-on", "harm"]) == 1
    assert capsys.readouterr().out == ""


def screen(width, **options):
    return Console(file=io.StringIO(), width=width, color_system=None, highlight=False, **options)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_run_tells_how_it_goes_on_one_line(width):
    out = screen(width, force_terminal=True)
    with terminal.progress(out) as tell:
        tell(1, 860, 2.5, 0.125, float("nan"))
        tell(430, 860, 2.3014, 0.109, -9.4)
    told = out.file.getvalue()
    for word in ("loss 2.301", "right 11 %", "430/860"):
        assert word in told, (word, width)
    if width >= 80:
        assert "first layer gets 10^−9.4" in told
        assert "to go" in told


def test_what_is_no_terminal_is_told_nothing_in_between():
    out = screen(80, force_terminal=False)
    with terminal.progress(out) as tell:
        tell(430, 860, 2.3, 0.1, -9.4)
    assert out.file.getvalue().strip() == ""
