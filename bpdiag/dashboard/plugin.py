"""The tab "Gradient flow" in TensorBoard: the trace folders under its logdir, read when asked, kept until they change.

Where only an event file is left, what TensorBoard has kept of it (``sampled.py``).

TensorBoard finds it by the entry point ``tensorboard_plugins``.  Served beside the static files:

    runs          overviews of all runs: summary.json and settings, no trace is read
    run?id=ID     one run in detail; ID is looked up among the runs found, never joined to a path

Loads no torch and no TensorFlow.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from bpdiag import views
from bpdiag.dashboard import sampled
from bpdiag.trace import TraceError

STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css"}
AGAIN = 2.0  # seconds that a look at the folders holds
KEPT = 64  # runs in detail
PATIENCE = 10  # times as long as it took until a run that still trains is read again
Answer = Callable[[wrappers.Request], wrappers.Response]


@dataclass(frozen=True)
class _Detail:
    stamp: float
    content: str  # JSON
    due: float  # when it may be read again while it trains


class GradientFlow(base_plugin.TBPlugin):  # type: ignore[misc]  # tensorboard has no types
    """The tab; one for each TensorBoard."""

    plugin_name = "bpdiag"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._roots = [Path(part) for part in str(context.logdir or "").split(",") if part]
        self._provider = context.data_provider
        self._lock = threading.Lock()
        self._found: tuple[float, dict[str, Path]] = (-AGAIN, {})
        self._overviews: dict[str, tuple[float, dict[str, Any]]] = {}
        self._details: dict[str, _Detail] = {}

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Any]]:
        """What is served, by route."""
        files = {f"/{path.name}": partial(_file, path) for path in STATIC.iterdir() if path.suffix in TYPES}
        answers: dict[str, Answer] = {**files, "/runs": self._answer_runs, "/run": self._answer_run}
        return {route: _application(answer) for route, answer in answers.items()}

    def is_active(self) -> bool:
        """Whether there is a run to show."""
        return bool(self.runs() or self._sampled())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Our own module, in a frame of its own."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Gradient flow")

    def data_plugin_names(self) -> tuple[str, ...]:
        """None: traces are read from their folders; TensorBoard keeps a sample of the steps only."""
        return ()

    def runs(self) -> dict[str, Path]:
        """Run folders by the name they have under the logdir."""
        looked, found = self._found
        if time.monotonic() - looked > AGAIN:
            found = {named(run, root): run for root in self._roots for run in views.find(root)}
            self._found = (time.monotonic(), found)
        return found

    def overviews(self) -> list[dict[str, Any]]:
        """All runs; one whose files have not changed is not read again."""
        told = []
        with self._lock:
            for name, run in self.runs().items():
                stamp, kept = self._overviews.get(name, (-1.0, {}))
                if stamp != views.stamp(run) or kept["verdict"] == "running":
                    kept = views.overview(run, name)
                    self._overviews[name] = (kept["stamp"], kept)
                told.append(kept)
        return [*told, *self._sampled().values()]

    def _sampled(self) -> dict[str, dict[str, Any]]:
        """Overviews of the runs that have an event file of ours and no trace."""
        if self._provider is None:
            return {}
        found = self.runs()
        known = {*found, *("." for root in self._roots if root in found.values())}  # "." is the logdir itself
        return sampled.runs(self._provider, "", known)

    def detail(self, name: str) -> str:
        """One run in detail, as JSON.

        Raises:
            KeyError: There is none of that name.
            TraceError: Its trace cannot be read.
        """
        if name not in self.runs():
            return json.dumps(sampled.detail(self._provider, "", self._sampled()[name]), allow_nan=False)
        run = self.runs()[name]
        stamp = views.stamp(run)
        with self._lock:
            kept = self._details.pop(name, None)
            begun = time.monotonic()
            early = kept is not None and begun < kept.due and not views.has_ended(run)
            if kept is None or (kept.stamp != stamp and not early):
                content = json.dumps(views.detail(run, name), allow_nan=False)
                now = time.monotonic()
                kept = _Detail(stamp, content, now + PATIENCE * (now - begun))
            self._details[name] = kept  # the last asked for is the last to go
            while len(self._details) > KEPT:
                self._details.pop(next(iter(self._details)))
        return kept.content

    def _answer_runs(self, request: wrappers.Request) -> wrappers.Response:
        return _respond(request, json.dumps(self.overviews(), allow_nan=False), "application/json")

    def _answer_run(self, request: wrappers.Request) -> wrappers.Response:
        name = request.args.get("id", "")
        try:
            return _respond(request, self.detail(name), "application/json")
        except KeyError:
            return _respond(request, f"no run of the name {name!r} under the logdir", "text/plain", 404)
        except TraceError as error:
            return _respond(request, str(error), "text/plain", 500)


def named(run: Path, root: Path) -> str:
    """What a run is called: its path under the folder looked through; of that folder itself its own name.

    Example:
        >>> named(Path("runs/mnist/one"), Path("runs")), named(Path("runs/one"), Path("runs/one"))
        ('mnist/one', 'one')
    """
    return run.relative_to(root).as_posix() if run != root else root.resolve().name


def _application(answer: Answer) -> Callable[..., Any]:
    """What answers a request, as WSGI has it."""
    return lambda environ, start: answer(wrappers.Request(environ))(environ, start)


def _file(path: Path, request: wrappers.Request) -> wrappers.Response:
    return _respond(request, path.read_text(), TYPES[path.suffix])


def _respond(request: wrappers.Request, content: str, kind: str, code: int = 200) -> wrappers.Response:
    return http_util.Respond(request, content, kind, code=code, headers=[("X-Content-Type-Options", "nosniff")])
