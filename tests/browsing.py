"""A real browser for tests: Debian's chromium, driven by selenium, its console and its requests watched.

Nothing is downloaded.  BPDIAG_BROWSER=required makes a test that cannot run an error: so CI proves that
none is skipped.
BPDIAG_SCREENSHOTS=FOLDER keeps a picture of each view there: make screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
REQUIRED = os.environ.get("BPDIAG_BROWSER") == "required"
TENSORBOARD = """
import sys
from tensorboard import default, program
from bpdiag.dashboard import plugin
ours = [getattr(plugin, name) for name in sys.argv[2:]]
board = program.TensorBoard([*default.get_static_plugins(), *ours])
board.configure(argv=[None, "--logdir", sys.argv[1], "--port", "0"])
print(board.launch(), flush=True)
sys.stdin.read()
"""


def missing() -> str:
    """What the machine lacks for these tests; empty for nothing."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    lacking = [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None]
    return f"no {' and no '.join(lacking)} on this machine (Debian: apt-get install chromium-driver)" if lacking else ""


class Browser:
    """A chromium, its console and its requests watched."""

    def __init__(self, downloads: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"):
            options.add_argument(f"--{word}")
        for word in ("background-networking", "component-update", "sync", "dev-shm-usage"):
            options.add_argument(f"--disable-{word}")
        self.driver = webdriver.Chrome(service=Service(DRIVER), options=options)
        self.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
        )
        self.downloads = downloads

    def open(self, url: str, width: int = 1280, **state: object) -> None:
        """A fresh page of that width, waited for."""
        self.size(width)
        self.driver.get("about:blank")
        self.console()
        self.driver.get(f"{url}#{'&'.join(f'{key}={value}' for key, value in state.items())}")
        self.wait("main h1")

    def size(self, width: int, height: int = 900) -> None:
        told = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", told)

    def js(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def one(self, query: str) -> object:
        return self.driver.find_element("css selector", query)

    def all(self, query: str) -> list:
        return self.driver.find_elements("css selector", query)

    def text(self, query: str) -> str:
        return " ".join(self.one(query).text.split())

    def wait(self, query: str, holds=lambda element: True, seconds: float = 60.0) -> object:
        """The first element that the query finds and that holds, as soon as there is one."""
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            try:
                element = self.one(query)
                if holds(element):
                    return element
            except (NoSuchElementException, StaleElementReferenceException):
                pass
            assert time.monotonic() < end, f"{query}: not there in {seconds} s; the page says {self.text('body')[:300]}"
            time.sleep(0.05)

    def press(self, *keys: str | tuple[str, ...]) -> None:
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            together = [getattr(Keys, one, one) for one in ([key] if isinstance(key, str) else key)]
            self.driver.switch_to.active_element.send_keys(*together)

    def point(self, query: str, x: float, y: float, click: bool = False) -> None:
        """The mouse at (x, y) pixels from the upper left of the element."""
        from selenium.webdriver.common.action_chains import ActionChains

        self.js("arguments[0].scrollIntoView({block: 'center'})", self.one(query))
        box = self.js("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top]", self.one(query))
        actions = ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(round(box[0] + x), round(box[1] + y))
        if click:
            actions.click()
        actions.perform()

    def drag(self, query: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """The mouse pressed at the first place in the element, moved, and let go at the second."""
        from selenium.webdriver.common.action_chains import ActionChains

        self.js("arguments[0].scrollIntoView({block: 'center'})", self.one(query))
        left, top = self.js("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top]", self.one(query))
        actions = ActionChains(self.driver)
        mouse = actions.w3c_actions.pointer_action
        mouse.move_to_location(round(left + start[0]), round(top + start[1]))
        mouse.pointer_down()
        mouse.move_to_location(round(left + (start[0] + end[0]) / 2), round(top + (start[1] + end[1]) / 2))
        mouse.move_to_location(round(left + end[0]), round(top + end[1]))
        mouse.pointer_up()
        actions.perform()

    def console(self) -> list[str]:
        """What the console said that is no mere warning, since last asked."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """The addresses asked for since last asked."""
        found = re.findall(r'"Network\.requestWillBeSent".*?"request":\{.*?"url":"([^"]*)"', str(self._performance()))
        return [url for url in found if not url.startswith("about:")]

    def _performance(self) -> str:
        return "\n".join(line["message"] for line in self.driver.get_log("performance"))

    def downloaded(self, ending: str) -> str:
        """The text of the file that comes, of that ending."""
        end = time.monotonic() + 30
        while not (there := [p for p in self.downloads.glob(f"*{ending}") if p.stat().st_size]):
            assert time.monotonic() < end, f"no {ending} came"
            time.sleep(0.05)
        text = there[0].read_text()
        there[0].unlink()
        return text


@contextmanager
def tensorboard(folder, *plugins):
    """The address of a TensorBoard over a folder, with these plugins besides its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", TENSORBOARD, folder.name, *plugins]  # a picture tells no path of this machine
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=folder.parent, env=environment, **pipes) as process:  # fmt: skip
        yield process.stdout.readline().strip()
        process.terminate()


def keep(browser, name):
    """A picture of what is shown, where pictures are kept."""
    folder = os.environ.get("BPDIAG_SCREENSHOTS")
    if folder:
        height = browser.js("return document.documentElement.scrollHeight")
        browser.size(browser.js("return innerWidth"), min(height, 1250))
        time.sleep(0.3)  # a redraw
        path = Path(folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        from PIL import Image

        browser.driver.save_screenshot(str(path))
        Image.open(path).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)
