"""The command line.  A first word without ``=`` is a sub-command; anything else is Hydra's.

Whatever is given is checked before anything is written: bad input gets one message and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bpdiag
from bpdiag import commands
from bpdiag.config import Config, UsageError, choose, flat, meanings, nearest, says_yes

HELP = """bpdiag: see where your gradient dies, and why.

  bpdiag [KEY=VALUE ...]           train MNIST, watch every layer, say where the gradient died and why
  bpdiag -m KEY=VALUE,VALUE ...    every combination, one table at the end
  bpdiag experiment=NAME           a whole question with its grid: {experiments}
  bpdiag predict [KEY=VALUE ...]   what theory expects of such a run, before it is trained
  bpdiag diagnose RUN ...          judge stored runs again, without torch  [--fail-on harm]
  bpdiag diagnose RUN --cure       and try remedies on copies, for up to remedy.seconds
  bpdiag report RUN ... -o FILE    one page that opens offline: map, profile, findings, chain, comparison
  bpdiag plot RUN ... -o FILE      the profile as a picture: .svg, .png or .pdf  [--step N]
  bpdiag plot [RUN] --chain        the product that a layer's gradient is, as a picture  [--layer NAME]
  bpdiag diff RUN RUN              what differs between two runs, and where their numbers part
  bpdiag chain [KEY=VALUE ...]     the chain rule on scalars, every factor named
  bpdiag chain --run RUN --layer NAME [--step N]    the same product, measured in a trained net

  bpdiag model.activation=sigmoid model.depth=10
  bpdiag -m model.activation=tanh,relu model.depth=5,20 seed=0,1,2

Keys and their defaults:
{keys}

Of all of them:
  --json    what came of it as JSON, on standard output
  --quiet   nothing but errors

