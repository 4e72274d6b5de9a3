"""Engines with work that takes no time: what is told arrives, what is killed is said, nothing is left running.

Ray and submitit where they are installed (pip install 'bpdiag[ray,slurm]').
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import engine_work
import pytest

from bpdiag import engines
from bpdiag.config import UsageError
from bpdiag.engines import Ended, Failure, Local, Told


def local(work, processes=2):
    return Local(work, processes, ["bpdiag.preloaded"])


@pytest.fixture(scope="module")
def cluster():
    """Two workers of Ray's, begun once."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'bpdiag[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # as where the package and the work are installed
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield lambda work: engines.Ray(work, None, {})
        ray.shutdown()


def queue(work, folder):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'bpdiag[slurm]'")
    return engines.Submitit(work, 2, {"cluster": "local", "timeout_min": 5}, folder)


@pytest.fixture(params=["local", "ray", "submitit"])
def made(request, tmp_path, monkeypatch):
    """An engine for any work, of each kind."""
    begun = []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    ray = request.getfixturevalue("cluster") if request.param == "ray" else None

    def make(work):
        makers = {"local": local, "ray": ray, "submitit": lambda work: queue(work, tmp_path / "queue")}
        begun.append(makers[request.param](work))
        return begun[-1]

    yield make
    for engine in begun:
        engine.close()


def told(events):
    """What each task said, in its order, and how it ended."""
    said, ends = {}, {}
    for task, event in events:
        if isinstance(event, Told):
            said.setdefault(task, []).append(event.what)
        else:
            ends[task] = event
    return said, ends


def test_all_that_is_told_arrives_in_its_order(made):
    engine = made(engine_work.count)
    for task in (3, 1, 2, 0):
        engine.submit(task)
    said, ends = told(engine.events())
    assert said == {3: [0, 1, 2], 2: [0, 1], 1: [0]}
    assert ends == dict.fromkeys((3, 1, 2, 0), Ended())


def test_an_exception_is_told_and_stops_no_other(made):
    engine = made(engine_work.fail)
    engine.submit("room")
    engine.submit("time")
    said, ends = told(engine.events())
    assert said == {"room": ["begun"], "time": ["begun"]}
    assert {task: end.failure.error for task, end in ends.items()} == {
        "room": "ValueError: no room",
        "time": "ValueError: no time",
    }
    assert "engine_work.py" in ends["room"].failure.trace


def test_a_killed_process_is_said_and_its_task_can_be_submitted_again(made, tmp_path):
    engine = made(engine_work.die_once)
    tasks = [(name, str(tmp_path / name)) for name in "ab"]
    for task in tasks:
        engine.submit(task)
    done, lost = [], []
    for task, event in engine.events():
        if isinstance(event, Told) and event.what.endswith("done"):
            done.append(event.what)
        elif isinstance(event, Ended) and event.lost:
            lost.append(task)
            engine.submit(task)
    assert sorted(done) == ["a done", "b done"]
    assert sorted(lost) == tasks


@pytest.mark.parametrize(("work", "how"), [("die", "was killed by SIGKILL (out of memory?)"), ("leave", "code 3")])
def test_how_a_process_ended_is_told(work, how):
    with closing(local(getattr(engine_work, work))) as engine:
        engine.submit(0)
        (end,) = told(engine.events())[1].values()
        assert how in end.lost


def test_each_process_has_one_thread_and_hears_no_ctrl_c_of_the_terminal():
    with closing(local(engine_work.who)) as engine:
        for task in range(3):
            engine.submit(task)
        said, _ = told(engine.events())
        found = [answer for answers in said.values() for answer in answers]
        assert len({pid for pid, _, _ in found}) == 2  # two processes, the first that was free took the third task
        assert {threads for _, threads, _ in found} == {1}
        assert {handler for _, _, handler in found} == {signal.SIG_IGN}


def test_no_more_processes_than_tasks():
    with closing(local(engine_work.who, processes=100)) as engine:
        engine.submit(0)
        told(engine.events())
        assert len(engine._idle) == 1


def test_a_question_is_answered_by_another_process_and_what_it_raises_is_raised():
    with closing(local(engine_work.count)) as engine:
        assert engine.ask(engine_work.whoami) != os.getpid()
        with pytest.raises(RuntimeError, match="invalid literal"):
            engine.ask(int, "x")
        with pytest.raises(RuntimeError, match="SIGKILL"):
            engine.ask(os.kill, engine.ask(os.getpid), signal.SIGKILL)
        assert engine.ask(max, 1, 2) == 2


def test_an_interrupted_process_keeps_what_there_is(tmp_path):
    notes = [tmp_path / name for name in ("one", "other", "never begun")]
    with closing(local(engine_work.wait)) as engine:
        for note in notes:
            engine.submit(str(note))
        events = engine.events()
        assert {next(events)[1], next(events)[1]} == {Told("begun")}
        engine.interrupt()
        said, ends = told(engine.events())
    assert [note.read_text() for note in notes[:2]] == ["interrupted"] * 2
    assert not notes[2].exists()
    assert (said, len(ends)) == ({}, 2)


def test_an_interrupt_that_became_an_error_ends_its_process_too():
    with closing(local(engine_work.swallow)) as engine:
        engine.submit(0)
        next(engine.events())
        begun = time.monotonic()
        engine.interrupt()
        assert time.monotonic() - begun < engines.FAREWELL
        assert told(engine.events())[1][0].failure.error == "ValueError: half a sample"


def test_nothing_is_left_running():
    engine = local(engine_work.who)
    pid = engine.ask(os.getpid)
    os.kill(pid, 0)
    engine.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_unknown_engine_and_one_that_is_not_installed_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="rya: unknown; known: local, ray, submitit; did you"):
        engines.require("rya")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for engine, extra in (("ray", "ray"), ("submitit", "slurm")):
        with pytest.raises(UsageError, match=rf"{engine} is not installed; pip install 'bpdiag\[{extra}\]'"):
            engines.require(engine)
    engines.require("local")


def test_a_failure_travels_in_words():
    try:
        raise MemoryError("no room")
    except MemoryError as error:
        failure = Failure.of(error)
    assert failure.error == "MemoryError: no room"
    assert "test_engines.py" in failure.trace
