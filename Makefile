# `make demo`: from a fresh clone to reports/index.html. `make test`: all tests.
# `make test-fast`: the tests that are not marked slow, about 2 minutes on 2 idle cores. `make compare`: methods x seeds as DVC experiments.
# `make bench`: speed compared with hardware limits and other implementations, an hour on 2 idle cores; uses a GPU if there is one.
# `make scale FOLDER=FOLDER`: the pipeline on 10^4 and 10^5 tiny images, half an hour; with IMAGES=1281167 (ImageNet's size), hours and 16 GB.
# `make gpu`: the tests that need a GPU, then its speed and memory, in parts of at most 8 minutes; `make gpu PARTS="tests step"`: only these parts.
# `make study ROOT=FOLDER`: methods tuned by the same rule, then compared on CIFAR-10 as a folder of images; takes days, and can be resumed.
# `make fuzz`: thousands of hostile inputs. `make docs`: README, docs/ and benchmarks/results/ as a website in site/.
# `make test-oldest`: the tests with the oldest dependencies that pyproject.toml allows and the oldest Python (PYTHON=python3.11).
# Each target creates its virtual environment first. With another Python: `make test PYTHON=python3.13 VENV=$PWD/.venv-3.13`.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

# Processes that run the tests; each needs a core and 2 GB of memory. `make test` keeps the tests of a file in one process.
TEST_PROCESSES ?= 2
# Plugins are named, because loading those installed by other packages (zarr, hydra, anyio) would take each process two seconds.
PYTEST = PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -p xdist -p pytest_timeout -q -n $(TEST_PROCESSES) --dist

# Options of `make fuzz`.
FUZZ_CASES ?= 10000
FUZZ_SEED ?= 0

# Options of `make compare`: recipes, seeds, number of seeds run at the same time, and a base recipe to apply them to, with the folder of its images.
VARIANTS ?= $(patsubst recipes/%.yaml,%,$(wildcard recipes/method-*.yaml))
SEEDS ?= 0 1 2
JOBS ?= 1
BASE ?=
ROOT ?=

# Options of `make scale`: the folder for images and clones of the repository, and the numbers of train images.
FOLDER ?= /tmp/bingo-scale
IMAGES ?= 10000 100000

.PHONY: docs demo test test-fast test-oldest fuzz compare study bench scale gpu setup lint clean-state
demo: setup
	dvc repro
	@echo "the report: $(CURDIR)/reports/index.html"

test: setup
	$(PYTEST) loadfile

test-fast: setup
	$(PYTEST) worksteal -m "not slow"

test-oldest: $(VENV)-oldest/.done
	PATH="$(VENV)-oldest/bin:$$PATH" $(PYTEST) loadfile -W default::DeprecationWarning  # old versions call functions that newer ones deprecate

fuzz: setup
	python -m tests.stress.fuzz --cases $(FUZZ_CASES) --seed $(FUZZ_SEED)

compare: setup
	python -m benchmarks.compare --variants $(VARIANTS) --seeds $(SEEDS) --jobs $(JOBS) $(if $(BASE),--base $(BASE)) $(if $(ROOT),--root $(ROOT))

study: setup
	python -m benchmarks.study $(if $(ROOT),--root $(ROOT))

bench: setup
	python -m benchmarks.bench_step
	python -m benchmarks.bench_step --teacher resnet152
	python -m benchmarks.bench_step --teacher resnet50 --width 2
	python -m benchmarks.bench_step --case small
	python -m benchmarks.bench_loader
	python -m benchmarks.bench_host
	python -m benchmarks.bench_extract
	python -m benchmarks.bench_bags --plot benchmarks/plots/bags.svg
	python -m benchmarks.bench_pipeline
	python -m benchmarks.growth --plot benchmarks/plots/growth.svg

scale: setup
	python -m benchmarks.scale --folder $(FOLDER) --images $(IMAGES) --plot benchmarks/plots/scale.svg

gpu: setup
	python -m benchmarks.gpu $(PARTS)

docs: $(VENV)-docs/.done
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet
	@echo "the documentation: $(CURDIR)/site/index.html"

setup: $(VENV)/.done
$(VENV)/.done: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	dvc config --local core.analytics false
	touch $@

$(VENV)-oldest/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	$(PYTHON) .ci/oldest.py > $(VENV)-oldest/requirements.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)-oldest/requirements.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)-docs/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	touch $@

lint: setup
	ruff check .
	ruff format --check .
	mypy

clean-state:
	rm -rf .bingo/state
