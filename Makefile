PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIST_VENV := .venv-dist
ENGINES := .venv-engines

# Each process would compile anew what it imports where the environment lets Python write no bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-gpu test-engines fuzz serving-loop faults sanitize lint docs figures dist clean

help:
	@echo "make demo   set up $(VENV) and run a ragged batch over several ranks, on GPUs where there are some, checked against float64"
	@echo "make test   set up $(VENV) and run the tests"
	@echo "make test-gpu  the tests that need a GPU, with the torch and kernels that PYTHON has"
	@echo "make test-engines  engines that are not ours, over cpattn: every token as without it; and steps of vLLM and SGLang"
	@echo "make fuzz MINUTES=5   random batches against the oracle, with and without faults in their midst"
	@echo "make serving-loop STEPS=10000  random steps of serving loops over every kind of cache, and fewer over gloo"
	@echo "make faults  a table of what other ranks see where one is killed, stopped or raises"
	@echo "make sanitize  the Triton kernels under compute-sanitizer"
	@echo "make lint   style and types"
	@echo "make docs   the site, in site: every warning is an error"
	@echo "make figures  every picture of results again, from the tables in benchmarks/results"
	@echo "make dist   build sdist and wheel, check them, and run the README's code with the wheel alone"
	@echo "make clean  remove $(VENV), $(DIST_VENV), $(ENGINES), dist and site"
	@echo "PYTHON=python3.12 make ... chooses the interpreter (3.10 or newer)"

# Of 12,000 files that pip would compile here, in half a minute, the tests import a quarter.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "cpattn needs Python 3.10 or newer: PYTHON=python3.12 make ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test,lint,docs]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m cpattn demo

# One more process than there are cores: some tests wait for processes of their own. Files begin in the order of tests/conftest.py.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --dist loadfile --no-loadscope-reorder

# With the interpreter that has the machine's own CUDA build of torch, and the kernels to test; nothing is installed.
# Most of the time goes into compiling kernels, so processes share the work, and the GPUs; without pytest-xdist: PYTEST_JOBS=
# In parts, where a command may take only so long: GPU_TESTS=tests/gpu, GPU_TESTS=tests/kernels
PYTEST_JOBS ?= -n auto --dist worksteal
GPU_TESTS ?= tests/gpu tests/kernels
test-gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m pytest $(PYTEST_JOBS) $(GPU_TESTS)

# Their wheels lie in a folder of their own, without what they depend on. Python 3.12 at most: nano-vllm's takes no newer one.
$(ENGINES)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(ENGINES) nano-vllm-fork==20260210 xxhash==4.1.0
	@touch $@

# SGLang's wheel whole, as it is for Linux; nothing of it that is compiled is run.
$(ENGINES)/sglang/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --only-binary=:all: --python-version=3.12 \
	  --platform=manylinux_2_34_x86_64 --target $(ENGINES)/sglang sglang==0.5.23
	@touch $@

# Of vLLM's and SGLang's wheels, which are 400 MB, what is in Python is kept, or the few files that say where a token lies.
test-engines: $(ENGINES)/.installed $(ENGINES)/sglang/.installed
	PYTHONPATH=.:$(ENGINES) $(BIN)/python -m pytest tests/examples/test_nano_vllm.py
	$(BIN)/python tests/engines/engine_functions.py $(ENGINES)/layouts
	CPATTN_ENGINES=$(ENGINES)/layouts $(BIN)/python -m pytest tests/serving/test_engine_layouts.py
	CPATTN_ENGINES=$(ENGINES)/layouts $(BIN)/python -m pytest tests/serving/test_vllm_steps.py
	CPATTN_SGLANG=$(ENGINES)/sglang $(BIN)/python -m pytest -s tests/integrations/test_sglang_engine.py

MINUTES ?= 5
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

STEPS ?= 10000
serving-loop: $(VENV)/.installed
	$(BIN)/python tests/serving_loop.py --steps $(STEPS)
	$(BIN)/python tests/serving_loop.py --steps $$(( $(STEPS) / 20 )) --processes

# With the machine's own build of torch (FAULTS_PYTHON=python3) also over NCCL, where there are two GPUs.
FAULTS_PYTHON ?= $(BIN)/python
faults: $(VENV)/.installed
	PYTHONPATH=.:$$PYTHONPATH $(FAULTS_PYTHON) tests/faults.py

# The Triton kernels at small sizes under NVIDIA's memory and race checkers. The race checker does not follow what the warps of
# the specialized kernel say to each other through mbarriers, nor Triton's own start of such warps, and takes both for races.
RACE_CHECKED := test_random_rows and (0 or 7) or test_pack_kv_into_slots or test_gather_rows_into_slots or accumulate or \
  test_merging_into or test_one_part or (test_write or test_read) and triton
SANITIZE = PYTHONPATH=.:$$PYTHONPATH compute-sanitizer --error-exitcode 1
sanitize:
	$(SANITIZE) --tool memcheck --report-api-errors no $(PYTHON) -m pytest -q tests/kernels -k "$(RACE_CHECKED) or several_items"
	$(SANITIZE) --tool racecheck $(PYTHON) -m pytest -q tests/kernels -k "$(RACE_CHECKED)"
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) tests/sanitize_peers.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Links between pages and to headings are checked; those to other sites are not, as they may be away for a while.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs --doctree-dir site/.doctrees . site
	@echo "site/index.html"

figures: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/draw_all.py

# The wheel is installed with what it depends on and nothing more, with the torch that constraints.txt names, and runs the first
# Python block of the README away from the checkout (-I), so that it is the wheel that is imported. REPOSITORY= is the address
# that links on an index's page begin with; without it that page has none.
export REPOSITORY
dist:
	rm -rf dist $(DIST_VENV)
	$(PYTHON) -m venv $(DIST_VENV)/tools
	$(DIST_VENV)/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(DIST_VENV)/tools/bin/python -m build
	$(DIST_VENV)/tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(DIST_VENV)/wheel
	$(DIST_VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	$(DIST_VENV)/wheel/bin/python -m pip check
	awk '/^```python$$/ {on = 1; next} /^```$$/ && on {exit} on' README.md > $(DIST_VENV)/readme.py
	echo 'print(cpattn.__version__, cpattn.__file__, tuple(everything.shape))' >> $(DIST_VENV)/readme.py
	cd $(DIST_VENV) && wheel/bin/python -I readme.py

clean:
	rm -rf $(VENV) $(DIST_VENV) $(ENGINES) dist site
