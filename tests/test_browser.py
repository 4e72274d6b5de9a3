"""The tab and the page in a real browser (``browsing``): skipped where there is none, an error in CI."""

from __future__ import annotations

import base64
import csv
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET

import pytest
from browsing import REQUIRED, Browser, keep, missing, tensorboard
from run_folders import HOSTILE, renamed, sick, write_run
from typed import net

from bpdiag import report
from bpdiag.config import Config, ModelConfig, OptimizerConfig, TrainingConfig, WatchConfig
from bpdiag.training import train

VIEWS = ("findings", "map", "profile", "chain", "compare")
if missing() and REQUIRED:
    raise RuntimeError(f"BPDIAG_BROWSER=required: {missing()}")
pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no browser: {missing()}")


# ---- a browser, runs, the page and the tab ------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    own = Browser(tmp_path_factory.mktemp("downloads"))
    yield own
    own.driver.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four small runs really trained, one watched under hostile names, one with remedies tried."""
    root = tmp_path_factory.mktemp("logdir")

    def trained(name, lr=0.01, **model):
        config = Config(
            model=ModelConfig(**{"depth": 20, "width": 64, **model}),
            optimizer=OptimizerConfig(lr=lr),
            training=TrainingConfig(steps=120),
            watch=WatchConfig(every=4, pictures=False),
        )
        return train(config, root / name).folder

    told = [
        trained("sweep/activation=sigmoid", activation="sigmoid", weight_variance="torch"),
        trained("sweep/activation=relu"),
        trained("sweep/activation=tanh", activation="tanh", weight_variance="1"),
        trained("residual", activation="tanh", weight_variance="1", residual="identity"),
        trained("too-large-steps", lr=1.0, activation="tanh", weight_variance="1.5"),
    ]
    after = {"decades": -0.7, "loss": 0.25, "accuracy": 0.92}
    tried = {"name": "tanh, variance 1", "change": "activation, variance", "overrides": ["model.activation=tanh"]}
    tried |= {"before": {"decades": -5.0, "loss": 2.3, "accuracy": 0.1}, "after": after, "seeds": 3, "steps": 100}
    told.append(write_run(root / "remedied", sick(8), [tried | {"verdict": "works", "recommended": True}]))
    told.append(write_run(root / "hostile", renamed(sick(5), HOSTILE)))
    (root / "only-events").mkdir()
    shutil.copy(next(told[0].glob("events.out.*")), root / "only-events")
    return root, told


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    _, told = runs
    return report.write_html(told, tmp_path_factory.mktemp("page") / "report.html").as_uri()


@pytest.fixture(scope="module")
def board(runs):
    with tensorboard(runs[0], "GradientFlow") as address:
        yield address


@pytest.fixture
def tab(browser, board):
    """The tab, opened, the driver in its frame."""
    browser.size(1280)
    browser.driver.switch_to.default_content()
    browser.driver.get("about:blank")
    browser.console(), browser.requests()
    browser.driver.get(f"{board}#bpdiag")
    browser.driver.switch_to.frame(browser.wait("iframe", seconds=120))
    browser.wait("main h1", seconds=120)
    yield browser
    browser.driver.switch_to.default_content()


# ---- the page -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_draws_itself(browser, page, view, width):
    browser.open(page, width, view=view, run="sweep/activation=sigmoid")
    assert browser.one("[role=tab][aria-selected=true]").text.lower() == view
    assert browser.console() == []
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    sizes = "return [...document.querySelectorAll('main svg text')].map(t => parseFloat(getComputedStyle(t).fontSize))"
    assert min(browser.js(sizes), default=11) >= 11, "too small to read"
    keep(browser, f"{view}{'-narrow' if width < 500 else ''}")


def test_the_console_check_can_fail(browser, tmp_path):
    (tmp_path / "broken.html").write_text("<main><h1>x</h1></main><script>throw new Error('broken')</script>")
    browser.open((tmp_path / "broken.html").as_uri())
    assert any("broken" in line for line in browser.console())


def test_the_page_asks_for_nothing(browser, page):
    browser.requests()
    browser.open(page, view="map")
    browser.press("1", "2", "3", "4", "5")
    asked = browser.requests()
    assert asked, "the page itself was asked for"
    assert {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}


def test_the_findings_stand_in_words(browser, page):
    browser.open(page, view="findings", run="sweep/activation=sigmoid")
    told = browser.text("main")
    assert "The gradient dies on its way down: linear1 receives 10" in told
    assert "vanishing by slopes" in told
    assert "Remedy:" in told
    assert "every 4 steps measured" in told
    browser.open(page, view="findings", run="sweep/activation=relu")
    assert "The gradient lives" in browser.text("h1")


def test_a_finding_leads_to_its_layers_and_its_step(browser, page):
    browser.open(page, view="findings", run="sweep/activation=sigmoid")
    browser.one("[data-finding]").click()
    browser.wait(".read .head")
    assert browser.text(".read .head").startswith("Step 0, linear1 ")


def test_remedies_stand_with_before_and_after(browser, page):
    browser.open(page, view="findings", run="remedied")
    told = browser.text(".tried")
    assert "tanh, variance 1" in told
    assert "Recommended: tanh, variance 1. Add model.activation=tanh." in told
    assert len(browser.all(".tried circle")) == 2


def rows_and_columns(browser):
    """Of the map: left, right, row height, rows."""
    script = "const c = document.querySelector('.grid canvas'); return [c.offsetLeft, c.offsetWidth, c.offsetHeight]"
    return browser.js(script)


def test_hovering_over_the_map_reads_and_leaving_restores(browser, page):
    browser.open(page, view="map", run="sweep/activation=sigmoid", step=0, layer=0)
    left, width, height = rows_and_columns(browser)
    before = browser.text(".read .head")
    browser.point(".grid", left + width - 3, 0.5 * height / 20)  # the last step, the topmost of 20 layers
    assert browser.text(".read .head").startswith("Step 116, linear20 ")
    browser.point("h1", 2, 2)
    assert browser.text(".read .head") == before
    browser.point(".grid", left + width / 2, height - 3, click=True)
    browser.point("h1", 2, 2)
    assert re.match(r"Step (56|60), linear1 ", browser.text(".read .head"))


def test_the_map_says_the_traces_number(browser, page, runs):
    from bpdiag.trace import Trace

    trace = Trace.load(runs[1][0])
    at = trace.weight_layers()[4]
    browser.open(page, view="map", run="sweep/activation=sigmoid", step=0, layer=4)
    wanted = f"{trace.value('decades', at, 0):.1f}".replace("-", "−")
    assert f"10{wanted} of the output's gradient arrives" in browser.text(".read .head")


@pytest.mark.parametrize(
    "shown", ["gain", "slope_factor", "weight_factor", "saturated", "dead", "update_ratio", "z_rms"]
)
def test_every_statistic_has_a_map_and_a_legend_in_words(browser, page, shown):
    browser.open(page, view="map", run="sweep/activation=relu")
    browser.one(f"[data-to={shown}]").click()
    browser.wait(f"[data-to={shown}][aria-pressed=true]")
    assert browser.driver.switch_to.active_element.get_attribute("data-to") == shown  # focus stays where it was
    assert len(browser.all(".legend .scale div")) >= 4
    assert browser.console() == []


def test_keys_lead_through_the_views_and_the_layers(browser, page):
    browser.open(page, view="map", run="sweep/activation=sigmoid", step=0, layer=0)
    browser.js("document.querySelector('.grid').focus()")
    browser.press("ARROW_UP", "ARROW_UP", "ARROW_RIGHT")
    assert browser.text(".read .head").startswith("Step 4, linear3 ")
    assert "linear3" in browser.js("return document.querySelector('[aria-live]').textContent")
    browser.press("PAGE_UP", "END")
    assert browser.text(".read .head").startswith("Step 116, linear8 ")
    browser.press("ENTER")
    browser.wait(".waterfall")
    assert "layer=7" in browser.driver.current_url
    browser.js("document.activeElement.blur()")
    browser.press("3")
    browser.wait(".profile")
    browser.one("[role=tab][aria-selected=true]").send_keys("")
    browser.js("document.querySelector('[role=tab][aria-selected=true]').focus()")
    browser.press("ARROW_LEFT")
    browser.wait("[role=tab][data-view=map][aria-selected=true]")
    assert browser.driver.switch_to.active_element.get_attribute("data-view") == "map"


def extent(browser):
    """How many layers and steps the map says that it shows."""
    told = re.match(r"Map of (\d+) layers by (\d+) steps", browser.one(".grid").get_attribute("aria-label"))
    return int(told[1]), int(told[2])


def test_a_part_of_the_map_is_enlarged_by_dragging_and_shown_whole_again(browser, page):
    browser.open(page, view="map", run="sweep/activation=sigmoid", step=0, layer=0)
    assert extent(browser) == (20, 30)
    left, width, height = rows_and_columns(browser)
    row, column = height / 20, width / 30
    browser.drag(".grid", (left + 5.5 * column, 2.5 * row), (left + 5.5 * column + 3, 2.5 * row))
    assert extent(browser) == (20, 30)  # a click that shakes enlarges nothing
    browser.drag(".grid", (left + 5.5 * column, 2.5 * row), (left + 14.5 * column, 8.5 * row))
    browser.wait("[data-whole]")
    assert extent(browser) == (7, 10)
    assert browser.text(".zoomed").startswith("steps 20 to 56, linear12 to linear18")
    left, width, height = rows_and_columns(browser)
    browser.point(".grid", left + 2, 2)  # the first column, the topmost row of what is shown
    assert browser.text(".read .head").startswith("Step 20, linear18 ")
    assert browser.console() == []
    keep(browser, "map-enlarged")
    browser.one("[data-save=csv]").click()
    assert len(browser.downloaded(".csv").splitlines()) == 1 + 7 * 10
    browser.one("[data-whole]").click()
    browser.wait(".grid", lambda e: extent(browser) == (20, 30))


def test_a_part_of_the_map_is_enlarged_with_keys(browser, page):
    browser.open(page, view="map", run="sweep/activation=sigmoid", step=8, layer=3)
    browser.js("document.querySelector('.grid').focus()")
    browser.press(("SHIFT", "ARROW_RIGHT"), ("SHIFT", "ARROW_RIGHT"), ("SHIFT", "ARROW_UP"))
    assert "brushed step 8 linear4 to step 16 linear5" in browser.js(
        "return document.querySelector('[aria-live]').textContent"
    )
    browser.press("ENTER")
    browser.wait("[data-whole]")
    assert extent(browser) == (2, 3)
    browser.press("ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT", "ARROW_DOWN", "ARROW_DOWN")
    assert browser.text(".read .head").startswith("Step 8, linear4 ")  # arrows stay in what is shown
    browser.press("ESCAPE")
    browser.wait(".grid", lambda e: extent(browser) == (20, 30))
    assert browser.js("return document.activeElement.matches('.grid')")
    browser.press("ENTER")
    browser.wait(".waterfall")


@pytest.mark.parametrize("view", ["map", "profile"])
def test_a_skip_is_drawn_as_a_way_around_its_block(browser, page, view):
    browser.open(page, view=view, run="residual", layer=4)
    told = [e.get_attribute("textContent") for e in browser.all("main svg path title")]
    assert told, "no arc is drawn"
    assert all(re.fullmatch(r"a way around 1 layer, carries × 1", one) for one in told)
    assert "a way around it × 1" in browser.text(".read")
    keep(browser, f"residual-{view}")
    browser.open(page, view=view, run="sweep/activation=relu")  # the twin: a plain stack has none
    assert browser.all("main svg path title") == []


def test_the_loss_curve_is_a_slider(browser, page):
    browser.open(page, view="profile", run="sweep/activation=tanh", step=0)
    slider = browser.one(".time input")
    browser.js("arguments[0].focus()", slider)
    browser.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert slider.get_attribute("aria-valuetext").startswith("step 8, loss ")
    assert browser.text(".read .head").startswith("Step 8, ")
    browser.point(".time", 600, 30, click=True)
    assert not slider.get_attribute("aria-valuetext").startswith("step 8,")


def test_the_profile_adds_up_in_words(browser, page):
    browser.open(page, view="profile", run="sweep/activation=sigmoid", step=0)
    told = browser.text(".keys")
    parts = [float(x.replace("−", "-")) for x in re.findall(r"(?:weights|activation|alignment|rest) (−?[\d.]+)", told)]
    total = float(re.search(r"sum (−?[\d.]+)", told)[1].replace("−", "-"))
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(total, abs=0.21)  # four roundings
    browser.js("document.querySelector('.profile').focus()")
    browser.press("ARROW_UP")
    assert "linear2 " in browser.text(".read .head")


def test_the_chain_multiplies_to_what_was_measured(browser, page):
    browser.open(page, view="chain", run="sweep/activation=relu", step=0, layer=17)
    told = browser.text(".formula")
    numbers = [float(x) for x in re.findall(r"(?<![\d.‖a₀-₉])(\d+\.\d+)(?!\d*₀)", told.split("= ‖a‖")[0])]
    result, *factors = numbers
    product = 1.0
    for factor in factors:
        product *= factor
    assert product == pytest.approx(result, rel=0.03)
    browser.js("document.querySelector('.waterfall').focus()")
    browser.press("ARROW_RIGHT")
    browser.wait(".formula", lambda e: "W₁₇" in e.text)
    assert "taken apart" in browser.text(".apart")


def test_runs_are_overlaid_and_the_table_sorts(browser, page):
    browser.open(page, view="compare")
    before = len(browser.all(".chosen"))
    browser.one(".chosen [data-drop]").click()
    browser.wait(".over", lambda e: len(browser.all(".chosen")) == before - 1)
    row = browser.one("tr.pick[aria-selected=false]")
    name = row.get_attribute("data-row")
    browser.js("arguments[0].focus()", row)
    browser.press("ENTER")
    browser.wait(".over", lambda e: len(browser.all(".chosen")) == before)
    assert browser.one(f'tr.pick[data-row="{name}"]').get_attribute("aria-selected") == "true"
    assert browser.driver.switch_to.active_element.get_attribute("data-row") == name
    browser.one("[data-sort=accuracy]").click()
    assert browser.one("[data-sort=accuracy]").find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    column = "return [...document.querySelectorAll('tr.pick')].map(r => r.cells[r.cells.length - 2].textContent)"
    told = [float(x.removesuffix(" %")) for x in browser.js(column)]
    assert told == sorted(told)


def test_the_grid_takes_other_keys(browser, page):
    from selenium.webdriver.support.ui import Select

    browser.open(page, view="compare")
    Select(browser.one("select[data-set=rows]")).select_by_visible_text("depth")
    browser.wait(".cells .row", lambda e: e.text.startswith("depth"))
    assert browser.console() == []


def test_a_run_that_told_no_settings_has_its_place_in_the_grid(browser, tmp_path):
    told = [write_run(tmp_path / name, sick(4), activation=name) for name in ("tanh", "relu")]
    sick(4).save(tmp_path / "watched")
    browser.open(report.write_html([*told, tmp_path / "watched"], tmp_path / "page.html").as_uri(), view="compare")
    assert [row.text for row in browser.all(".cells .row")] == [
        "activation relu",
        "activation tanh",
        "activation not told",
    ]
    assert len(browser.all(".cells .cell svg")) == 3


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_shown_can_be_had(browser, page, view):
    browser.open(page, view=view, run="sweep/activation=sigmoid")
    browser.one("[data-save=csv]").click()
    rows = list(csv.reader(browser.downloaded(".csv").splitlines()))
    assert len(rows) > 4
    assert len({len(row) for row in rows}) == 1
    browser.one("[data-save=svg]").click()
    picture = browser.downloaded(".svg")
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in picture


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_names_do_not_run(browser, page, view):
    browser.open(page, view=view, run="hostile", layer=0)
    assert browser.js("return document.querySelectorAll('img').length") == 0
    assert browser.console() == []
    if view in ("map", "profile"):
        assert "onerror=alert(1)" in browser.text(".read .head")  # it is there, as text
        assert "\\u202e" in browser.text(".read .head")


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The rules of accessibility as a script: axe-core, of npm, for this test only."""
    lacking = pytest.fail if REQUIRED else pytest.skip
    if shutil.which("npm") is None:
        lacking("npm is not installed: no axe-core (Debian: apt-get install npm)")
    here = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", "--silent", "axe-core@4.14.1"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        lacking(f"npm did not give axe-core: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(here.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


AXE = """
const done = arguments[0], told = (v) => `${v.id}, ${v.impact}: ${v.nodes.map((n) => n.html).slice(0, 3)}`;
axe.run().then((r) => done(r.violations.filter((v) => ["serious", "critical"].includes(v.impact)).map(told)));
"""


def test_a_run_that_explodes_opens_on_its_last_finite_step(browser, tmp_path):
    def grows(step):
        return math.inf if step >= 50 else 1.4

    run = write_run(tmp_path / "explodes", net(6, sig=grows, steps=range(0, 100, 10)))
    browser.open(report.write_html([run], tmp_path / "page.html").as_uri(), view="profile")
    assert browser.text(".read .head").startswith("Step 40, ")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_nothing_stands_in_the_way_of_a_screen_reader(browser, page, axe, view, dark):
    browser.open(page, view=view, run="remedied")
    if dark:
        browser.one("[data-theme-switch]").click()
        browser.wait("[data-theme-switch]", lambda e: e.text == "Light")
    browser.js(axe)
    assert browser.driver.execute_async_script(AXE) == []


def test_axe_can_find_something(browser, axe, tmp_path):
    (tmp_path / "bad.html").write_text("<main><h1>x</h1><img src='data:,'><button></button></main>")
    browser.open((tmp_path / "bad.html").as_uri())
    browser.js(axe)
    assert browser.driver.execute_async_script(AXE)


def test_where_it_is_required_a_test_that_cannot_run_fails(tmp_path):
    """Of a machine without npm, whose browser tests would lack their rules of accessibility."""
    for name in ("chromium", "chromedriver"):
        (tmp_path / name).symlink_to(shutil.which(name))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "axe_can_find"]
    told = {}
    for required in ("", "required"):
        paths = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment = {**os.environ, **paths, "BPDIAG_BROWSER": required}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        told[required] = done.returncode, done.stdout
    assert told[""][0] == 0
    assert "1 skipped" in told[""][1]
    assert told["required"][0] == 1
    assert "npm is not installed" in told["required"][1]
    assert "in the browser: 0 passed" in told["required"][1]