Also Hydra's own: --cfg job (show the configuration), --config-dir, --hydra-help, --shell-completion.
Exit code: 0 done (also when a run went not finite: it is stopped, kept and judged), 1 a run failed,
2 bad input, 130 interrupted.
"""


FAILS = {"harm": ("harm",), "warning": ("harm", "warning")}  # what --fail-on fails on


def conf() -> Path:
    """The folder of configurations: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no bars gets question marks, not a traceback
    try:
        code = _guarded(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, as in | head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _guarded(arguments: list[str]) -> int:
    """Bad input becomes one message and exit code 2."""
    if arguments and arguments[0] in ("-h", "--help", "help"):
        known, told = flat(Config()), meanings(Config())
        keys = "\n".join(f"  {f'{key}={value}':<36}{told[key]}" for key, value in known.items())
        experiments = ", ".join(sorted(path.stem for path in (conf() / "experiment").glob("*.yaml")))
        print(HELP.format(keys=keys, experiments=experiments))
        return 0
    if arguments and arguments[0] == "--version":
        print(f"bpdiag {bpdiag.__version__}")
        return 0

    try:
        if arguments and not arguments[0].startswith(("-", "~", "+")) and "=" not in arguments[0]:
            if arguments[0] in COMMANDS:
                return COMMANDS[arguments[0]](arguments[1:])
            raise UsageError(f"{arguments[0]}: unknown command; {nearest(arguments[0], COMMANDS)}")
        return _train(arguments)
    except UsageError as error:
        print(f"bpdiag: {error}", file=sys.stderr)
        return 2


# ---- sub-commands -----------------------------------------------------------------------------------------


def _diagnose(arguments: list[str]) -> int:
    """``bpdiag diagnose RUN ...``: judge stored traces again."""
    parser = commands.Parser(
        prog="bpdiag diagnose",
        description="Judge stored runs again, without torch.",
        as_json="findings as JSON, one object a run",
    )
    parser.add_argument("run", nargs="+", help="a run folder, or a folder of run folders")
    parser.add_argument("--cure", action="store_true", help="try remedies on copies and add them to findings.json")
    parser.add_argument("--fail-on", metavar="SEVERITY", help="exit with 1 if a run has a finding: harm, warning")
    told = parser.parse_args(arguments)
    if told.fail_on is not None:
        choose("--fail-on", told.fail_on, FAILS)

    from bpdiag import diagnosis, terminal
    from bpdiag.trace import Trace, TraceError, plain

    judged, refused = [], []
    for run in [run for given in told.run for run in commands.runs_in(Path(given))]:
        try:
            trace = Trace.load(run)
            if not len(trace.sampled_steps):
                raise TraceError(f"{run}: nothing was measured")
            judged.append((run, trace, diagnosis.diagnose(trace)))
        except TraceError as error:  # one that cannot be read stops no other
            refused.append(str(error))
    cures = _cure_stored(judged) if told.cure else {}
    if told.tells == "json" and judged:
        found = [
            {
                "run": str(run),
                "findings": f,
                "notes": diagnosis.notes(trace),
                **(cures[run].to_dict() if run in cures else {}),
            }
            for run, trace, f in judged
        ]
        print(json.dumps(plain(found), indent=1, ensure_ascii=False))
    elif told.tells == "quiet":
        pass
    elif len(judged) == 1:
        run, trace, findings = judged[0]
        terminal.report(trace, findings, run, terminal.console())
        terminal.cure(cures.get(run), terminal.console())
    else:
        for run, trace, findings in judged:
            terminal.brief(run, trace, findings, terminal.console())
            terminal.cure(cures.get(run), terminal.console())
    for message in refused:
        print(f"bpdiag: {message}", file=sys.stderr)
    failed = any(f.severity in FAILS.get(told.fail_on, ()) for _, _, findings in judged for f in findings)
    if any(cure.interrupted for cure in cures.values()):
        raise KeyboardInterrupt
    return 2 if refused else 1 if failed else 0


def _cure_stored(judged: list[Any]) -> dict[Path, Any]:
    """What was tried for each run that has findings, by its folder, and kept there."""
    from bpdiag import terminal
    from bpdiag.remedy import cure_stored, keep

    cures = {}
    for run, trace, findings in judged:
        if findings:
            with terminal.trying(terminal.console(stderr=True)) as trying:
                cures[run] = cure_stored(run, trace, findings, trying)
            keep(cures[run], run)
            if cures[run].interrupted:
                break
    return cures


def _chain(arguments: list[str]) -> int:
    """``bpdiag chain``: the chain rule on scalars; with ``--run`` the same product in a trained net."""
    from bpdiag import lesson

    parser = commands.Parser(
        prog="bpdiag chain", description=lesson.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="see above; what is not given is the lesson's")
    parser.add_argument("--run", help="a run folder: measured factors in the place of scalars")
    parser.add_argument("--layer", metavar="NAME", help="of that run: the layer whose dC/dW is told")
    parser.add_argument("--step", type=int, metavar="N", help="of that run: a sampled step; else the last")
    told = parser.parse_intermixed_args(arguments)
    if told.run is None and (told.layer is not None or told.step is not None):
        raise UsageError("--layer and --step are of a run: bpdiag chain --run RUN --layer NAME [--step N]")
    if told.run is not None and told.words:
        raise UsageError(f"{told.words[0]}: a run has its own numbers; give --run or KEY=VALUE, not both")
    if told.run is None:
        asked = lesson.parse(told.words)
        as_text, as_data = partial(lesson.render, asked), partial(lesson.to_data, asked)
    else:
        from bpdiag import bridge
        from bpdiag.trace import Trace

        product = bridge.weight_gradient(Trace.load(told.run), told.layer, told.step)
        as_text, as_data = partial(bridge.render, product), partial(bridge.to_data, product)
    commands.tell(told.tells, as_data, lambda: print(as_text()))
    return 0


def _predict(arguments: list[str]) -> int:
    """``bpdiag predict KEY=VALUE ...``: what theory expects of a run, untrained."""
    parser = commands.Parser(prog="bpdiag predict", description="What theory expects of a run, untrained.")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as of a run: bpdiag --help has them")
    told = parser.parse_intermixed_args(arguments)
    config = _composed(told.words)

    from bpdiag import diagnosis, terminal
    from bpdiag.prediction import predict
    from bpdiag.training import check_names

    check_names(config)
    trace = predict(config)
    findings = diagnosis.diagnose(trace)
    as_data = {**diagnosis.summarize(trace, findings), "findings": findings}
    commands.tell(told.tells, lambda: as_data, lambda: terminal.forecast(trace, findings, terminal.console()))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "predict": _predict,
    "diagnose": _diagnose,
    "report": commands.report,
    "plot": commands.plot,
    "diff": commands.diff,
    "chain": _chain,
}


