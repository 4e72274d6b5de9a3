# Each target first builds .venv when it is missing or pyproject.toml changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench rules remedies zoo docs screenshots clean
demo: .venv
	$(BIN)/bpdiag experiment=vanishing

# On every core; a file's tests stay together, as they share what they train.
test: .venv
	$(BIN)/python -m pytest -n auto --dist loadfile

check: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv
	$(BIN)/python benchmarks/watching.py
	$(BIN)/python benchmarks/judging.py
	$(BIN)/python benchmarks/viewing.py
	$(BIN)/python benchmarks/sweep.py --command 24

# Every rule beside torch's own: docs/rules.md.
rules: .venv
	$(BIN)/python benchmarks/rules.py

# Whether what is recommended keeps its promise: docs/remedies.md; an hour of one core.
remedies: .venv
	$(BIN)/python benchmarks/remedies.py

# Every architecture of tests/zoo_*.py, and the page of what was found: docs/compatibility.md.
zoo: .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[zoo]'
	$(BIN)/python tests/zoo.py

# docs/findings.md, from the generators of findings and their tests.
docs: .venv
	$(BIN)/python tests/findings_page.py

# The stamp is written last: an interrupted install is begun anew.
.venv: .venv/installed
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

# The pictures of docs/views, by the tests that look at the views; needs chromium and chromedriver.
screenshots: .venv
	BPDIAG_BROWSER=required BPDIAG_SCREENSHOTS=docs/views $(BIN)/python -m pytest -q tests/test_browser.py

clean:
	rm -rf .venv build dist
