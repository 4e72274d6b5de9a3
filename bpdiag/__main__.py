"""The command line.  A first word without ``=`` is a sub-command; anything else is Hydra's.

Whatever is given is checked before anything is written: bad input gets one message and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bpdiag
from bpdiag.config import Config, UsageError, choose, flat, nearest
from bpdiag.trace import TraceError

HELP = """bpdiag: see where your gradient dies, and why.

  bpdiag [KEY=VALUE ...]           train MNIST, watch every layer, say where the gradient died and why
  bpdiag -m KEY=VALUE,VALUE ...    every combination, one table at the end
  bpdiag experiment=NAME           a whole question with its grid: {experiments}
  bpdiag diagnose RUN ...          judge stored runs again, without torch  [--json]

  bpdiag model.activation=sigmoid model.depth=10
  bpdiag -m model.activation=tanh,relu model.depth=5,20 seed=0,1,2

Keys and their defaults:
{keys}

  --json    what came of it as JSON, on standard output
  --quiet   nothing but errors

Also Hydra's own: --cfg job (show the configuration), --config-dir, --hydra-help, --shell-completion.
Exit code: 0 done (also when a run went not finite: it is stopped, kept and judged), 1 a run failed,
2 bad input, 130 interrupted.
"""


def conf() -> Path:
    """The folder of configurations: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except (UsageError, TraceError) as error:
        print(f"bpdiag: {error}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help", "help"):
        keys = "\n".join(f"  {key}={value}" for key, value in flat(Config()).items())
        experiments = ", ".join(sorted(path.stem for path in (conf() / "experiment").glob("*.yaml")))
        print(HELP.format(keys=keys, experiments=experiments))
        return 0
    if arguments and arguments[0] == "--version":
        print(f"bpdiag {bpdiag.__version__}")
        return 0
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        if arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        raise UsageError(f"{arguments[0]}: unknown command; {nearest(arguments[0], COMMANDS)}")
    return _train(arguments)


# ---- sub-commands -----------------------------------------------------------------------------------------


def _diagnose(arguments: list[str]) -> int:
    """``bpdiag diagnose RUN ...``: judge stored traces again."""
    parser = argparse.ArgumentParser(prog="bpdiag diagnose", description="Judge stored runs again, without torch.")
    parser.add_argument("run", nargs="+", help="a run folder, or a folder of run folders")
    parser.add_argument("--json", action="store_true", help="findings as JSON, one object a run")
    told = parser.parse_args(arguments)

    from bpdiag import diagnosis, terminal
    from bpdiag.trace import Trace, plain

    runs = [run for given in told.run for run in _runs(Path(given))]
    traces = [(run, Trace.load(run)) for run in runs]
    empty = [str(run) for run, trace in traces if not len(trace.sampled_steps)]
    if empty:
        raise TraceError(f"{', '.join(empty)}: nothing was measured")
    if told.json:
        found = [
            {"run": str(run), "findings": diagnosis.diagnose(trace), "notes": diagnosis.notes(trace)}
            for run, trace in traces
        ]
        print(json.dumps(plain(found), indent=1, ensure_ascii=False))
        return 0
    out = terminal.console()
    for run, trace in traces:
        if len(traces) == 1:
            terminal.report(trace, diagnosis.diagnose(trace), run, out)
        else:
            terminal.brief(run, trace, diagnosis.diagnose(trace), out)
    return 0


def _runs(folder: Path) -> list[Path]:
    """The run folder given, or the run folders in it."""
    if folder.is_dir() and not (folder / "trace").is_dir() and not (folder / "meta.json").is_file():
        inside = sorted({path.parent.parent for path in folder.glob("**/trace/meta.json")})
        return inside or [folder]
    return [folder]


COMMANDS: dict[str, Callable[[list[str]], int]] = {"diagnose": _diagnose}


# ---- training through Hydra -------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from bpdiag.launcher import TELLS, JobsFailedError, job_folder

    flags = [word for word in arguments if word in ("--json", "--quiet")]
    arguments = [word for word in arguments if word not in flags]
    TELLS.set(flags[-1][2:] if flags else "text")
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda experiment, data: experiment or data, replace=True)
    ConfigStore.instance().store(name="schema", node=Config, provider="bpdiag")
    told = get_args_parser().parse_args(arguments)
    with _as_argv(arguments):
        try:
            if not (told.info or told.hydra_help or told.shell_completion):
                _check(told.overrides, told.multirun, told.config_dir)
            hydra.main(version_base="1.3", config_path=str(conf()), config_name="config")(_job)()
        except JobsFailedError as error:
            print(f"bpdiag: {error}", file=sys.stderr)
            return 1
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(_in_short(error)) from error
        except (UsageError, TraceError):
            raise
        except Exception:
            traceback.print_exc()
            return 1
    return 0