# ---- training through Hydra -------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    import hydra
    from hydra._internal.utils import get_args_parser

    from bpdiag.launcher import TELLS, JobsFailedError, close_pool

    flags = [word for word in arguments if word in ("--json", "--quiet")]
    arguments = [word for word in arguments if word not in flags]
    TELLS.set(flags[-1][2:] if flags else "text")
    parser = get_args_parser()
    parser.exit_on_error = False  # our one line, not a page of usage
    try:
        told, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    if unknown:
        raise UsageError(f"{unknown[0]}: unknown option; bpdiag --help has ours, --hydra-help Hydra's")
    options = [word for word in arguments if word not in told.overrides]
    arguments = [*options, *told.overrides]  # Hydra takes no option between two of them
    with _hydra_in_words(), _as_argv(arguments):
        try:
            if not (told.info or told.hydra_help or told.shell_completion):
                _check(told.overrides, told.multirun, told.config_dir)
            hydra.main(version_base="1.3", config_path=str(conf()), config_name="config")(_job)()
        except JobsFailedError as error:
            print(f"bpdiag: {error}", file=sys.stderr)
            return 1
        except _refusals():
            raise
        except (UsageError, BrokenPipeError):
            raise
        except OSError as error:  # a full disk, a folder that may not be written
            print(f"bpdiag: {error}", file=sys.stderr)
            return 1
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            close_pool()
    return 0


def _refusals() -> tuple[type[Exception], ...]:
    """How Hydra, OmegaConf and YAML say no."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    return HydraException, OmegaConfBaseException, YAMLError


@contextmanager
def _hydra_in_words() -> Iterator[None]:
    """Hydra knows our schema inside; what it refuses is told as a UsageError."""
    from hydra.core.config_store import ConfigStore

    from bpdiag.launcher import register_resolvers

    register_resolvers()
    ConfigStore.instance().store(name="schema", node=Config, provider="bpdiag")
    try:
        yield
    except _refusals() as error:
        raise UsageError(_in_short(error)) from error


def _composed(overrides: list[str]) -> Config:
    """One run's configuration, composed and checked as a run's is; nothing is written.

    Raises:
        UsageError: A key or a value cannot be used, or several values are given.
    """
    from hydra import compose, initialize_config_dir

    from bpdiag.composing import configured

    with _hydra_in_words(), initialize_config_dir(str(conf()), version_base="1.3", job_name="bpdiag"):
        swept = [o.input_line for o in _understood(overrides, None) if o.is_sweep_override()]
        if swept:
            raise UsageError(f"{swept[0]}: one value at a time")
        return configured(compose("config", overrides))


def _understood(overrides: list[str], config_dir: str | None) -> list[Any]:
    """Each override by Hydra's grammar, its key known."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise UsageError(f"{word}: not KEY=VALUE")
    parser = OverridesParser.create()
    parsed = [_parsed(parser, word) for word in overrides]
    for override in parsed:
        _check_key(override, config_dir)
    return parsed


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
    """One job of Hydra's: train, and say what came of it.  (Those of a sweep are trained by ``launcher``.)"""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from bpdiag import terminal
    from bpdiag.composing import configured
    from bpdiag.job import cured, outcome_of
    from bpdiag.launcher import TELLS, of_a_sweep
    from bpdiag.training import train

    config, folder = configured(composed), Path(HydraConfig.get().runtime.output_dir)
    several = HydraConfig.get().mode is RunMode.MULTIRUN  # with another launcher than ours
    if several:
        config = of_a_sweep(config, HydraConfig.get().overrides.task)
    if several or TELLS.get() == "quiet":
        result = train(config, folder)
        cure = cured(result)
    elif TELLS.get() == "json":
        from bpdiag.trace import plain

        result = train(config, folder)
        cure = cured(result)
        told = {"run": str(_relative(folder)), "metrics": result.metrics, "findings": result.findings}
        told |= cure.to_dict() if cure else {}
        print(json.dumps(plain(told), indent=1, ensure_ascii=False))
    else:
        out = terminal.console()
        try:
            with terminal.progress(out) as progress:
                result = train(config, folder, progress)
        except KeyboardInterrupt:
            if (folder / "findings.json").is_file():
                print(
                    f"kept what there is in {_relative(folder)}: bpdiag diagnose {_relative(folder)}", file=sys.stderr
                )
            raise
        terminal.report(result.trace, result.findings, _relative(folder), out)
        terminal.metrics(result.metrics, out)
        with terminal.trying(out) as trying:
            cure = cured(result, trying)
        terminal.cure(cure, out)
    return outcome_of(result, cure)


