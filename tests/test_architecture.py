"""The contract of the house as one literal table: who may import whom, and what foreign."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 600  # lines

# module: (what of ours it may import, which third parties); trace and config may be imported by all
CONTRACT: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), set()),
    "config": (set(), set()),
    "sketch": (set(), {"numpy"}),
    "tables": (set(), {"pyarrow"}),
    "trace": ({"sketch", "tables"}, {"numpy", "pyarrow"}),
    # maths
    "chain": (set(), set()),
    "rules": (set(), {"torch"}),
    "statistics": (set(), {"torch"}),
    "meanfield": ({"rules"}, {"torch", "numpy"}),
    # subjects
    "modules": ({"rules"}, {"torch"}),
    "functional": ({"rules"}, {"torch"}),
    "swapping": ({"rules", "functional"}, {"torch"}),
    "initialization": ({"rules"}, {"torch"}),
    "model": ({"rules", "modules", "initialization"}, {"torch"}),
    "data": (set(), {"numpy", "torch", "torchvision", "PIL"}),
    "backprop": ({"rules", "modules", "statistics"}, {"torch", "numpy", "pyarrow"}),
    # measuring
    "hooks": ({"rules", "statistics"}, {"torch"}),
    # judging
    "diagnosis": (set(), {"numpy"}),
    "difference": (set(), {"numpy"}),
    # showing
    "views": ({"diagnosis", "bridge"}, {"numpy"}),
    "dashboard": ({"views"}, {"tensorboard", "werkzeug", "numpy", "matplotlib"}),
    "figure": ({"tables", "diagnosis", "bridge", "chain", "lesson"}, {"numpy", "matplotlib"}),
    "report": ({"tables", "views", "dashboard", "__init__"}, set()),
    "lesson": ({"chain"}, set()),
    "bridge": ({"lesson"}, {"numpy"}),
    "results": ({"tables", "diagnosis"}, {"pyarrow"}),
    "terminal": ({"diagnosis", "results"}, {"numpy", "rich"}),
    # launching
    "prediction": (
        {"meanfield", "rules", "statistics", "initialization", "model", "data", "diagnosis"},
        {"torch", "numpy"},
    ),
    "runlog": ({"diagnosis", "views", "dashboard"}, set()),
    "session": ({"hooks", "runlog", "terminal", "__init__"}, {"torch"}),
    "trial": ({"session", "diagnosis"}, {"torch"}),
    "training": (
        {"session", "runlog", "prediction", "model", "data", "rules", "diagnosis", "dashboard", "figure"},
        {"torch", "numpy", "PIL"},
    ),
    "stacking": (
        {"backprop", "training", "session", "runlog", "prediction", "hooks", "model", "data", "rules", "dashboard"},
        {"torch", "numpy", "pyarrow"},
    ),
    "remedy": (
        {"training", "trial", "session", "initialization", "meanfield", "rules", "diagnosis", "terminal", "__init__"},
        {"torch", "numpy"},
    ),
    "commands": ({"views", "report", "figure", "difference"}, set()),
    "engines": (set(), {"ray", "submitit"}),
    "dealing": (set(), set()),
    "job": ({"stacking", "training", "remedy", "results", "engines"}, {"torch"}),
    "preloaded": ({"data", "stacking"}, {"torch", "pandas"}),
    "composing": (set(), {"hydra", "omegaconf"}),
    "launcher": ({"composing", "job", "dealing", "engines", "results", "terminal", "report"}, {"hydra", "omegaconf"}),
    "__main__": (
        {
            "training",
            "remedy",
            "prediction",
            "job",
            "composing",
            "launcher",
            "results",
            "terminal",
            "commands",
            "diagnosis",
            "lesson",
            "bridge",
            "__init__",
        },
        {"hydra", "omegaconf", "yaml"},
    ),
    "hydra_plugins": ({"launcher"}, {"hydra", "omegaconf"}),
}
STOREYS = [
    ["sketch", "tables"],
    ["config", "trace", "__init__"],
    ["chain", "rules", "statistics", "engines", "dealing", "composing"],
    ["modules", "functional", "initialization", "meanfield"],
    ["model", "swapping", "data"],
    ["hooks", "backprop"],
    ["diagnosis", "difference"],
    ["results", "lesson"],
    ["terminal", "bridge"],
    ["views"],
    ["dashboard", "figure"],
    ["report"],
    ["commands"],
    ["runlog"],
    ["session", "prediction"],
    ["training", "trial"],
    ["remedy", "stacking"],
    ["job", "preloaded"],
    ["launcher"],
    ["__main__", "hydra_plugins"],
]
TABLES = {
    "RULES",
    "ACTIVATIONS",
    "FUNCTIONS",
    "STATISTICS",
    "DIAGNOSES",
    "INITIALIZERS",
    "OPTIMIZERS",
    "COMMANDS",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "hydra_plugins" else parts[1]


def sources() -> list[Path]:
    return sorted([*(ROOT / "bpdiag").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")])


def imports(source: str) -> set[str]:
    """Dotted names imported anywhere in a file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "bpdiag":
                found |= {f"bpdiag.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def broken(module: str, source: str) -> list[str]:
    """What a file imports against the contract."""
    ours, foreign = CONTRACT[module]
    found = []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "bpdiag":
            target = rest[0] if rest else "__init__"
            if target not in {module, "trace", "config", *ours}:
                found.append(name)
        elif top not in sys.stdlib_module_names and top not in foreign:
            found.append(name)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_the_contract_allows(path):
    assert broken(module_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("diagnosis", "import torch"),
        ("hooks", "from bpdiag.dashboard.writer import TensorBoardWriter"),
        ("trace", "from bpdiag import diagnosis"),
        ("training", "import hydra"),
        ("rules", "def f():\n    import numpy"),
    ],
)
def test_the_contract_can_fail(module, line):
    assert broken(module, line)


