"""``bpdiag chain`` as its readers meet it."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest

from bpdiag import lesson
from bpdiag.__main__ import main
from bpdiag.chain import LASTS, SQUISHES, Chain
from bpdiag.lesson import HELP, MOST_LAYERS, READERS, WIDTH, Lesson, parse, render, to_data


def page(*words):
    return render(parse(words))


def test_the_lesson_is_the_default(capsys):
    assert main(["chain"]) == 0
    out = capsys.readouterr().out
    assert main(["chain", "a0=1", "w=2,3,0.5", "y=2", "squish=none", "last=squish", "lr=0.01", "steps=3"]) == 0
    assert capsys.readouterr().out == out
    for line in (
        "  a3 = w3 · a2   = 0.5 · 6  = 3",
        "  da3/da2 = w3                         = 0.5   shared by w2, w1",
        "  dC/dw1 = dC/da3 · da3/da2 · da2/da1 · da1/dw1 = 2 · 0.5 · 3 · 1 = 3",
        "  dC/da1 = dC/da2 · da2/da1 = 1 · 3   = 3",
        "  5 multiplications of factors; each weight's product by itself would take 6.",
        "  a2    -0.30 ████████████",
        "  a1     0.18 ▒▒▒▒▒▒▒",
        "     1    0.05328157         -1.57    -0.9467184      1.97      2.98       0.38",
    ):
        assert line in out.splitlines()


def test_a_squish_is_a_factor_of_its_own():
    told = page("squish=sigmoid").splitlines()
    assert "  a1 = sigmoid(w1 · a0) = sigmoid(2 · 1)           = 0.8807971" in told
    assert "  da3/da2 = da3/dz3 · w3  = 0.2368625 · 0.5        = 0.1184312    shared by w2, w1" in told
    assert "         = -2.770762 · 0.1184312 · 0.186128 · 0.1049936 = -0.006412685" in told
    linear = page("squish=sigmoid", "last=linear")
    assert "da3/dz3" not in linear
    assert "= 0.4667702" in linear


def test_a_derivative_comes_true_on_the_page():
    assert "Try it: w1 + 0.001 moves C by 0.00300225; 0.001 · dC/dw1 is 0.003." in page()


def test_micrograds_neuron_on_the_page():
    told = page("a0=2", "w=-3", "b=6.8813735870195432", "squish=tanh", "y=0")
    assert "a1 = tanh(w1 · a0 + b1) = tanh(-3 · 2 + 6.881374) = 0.7071068" in told
    assert "da1/dw1 = da1/dz1 · a0 = 0.5 · 2             = 1 " in told
    assert "1 multiplication of factors" in told


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["w=-2.123456789,-3.123456789,-0.123456789", "squish=tanh", "y=-3.14159265", "b=-1,2,-3"],
        ["w=-1.23456789x5", "squish=sigmoid"],
        ["w=1x6", "squish=tanh", "steps=13"],
        ["w=0.5x100", "squish=sigmoid"],
        ["w=1x1000", "squish=sigmoid"],
        ["w=1e150x4"],
        ["w=-1", "squish=relu"],
        ["w=1.5,0.8,1.2,0.9,1.1,0.7", "squish=relu", "y=-12345.678", "a0=1.23456789"],
        ["w=0.836,1.156,-1.391,1.788,1.747", "b=1.27,1.75,-1.99,-1.63,-1.85"],
        ["lr=1.23456789e-100", "w=1x1000", "a0=0", "squish=sigmoid"],
    ],
    ids=" ".join,
)
def test_every_page_fits_its_width(words):
    assert max(map(len, page(*words).splitlines())) <= WIDTH


def some_lessons(count=200, seed=0):
    """Of one to a thousand layers, the numbers of all sizes and both signs."""
    draw = random.Random(seed)

    def number(spread):
        return draw.choice((-1, 1)) * 10 ** draw.uniform(-spread, spread)

    for _ in range(count):
        depth = draw.choice((1, 2, 3, 4, 5, 6, 7, 8, 30, 1000))
        spread = draw.choice((0.3, 1, 5, 120))
        w, biased = [number(spread) for _ in range(depth)], draw.random() < 0.5
        b = [number(spread) for _ in w] if biased else ()
        chain = Chain(number(spread), w, number(spread), draw.choice([*SQUISHES]), draw.choice(LASTS), b)
        yield Lesson(chain, min(abs(number(spread)), 1e6), draw.choice((0, 1, 3, 20)))


def test_the_pages_of_two_hundred_chains_fit():
    for asked in some_lessons():
        assert max(map(len, render(asked).splitlines())) <= WIDTH, asked


def test_without_folding_many_would_not_fit(monkeypatch):
    monkeypatch.setattr(lesson, "WIDTH", 1_000)
    wide = [asked for asked in some_lessons() if max(map(len, render(asked).splitlines())) > WIDTH]
    assert len(wide) > 50


def test_the_steps_show_as_many_weights_as_fit():
    told = page("w=0.836,1.156,-1.391,1.788,1.747", "b=1.27,1.75,-1.99,-1.63,-1.85").splitlines()
    (heading,) = [line for line in told if line.startswith("  step ")]
    assert heading.split() == ["step", "C", "foretold", "came", "w1", "w2", "w5"]
    assert "  ... 10 steps more ..." in page("steps=13").splitlines()


def test_a_factor_names_three_sharers_and_of_more_the_ends():
    told = page("w=1x4")
    assert "shared by w4 to w1" in told
    assert "shared by w3, w2, w1" in told


def test_a_page_takes_one_sweep_a_chain(monkeypatch):
    ways = []
    forward = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self: ways.append(self) or forward(self))
    render(Lesson(Chain()))
    assert len(ways) == 6  # the lesson's, the one with w1 nudged, and those of steps 0 to 3
    ways.clear()
    to_data(Lesson(Chain()))
    assert len(ways) == 5


def test_a_deep_chain_shows_its_ends_and_twenty_bars():
    told = page("w=1x100", "squish=sigmoid")
    assert told.count("... 96 layers more ...") == 4
    assert told.count("█\n") == 20
    assert "  a1     -64.20 ████████████████████████████████████████" in told
    assert "  199 multiplications of factors; each weight's product by itself would take 5,050." in told
    assert "dC/da100 · da100/da99 · ... · da2/da1 · da1/dw1" in told


def test_overflow_underflow_and_a_leap_are_told_not_thrown(capsys):
    assert main(["chain", "w=1e200,1e200,3"]) == 0
    assert "Overflow: z2 is beyond the largest double" in capsys.readouterr().out
    assert main(["chain", "w=1x1000", "squish=sigmoid"]) == 0
    out = capsys.readouterr().out
    assert "Underflow: dC/da500 is 0 though no factor is" in out
    assert "a1     -647.75" in out
    assert "C has grown" not in out
    assert main(["chain", "lr=1", "steps=50"]) == 0
    assert "C has grown: such steps leap across the valley" in capsys.readouterr().out
    assert main(["chain", "w=-1", "squish=relu"]) == 0
    assert "nothing of the cost reaches w1" in capsys.readouterr().out


def test_as_data(capsys):
    assert main(["chain", "squish=sigmoid", "--json", "steps=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["backward"]["dC/dw1"] == pytest.approx(-0.006412685, rel=5e-7)
    assert told["factors"]["da3/da2"] == pytest.approx(0.1184312, rel=5e-7)
    assert told["multiplications"] == {"sweep": 5, "apart": 6}
    assert [step["step"] for step in told["steps"]] == [0, 1, 2]
    assert main(["chain", "w=1e200,1e200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["forward"]["C"] == "Infinity"


BAD = [
    ("w=abc", "w: 'abc' is not a number"),
    ("w=", "w: '' is not a number"),
    ("w=1,,2", "w: '' is not a number"),
    ("w=nan", "w: 'nan' is not finite"),
    ("a0=inf", "a0: 'inf' is not finite"),
    ("y=1e999", "y: '1e999' is not finite"),
    ("w=½", "w: '½' is not a number"),
    ("w=1x1000000", "w: more than 1,000 layers"),
    ("w=" + ",".join(["1"] * 1_000_000), "w: more than 1,000 layers"),
    ("w=1x1e300", "w: more than 1,000 layers"),
    ("w=1x0", "w: '0' is not a whole number of 1 or more"),
    ("w=1x2.5", "w: '2.5' is not a whole number"),
    ("w=1x", "w: '' is not a number"),
    ("wigth=2", "wigth: unknown key; known: a0, y, w, b, squish, last, lr, steps"),
    ("sqish=tanh", "did you mean 'squish'"),
    ("=1", ": unknown key"),
    ("squish=tanhh", "did you mean 'tanh'"),
    ("squish=" + "x" * 100_000, "unknown; known: none, sigmoid, tanh, relu"),
    ("squish=", "known: none, sigmoid, tanh, relu"),
    ("last=linaer", "did you mean 'linear'"),
    ("steps=-1", "steps: '-1' is not a whole number from 0 to 1,000"),
    ("steps=2.5", "steps: '2.5' is not a whole number"),
    ("steps=9" + "9" * 5000, "steps: "),
    ("steps=1001", "steps: '1001' is not a whole number from 0 to 1,000"),
    ("lr=-1", "lr=-1: must be from 0 to 1000000"),
    ("lr=nan", "lr: 'nan' is not finite"),
    ("b=1,2", "b: 2 numbers for 3 layers"),
    ("weights", "weights: not KEY=VALUE"),
    ("", ": not KEY=VALUE"),
    ("-5", "-5: not KEY=VALUE"),
    ("w=\ud800", "is not a number"),  # a byte that is no UTF-8
    ("--step=3", "--layer and --step are of a run"),
    ("--layer=linear1", "--layer and --step are of a run"),
]


@pytest.mark.parametrize(("word", "message"), BAD, ids=[word[:20].encode("ascii", "replace") for word, _ in BAD])
def test_bad_input_gets_one_line_and_exit_2(word, message, capsys):
    assert main(["chain", word]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert len(told.err) < 200


def test_twice_is_refused(capsys):
    assert main(["chain", "w=1", "w=2"]) == 2
    assert "w: given twice" in capsys.readouterr().err


def test_as_many_layers_as_are_allowed_are_taken():
    assert parse([f"w=1x{MOST_LAYERS - 1},2"]).chain.depth == MOST_LAYERS


def test_layers_times_steps_are_limited(capsys):
    assert parse(["w=1x1000", "steps=100"]).steps == 100
    assert parse(["w=1x100", "steps=1000"]).steps == 1000
    assert main(["chain", "w=1x1000", "steps=101"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "steps=101: layers times steps may be 100,000 at most; 1,000 layers can take 100 steps" in told[0]


def test_helps_defaults_are_the_lessons():
    words = dict(line.split("=") for line in re.findall(r"^  (\w+=\S+)  ", HELP, re.M))
    assert words.keys() == READERS.keys()
    del words["b"]  # its zeros stand for none
    assert parse([f"{key}={value}" for key, value in words.items()]) == Lesson(Chain())
    for key, other in {
        "a0": "2",
        "w": "2,3",
        "y": "1",
        "squish": "tanh",
        "last": "linear",
        "lr": "1",
        "steps": "4",
    }.items():
        assert parse([f"{k}={v}" for k, v in {**words, key: other}.items()]) != Lesson(Chain())


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit) as done:
        main(["chain", "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(key in out for key in ("a0=1", "w=2,3,0.5", "y=2", "squish=none", "last=squish", "lr=0.01", "steps=3"))
    assert "--run RUN" in out


@pytest.mark.parametrize("words", ["'chain'", "'chain', 'w=1x100', 'squish=sigmoid'"])
def test_it_loads_the_standard_library_only(words):
    foreign = "{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names) - set(before)"
    probe = (
        "import sys; before = {name.partition('.')[0] for name in sys.modules}; from bpdiag.__main__ import main; "
        f"main([{words}]); sys.exit(str({foreign} - {{'bpdiag'}}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = f"{sys.executable} -m bpdiag chain w=1x100 squish=tanh | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Forwards")
    assert done.stderr == ""