@contextmanager
def _as_argv(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and hands its exceptions on only when HYDRA_FULL_ERROR is set."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["bpdiag", *arguments], "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)


def _job(composed: Any) -> Any:
    """One job of Hydra's: train, and say what came of it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from bpdiag import terminal
    from bpdiag.launcher import TELLS
    from bpdiag.results import Outcome
    from bpdiag.training import train

    config, folder = _config(composed), Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode is RunMode.MULTIRUN or TELLS.get() == "quiet":
        result = train(config, folder)
    elif TELLS.get() == "json":
        from bpdiag.trace import plain

        result = train(config, folder)
        told = {"run": str(_relative(folder)), "metrics": result.metrics, "findings": result.findings}
        print(json.dumps(plain(told), indent=1, ensure_ascii=False))
    else:
        out = terminal.console()
        with terminal.progress(out) as progress:
            result = train(config, folder, progress)
        terminal.report(result.trace, result.findings, _relative(folder), out)
        terminal.metrics(result.metrics, out)
    return Outcome.of(result.trace, result.findings, result.metrics, flat(config))


def _relative(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _config(composed: Any) -> Config:
    """A composed configuration as our dataclasses."""
    from omegaconf import OmegaConf

    own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), own))


def _check(overrides: list[str], multirun: bool, config_dir: str | None) -> None:
    """Compose and check every job of the command before anything is written.

    Raises:
        UsageError: A key or a value cannot be used.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    with initialize_config_dir(str(conf()), version_base="1.3", job_name="bpdiag"):
        parser = OverridesParser.create()
        parsed = parser.parse_overrides(overrides)
        for override in parsed:
            _check_key(override, config_dir)
        fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
        if config_dir is not None:
            fixed.append(f"hydra.searchpath=[file://{Path(config_dir).absolute()}]")
        base = compose("config", fixed, return_hydra_config=True)
        swept = [o.input_line for o in parsed if o.is_sweep_override()]
        if not multirun and base.hydra.mode is not RunMode.MULTIRUN:
            if swept:
                raise UsageError(f"{swept[0]}: several values make several runs; add -m")
            if (Path(base.hydra.run.dir) / "trace").exists():  # Hydra would write its own files over the old ones
                raise UsageError(f"{base.hydra.run.dir}: already holds a run; choose another hydra.run.dir")
            jobs = [fixed]
        elif base.hydra.sweeper._target_.endswith("BasicSweeper"):
            params = [f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()]
            grid = parser.parse_overrides([*params, *overrides])
            extra = fixed[len(parsed) - len(swept) :]
            jobs = [[*job, *extra] for job in BasicSweeper.split_arguments(grid, None)[0]]
        else:
            jobs = [fixed]  # another sweeper decides as it goes
        from bpdiag.training import check

        for job in jobs:
            try:
                check(_config(compose("config", job, return_hydra_config=True)))
            except UsageError as error:
                where = f" (job {' '.join(job)})" if len(jobs) > 1 else ""
                raise UsageError(f"{error}{where}") from error


def _check_key(override: Any, config_dir: str | None) -> None:
    """The key of an override is one we know, and so is the value where it names a file of a group."""
    from hydra.core.global_hydra import GlobalHydra

    key, known = override.key_or_group, list(flat(Config()))
    loader = GlobalHydra.instance().config_loader()
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return
    if override.is_delete():
        raise UsageError(f"{override.input_line}: no key can be taken away; give it a value")
    groups = [group for group in loader.list_groups("") if group != "hydra"]
    if key in groups and not override.is_sweep_override() and override.value() is not None:
        theirs = [path.stem for path in (Path(config_dir) / key).glob("*.yaml")] if config_dir else []
        choose(key, str(override.value()), [*loader.get_group_options(key), *theirs])
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside and not isinstance(override.value(), dict):
        given = override.get_value_element_as_str()
        raise UsageError(
            f"{key}={given}: {key} has keys of its own: {', '.join(inside)}; did you mean {inside[0]}={given}?"
        )
    if key not in known and key not in groups and not inside:
        raise UsageError(f"{key}: unknown key; {nearest(key, [*known, *groups])}")


def _in_short(error: BaseException) -> str:
    """Hydra's and OmegaConf's words on two lines at the most."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    if key:
        return lines[0] if key in lines[0] else f"{key}: {lines[0]}"
    return "; ".join(line for line in lines[:2] if not line.endswith(":"))


if __name__ == "__main__":
    sys.exit(main())
