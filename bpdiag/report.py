"""Runs -> one self-contained HTML page: the views of the tab, drawn by the same modules, with all data in it.

The page asks the network for nothing.  Its data are JSON, deflated, in base64: no name of a layer, run or setting
stands in it as text that a browser could take for markup.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import bpdiag
from bpdiag import dashboard, views
from bpdiag.config import UsageError
from bpdiag.tables import replace
from bpdiag.trace import TraceError

STATIC = Path(dashboard.__file__).parent / "static"
NUMBERS = 360_000  # of all series together: about 0.6 MB
BLOCKS = len(views.SERIES) + len(views.OWNERS) + 1 + len(views.MAPPED)  # of a run, each of columns x layers
USUAL = 20  # layers of a run that has not told
FEWEST = 12  # columns of a run
LARGEST = 750_000  # bytes of data; runs beyond it are compared and no more

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="bpdiag {version}"><title>{title}</title><link rel="icon" href="data:,">
<style>
{style}
</style></head><body><div id="app"><noscript>This page draws itself: it needs JavaScript.</noscript></div>
<script type="text/plain" id="data">{data}</script>
<script type="module">
{script}
</script></body></html>
"""


def write_html(runs: Sequence[Path], out: str | os.PathLike[str]) -> Path:
    """The page of ``runs``, written to the file ``out``; returns its path.

    Raises:
        TraceError: Of no run a trace can be read; the message is that of the first.
        UsageError: ``out`` cannot be written.
    """
    path = Path(out)
    root = Path(os.path.commonpath([run.resolve().parent for run in runs])) if runs else Path()
    names = {run.resolve().relative_to(root).as_posix(): run for run in runs}
    told, details, refused = [], {}, []
    every = {name: views.overview(run, name) for name, run in names.items()}
    layers = sum(len((one["last"] or {"decades": []})["decades"]) or USUAL for one in every.values())
    columns = min(views.COLUMNS, max(FEWEST, NUMBERS // (BLOCKS * max(layers, 1))))
    size = 0
    for name, overview in every.items():
        if size > LARGEST:
            told.append(overview)
            continue
        try:
            details[name] = views.detail(names[name], name, columns)
        except TraceError as error:  # one that cannot be read stops no other
            refused.append(error)
            continue
        told.append({key: details[name][key] for key in overview})
        size += len(zlib.compress(json.dumps(details[name]).encode())) * 4 // 3
    if refused and not told:
        raise refused[0]
    content = page(told, details, root.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda aside: aside.write_text(content, encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror or error}") from error
    return path


def page(runs: Sequence[dict[str, Any]], details: dict[str, dict[str, Any]], title: str) -> str:
    """The page's text, from what ``views`` tells of the runs."""
    about = f"Written by bpdiag {bpdiag.__version__}, {time.strftime('%Y-%m-%d %H:%M')}."
    data = json.dumps({"about": about, "runs": runs, "details": details}, allow_nan=False, separators=(",", ":"))
    return PAGE.format(
        version=bpdiag.__version__,
        title=html.escape(f"Gradient flow: {title}"),
        style=(STATIC / "style.css").read_text(),
        data=base64.b64encode(zlib.compress(data.encode(), 9)).decode(),
        script=script("page.js"),
    )


def script(entry: str) -> str:
    """The static modules as one script: each a function that returns what it exports, in the order of its imports."""
    sources: dict[str, str] = {}
    wanted = [entry]
    while wanted:
        name = wanted.pop()
        if name not in sources:
            sources[name] = (STATIC / name).read_text()
            wanted += [source for _, source in _IMPORT.findall(sources[name])]
    needs = {name: {imported for _, imported in _IMPORT.findall(source)} for name, source in sources.items()}
    order = TopologicalSorter(needs).static_order()
    return "const modules = {};\n" + "\n".join(_wrapped(name, sources[name]) for name in order)


_IMPORT = re.compile(r'^import \{ ([^}]+) \} from "\./([\w.]+)";$', re.M)
_EXPORT = re.compile(r"^export ((?:async )?(?:const|function|class) ([\w$]+))", re.M)


def _wrapped(name: str, source: str) -> str:
    r"""One module as a function of no argument that fills its place in ``modules``.

    Example:
        >>> print(_wrapped("a.js", 'import { b } from "./b.js";\nexport const c = b + 1;'))
        modules["a.js"] = await (async () => {
        const { b } = modules["b.js"];
        const c = b + 1;
        return { c };
        })();
    """
    exported = ", ".join(match[1] for match in _EXPORT.findall(source))
    body = _EXPORT.sub(r"\1", _IMPORT.sub(r'const { \1 } = modules["\2"];', source))
    return f'modules["{name}"] = await (async () => {{\n{body.rstrip()}\nreturn {{ {exported} }};\n}})();'
