# make demo   distil live with DMD and with Stream-R1, stream 20 seconds: videos, figures and a table in demo/
# make test   everything that CI checks: export, clean notebooks, every notebook in a fresh kernel, pytest
# make quick  the tests that take seconds: no notebook is run, no process is started, nothing is trained
PYTHON ?= python3
PY := .venv/bin/python
# waiting threads sleep: where other work shares the cores, spinning ones cost a factor of five and more
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test quick format bench notebooks export check readme teacher ablation lock clean

demo: .venv/installed
	.venv/bin/streamr1 demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n auto --dist loadgroup

# what `slow` means is in pyproject.toml; two processes share the cores, a group of tests stays in one
quick: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -m "not slow and not gpu" -n auto --dist loadgroup

bench: .venv/installed
	.venv/bin/streamr1 bench

# a fresh environment from the lock file; --no-build-isolation keeps setuptools the locked one
.venv/installed: requirements.lock settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# after editing a notebook: write streamr1_ref/, run everything from fresh kernels, save the outputs
notebooks: export
	$(PY) tests/notebooks.py run
	.venv/bin/nbdev_clean
	$(PY) tests/notebooks.py readme

export: .venv/installed
	.venv/bin/nbdev_export

# outputs, tests behind definitions, links, width, layout (ruff): the list is empty or says what to do
check: .venv/installed
	$(PY) tests/notebooks.py check

format: .venv/installed
	$(PY) -m ruff check --fix nbs tests setup.py
	$(PY) -m ruff format nbs tests setup.py

readme: .venv/installed
	$(PY) tests/notebooks.py readme

# about an hour and a half on two cores; run again after an interruption
teacher: .venv/installed
	.venv/bin/streamr1 train-teacher
	.venv/bin/streamr1 evaluate-teacher

# over an hour on two cores; run again after an interruption
ablation: .venv/installed
	.venv/bin/streamr1 ablate

lock: .venv/installed
	(head -2 requirements.lock; $(PY) -m pip freeze --all --exclude-editable | grep -v "^pip==" | sed 's/\(torch==[0-9.]*\)+cpu/\1/') > requirements.new
	mv requirements.new requirements.lock

clean:
	rm -rf .venv demo runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