def test_every_module_stands_in_the_contract_and_on_one_storey():
    assert {module_of(path) for path in sources()} == CONTRACT.keys()
    assert sorted(m for storey in STOREYS for m in storey) == sorted(CONTRACT)


def test_dependencies_point_one_way():
    height = {module: i for i, storey in enumerate(STOREYS) for module in storey}
    for module, (ours, _) in CONTRACT.items():
        assert all(height[other] < height[module] for other in ours), module


@pytest.mark.parametrize("path", sources() + sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.name)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_tables_are_filled_only_in_the_file_that_owns_them():
    owners: dict[str, set[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                name = target.value if isinstance(target, ast.Subscript) else target
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and isinstance(name, ast.Name):
                    owners.setdefault(name.id, set()).add(str(path))
    assert all(len(owners[table]) == 1 for table in TABLES), {t: owners.get(t) for t in TABLES}


@pytest.mark.parametrize(
    "statement",
    [
        "import bpdiag",
        "import bpdiag.chain",
        "import bpdiag.bridge",
        "import bpdiag.trace",
        "import bpdiag.diagnosis",
        "import bpdiag.launcher",
        "import bpdiag.terminal",
        "import bpdiag.views",
        "import bpdiag.report",
        "import bpdiag.dashboard.plugin",
    ],
)
def test_these_cost_no_torch(statement):
    probe = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_only_the_command_line_and_the_launcher_know_hydra():
    knowing = {m for m, (_, foreign) in CONTRACT.items() if "hydra" in foreign}
    assert knowing == {"composing", "launcher", "__main__", "hydra_plugins"}


def test_the_public_names_load():
    import bpdiag

    for name in bpdiag.__all__:
        assert getattr(bpdiag, name) is not None
    with pytest.raises(AttributeError, match="public: "):
        bpdiag.wacth  # noqa: B018


def test_ruff_finds_nothing():
    ruff = pytest.importorskip("ruff", reason="ruff is not installed")
    done = subprocess.run(
        [sys.executable, "-m", ruff.__name__, "check", "--no-cache", str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