def _relative(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _check(overrides: list[str], multirun: bool, config_dir: str | None) -> None:
    """Compose and check every job of the command before anything is written.

    Raises:
        UsageError: A key or a value cannot be used.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    from bpdiag import job, launcher
    from bpdiag.composing import Composer, configured
    from bpdiag.results import require

    if config_dir is not None and not says_yes(Path(config_dir).is_dir):
        raise UsageError(f"--config-dir {config_dir}: no such folder; it holds your own experiment/NAME.yaml")
    with initialize_config_dir(str(conf()), version_base="1.3", job_name="bpdiag"):
        parsed = _understood(overrides, config_dir)
        fixed = [word for word, o in zip(overrides, parsed, strict=True) if not o.is_sweep_override()]
        if config_dir is not None:
            fixed.append(f"hydra.searchpath=[file://{Path(config_dir).absolute()}]")
        base = compose("config", fixed, return_hydra_config=True)
        swept = [word for word, o in zip(overrides, parsed, strict=True) if o.is_sweep_override()]
        several = multirun or base.hydra.mode is RunMode.MULTIRUN
        if swept and not several:
            raise UsageError(f"{swept[0]}: several values make several runs; add -m")
        _check_folder(Path(base.hydra.sweep.dir if several else base.hydra.run.dir))
        if not several:
            if (Path(base.hydra.run.dir) / "trace").exists():  # Hydra would write its own files over the old ones
                raise UsageError(f"{base.hydra.run.dir}: already holds a run; choose another hydra.run.dir")
            if base.hydra.sweeper.get("params") and not any(o.key_or_group == "hydra.mode" for o in parsed):
                raise UsageError("this experiment has a grid (hydra.sweeper.params) and no 'mode: MULTIRUN'; add -m")
            jobs = [fixed]
        elif base.hydra.sweeper._target_.endswith("BasicSweeper"):
            params = [f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()]
            grid = OverridesParser.create().parse_overrides([*params, *overrides])
            extra = fixed[len(parsed) - len(swept) :]
            jobs = [[*words, *extra] for words in BasicSweeper.split_arguments(grid, None)[0]]
            twice = next((words for i, words in enumerate(jobs) if words in jobs[:i]), None)
            if twice:
                raise UsageError(f"{' '.join(twice)}: asked for twice in one sweep")
        else:
            jobs = [fixed]  # another sweeper decides as it goes
        require(configured(base).expect)
        refused = job.refused
        if several and base.hydra.launcher._target_ == launcher.StackConfig._target_:
            launcher.check(base.hydra.launcher)
            refused = partial(launcher.pool(base.hydra.launcher).ask, refused)  # they begin while we compose
        loader = Composer(GlobalHydra.instance().config_loader())
        own = [[word for word in words if not word.lstrip("+~").startswith("hydra")] for words in jobs]
        configs = [configured(loader.load_sweep_config(base, words) if several else base) for words in own]
        if bad := refused(configs):
            number, why = bad
            raise UsageError(f"{why} (job {' '.join(jobs[number])})" if len(jobs) > 1 else why)


def _parsed(parser: Any, word: str) -> Any:
    """One override, by Hydra's grammar."""
    from hydra.errors import HydraException

    try:
        return parser.parse_override(word)
    except HydraException as error:
        key, why = word.partition("=")[0], str(error).splitlines()[0].partition(" expecting {")[0]
        raise UsageError(
            f"'{word}': Hydra cannot read it ({why}); text that is not plain goes into quotes: \"{key}='...'\""
        ) from error


def _check_folder(folder: Path) -> None:
    """A folder that can be made or written into, before a long run finds out that it cannot."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except (OSError, ValueError):  # a name of 300 characters, one with a null
        usable = False
    if not usable:
        raise UsageError(f"{folder}: cannot be written; choose another place with hydra.run.dir or hydra.sweep.dir")


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
    if key in groups and override.is_sweep_override():
        raise UsageError(f"{override.input_line}: one {key} at a time; each has a grid of its own")
    if key in groups and override.value() is not None:
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
    """Hydra's, OmegaConf's and YAML's words on one line: which file, which key, what is wrong with it."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    file = re.match(r"In '(.+)': \w+ raised while composing config:$", lines[0])
    if not file:
        return (f"{key}: " if key and key not in lines[0] else "") + (lines[0] if key else "; ".join(lines[:3]))
    name, what = file[1], lines[1]
    if what.startswith("Key ") and key == name.partition("/")[0]:
        return f"{name}.yaml: its first line must be '# @package _global_', else its keys are taken for those of {key}"
    if what.startswith("Key "):
        return f"{name}.yaml: {key}: unknown key; {nearest(key, flat(Config()))}"
    return f"{name}.yaml: {key}: {what}"


if __name__ == "__main__":
    sys.exit(main())