def test_dark_is_dark(browser, page):
    browser.open(page, view="map", run="too-large-steps")
    light = browser.js("return getComputedStyle(document.documentElement).backgroundColor")
    browser.one("[data-theme-switch]").click()
    browser.wait("[data-theme-switch]", lambda e: e.text == "Light")
    assert browser.js("return getComputedStyle(document.documentElement).backgroundColor") == "rgb(21, 23, 26)" != light
    keep(browser, "dark")


def test_a_printed_page_has_all_views(browser, page):
    browser.open(page, view="map", run="sweep/activation=sigmoid")
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert len(browser.all("main > section")) == len(VIEWS)
    pdf = base64.b64decode(browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert len(browser.all("main > section")) == 1


def test_two_hundred_layers_and_ten_thousand_steps_are_drawn(browser, tmp_path):
    run = write_run(tmp_path / "deep", net(200, steps=range(0, 10_000, 25), planned=10_000))
    browser.open(report.write_html([run], tmp_path / "deep.html").as_uri(), view="map")
    _, _, height = rows_and_columns(browser)
    assert height >= 800
    browser.press("3")
    browser.wait(".profile")
    browser.press("4")
    browser.wait(".waterfall")
    assert browser.console() == []


# ---- the tab ------------------------------------------------------------------------------------------------


def test_the_tab_loads_from_this_machine_alone(tab, board):
    tab.driver.switch_to.default_content()
    assert "GRADIENT FLOW" in tab.text("body").upper()
    assert tab.console() == []
    asked = [url for url in tab.requests() if url.startswith("http")]
    assert any("/plugin/bpdiag/runs" in url for url in asked)
    assert {url for url in asked if not url.startswith(board)} == set()
    keep(tab, "tensorboard")


def test_the_tab_shows_every_run_and_reads_one(tab):
    assert len(tab.all(".run")) >= 6
    tab.one('[data-run="sweep/activation=sigmoid"]').click()
    tab.wait("main h1", lambda e: "dies on its way down" in e.text)
    tab.one("[role=tab][data-view=map]").click()
    tab.wait(".grid canvas")


def test_the_tab_says_of_how_many_steps_where_a_trace_is_gone(tab):
    tab.wait('[data-run="only-events"]', seconds=120).click()
    tab.wait("main h1", lambda e: "30 of 117 steps are drawn" in e.text)
    for view in ("map", "profile", "chain"):
        tab.one(f"[role=tab][data-view={view}]").click()
        tab.wait(f"[role=tab][data-view={view}][aria-selected=true]")
    tab.driver.switch_to.default_content()
    assert tab.console() == []


def test_the_tab_follows_tensorboards_theme(tab):
    tab.driver.switch_to.default_content()
    tab.js("document.body.classList.add('dark-mode')")
    tab.driver.switch_to.frame(tab.one("iframe"))
    tab.wait("html[data-theme=dark]")


def test_the_tab_grows_with_a_run_and_keeps_place_and_keyboard(tab, runs):
    run = write_run(runs[0] / "growing", sick(4, steps=range(0, 40, 10)))
    tab.wait('[data-run="growing"]').click()
    tab.wait(".strip svg")
    tab.one("[role=tab][data-view=map]").click()
    tab.wait(".grid canvas")
    tab.js("document.querySelector('.grid').focus()")
    tab.press("HOME", "ARROW_UP")
    shutil.rmtree(run)
    write_run(run, sick(4, steps=range(0, 200, 10)))
    tab.wait(".time input", lambda e: e.get_attribute("max") == "19")
    assert tab.text(".read .head").startswith("Step 0, z2 ")
    assert tab.js("return document.activeElement.matches('.grid')")


def test_the_tab_takes_up_a_run_that_begins(tab, runs):
    before = len(tab.all(".run"))
    write_run(runs[0] / "begun-later", sick(4))
    tab.wait(".rail", lambda e: len(tab.all(".run")) == before + 1)
    assert "begun-later" in tab.text(".rail")


# ---- TensorBoard without the tab ----------------------------------------------------------------------------


def shadowed(browser, query):
    """How many elements the query finds, also inside the shadows that TensorBoard is built of."""
    script = """
    const found = (root) => [...root.querySelectorAll("*")].reduce(
      (n, e) => n + e.matches(arguments[0]) + (e.shadowRoot ? found(e.shadowRoot) : 0), 0);
    return found(document);"""
    return browser.js(script, query)


def test_plain_tensorboard_has_the_same_run_in_few_charts(browser, runs):
    """The custom scalars of the dying sigmoid: what one has without the tab."""
    with tensorboard(runs[1][0]) as address:
        browser.size(1280)
        browser.driver.switch_to.default_content()
        browser.driver.get("about:blank")
        browser.console()
        browser.driver.get(f"{address}#custom_scalars")
        end = time.monotonic() + 120
        while not shadowed(browser, "svg .line-plot path, canvas, vz-line-chart2"):
            assert time.monotonic() < end, f"no chart; the page says {browser.text('body')[:300]}"
            time.sleep(0.2)
        assert "GRADIENT FLOW" not in browser.text("body").upper()
        time.sleep(2)  # its lines fade in
        assert browser.console() == []
        keep(browser, "tensorboard-without")
