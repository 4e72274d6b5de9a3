"""The page: one file, all data in it, nothing that runs but ours.  How it looks and acts: test_browser.py."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib

import pytest
from hydra.core.global_hydra import GlobalHydra
from run_folders import HOSTILE, renamed, sick, write_run
from typed import net

from bpdiag import report, views
from bpdiag.__main__ import main
from bpdiag.config import UsageError
from bpdiag.trace import TraceError


def data(page):
    packed = re.search(r'<script type="text/plain" id="data">([\w+/=]*)</script>', page)[1]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "sweep" / "sick", sick(6), activation="sigmoid"),
        write_run(tmp_path / "sweep" / "well", net(6)),
    ]


def test_the_page_holds_what_the_tab_is_served(runs, tmp_path):
    path = report.write_html(runs, tmp_path / "report.html")
    told = data(path.read_text())
    assert [run["id"] for run in told["runs"]] == ["sick", "well"]
    assert told["details"]["sick"] == views.detail(runs[0], "sick")


def test_the_page_asks_no_other_machine(runs, tmp_path):
    page = report.write_html(runs, tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(["']?http""", page)


def test_hostile_names_stand_nowhere_as_text(tmp_path):
    run = write_run(tmp_path / "run", renamed(sick(4), HOSTILE), remedies=[{"name": HOSTILE, "change": HOSTILE}])
    page = report.write_html([run], tmp_path / "report.html").read_text()
    assert "onerror" not in page
    assert page.count("</script>") == 2
    assert data(page)["details"]["run"]["layers"][0]["name"] == HOSTILE


def test_thirty_runs_fit_a_megabyte(tmp_path):
    runs = [write_run(tmp_path / f"seed={i}", sick(20, steps=range(0, 860, 10))) for i in range(30)]
    path = report.write_html(runs, tmp_path / "report.html")
    told = data(path.read_text())
    assert path.stat().st_size < 1_000_000
    assert len(told["details"]) == 30
    assert min(len(d["steps"]) for d in told["details"].values()) >= report.FEWEST


def test_what_no_longer_fits_is_compared(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LARGEST", 1)
    told = data(report.write_html(runs, tmp_path / "report.html").read_text())
    assert (len(told["runs"]), len(told["details"])) == (2, 1)


def test_one_that_cannot_be_read_stops_no_other(runs, tmp_path):
    (runs[0] / "trace" / "meta.json").write_text("{")
    assert len(data(report.write_html(runs, tmp_path / "report.html").read_text())["runs"]) == 1
    (runs[1] / "trace" / "meta.json").write_text("{")
    with pytest.raises(TraceError, match="sick"):
        report.write_html(runs, tmp_path / "report.html")


def test_a_page_that_cannot_be_written_is_refused(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        report.write_html(runs, tmp_path / "file" / "report.html")


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "sweep"), "-o", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 2 runs, ")
    assert main(["report", str(runs[0]), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(out), "runs": [str(runs[0])]}
    assert main(["report", str(runs[0]), "-o", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["report", str(tmp_path / "nothing"), "-o", str(out)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_modules_as_one_script_do_what_they_do_apart(tmp_path):
    """Node runs format.js as the page has it, and as the tab has it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    ask = 'console.log([f.fixed(-0.04), f.factor(-16.3).toString(), `${f.html`<b>${"<i>"}</b>`}`].join("|"));'
    (tmp_path / "page.mjs").write_text(f'{report.script("format.js")}\nconst f = modules["format.js"];\n{ask}')
    shutil.copy(report.STATIC / "format.js", tmp_path / "format.mjs")
    (tmp_path / "tab.mjs").write_text(f'import * as f from "./format.mjs";\n{ask}')
    page, tab = (
        subprocess.run([node, tmp_path / name], capture_output=True, text=True, check=True).stdout
        for name in ("page.mjs", "tab.mjs")
    )
    assert page == tab == "0.0|10<sup>−16.3</sup>|<b>&lt;i&gt;</b>\n"


@pytest.fixture
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    GlobalHydra.instance().clear()


SWEEP = ["-m", "model.activation=relu,tanh", "training.steps=2", "model.width=8", "hydra.sweep.dir=sweep"]


@pytest.mark.usefixtures("_empty_folder")
def test_a_sweep_ends_with_its_page(capsys):
    assert main(SWEEP) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"open it +sweep/report\.html", last)
    told = data((report.Path("sweep") / "report.html").read_text())
    assert [run["id"] for run in told["runs"]] == [f"activation={name},steps=2,width=8" for name in ("relu", "tanh")]
    assert told["details"][told["runs"][0]["id"]]["provenance"]["command"].startswith("bpdiag model.activation=relu")


@pytest.mark.usefixtures("_empty_folder")
def test_a_page_does_not_tell_where_on_the_machine_a_run_lies():
    assert main(["training.steps=2", "model.width=8", "hydra.run.dir=a/b"]) == 0
    run = report.Path("a/b").absolute()
    page = report.write_html([run], "page.html").read_text()
    assert str(run.parent) not in page
    (detail,) = data(page)["details"].values()
    assert detail["provenance"]["folder"] == "a/b"


@pytest.mark.usefixtures("_empty_folder")
def test_a_page_that_goes_wrong_costs_no_result(capsys, monkeypatch):
    def broken(runs, out):
        raise ValueError("no page today")

    monkeypatch.setattr(report, "write_html", broken)
    assert main(SWEEP) == 0
    told = capsys.readouterr()
    assert "no report.html: no page today" in told.err
    assert "2 of 2 jobs" in told.out
