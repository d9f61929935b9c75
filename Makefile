# `make demo` and `make test` work on a fresh clone: each makes .venv first if it is missing.
#
#   make demo       make the starter data, train on it, validate; the picture is runs/demo/report.png
#   make test       lint, then the tests that take minutes at most
#   make test-full  the long tests; make deps-full installs what they need beside that (Ray, Spark, Java)
#   make test-interop  our weights in open_clip and its weights here (makes .venv-peers)
#   make lint       ruff and pyright alone
#   make peers      .venv-peers, with what the loader benchmark compares with (on Linux a CUDA build of torch, 5 GB)
#   make photographs  the benchmark's three shard sets, from Debian's wallpapers: data/photographs, 500 MB
#   make clean      remove the environments and caches; `make clean-data` removes data/ and runs/
#
# The Python to build .venv with (3.11 or 3.12):  make test PYTHON=python3.12
# pip's own variables apply. On Linux without an NVIDIA GPU this one saves a CUDA build of several GB:
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test test-full test-interop deps-full lint peers photographs clean clean-data
.NOTPARALLEL:

demo: .venv/.installed
	$(RUN) ingest.py datasets/emoji.toml --out data/emoji
	$(RUN) train.py --preset training/presets/demo.toml
	$(RUN) validate.py runs/demo --data data/emoji/zero_shot --baseline data/emoji/train \
		--report runs/demo/report.png
	$(RUN) validate.py runs/demo --data data/emoji/retrieval
	@echo "picture: runs/demo/report.png"

test: lint
	$(RUN) -m pytest -m "not slow and not gpu and not interop"

test-interop: .venv/.installed-dev .venv-peers/.installed
	$(RUN) -m pytest -m interop

test-full: deps-full
	$(RUN) -m pytest -m slow

# What the long tests' engines need: Ray for shrinking; img2dataset's own environment with Spark (and Java) and Ray.
deps-full: .venv/.installed-full .venv-ingest/.installed-engines

.venv-ingest/.installed-engines: requirements-ingest.txt .venv/.installed-full
	@command -v java >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		apt-get install -y -qq default-jre-headless >/dev/null; } || \
		{ echo "error: Spark needs Java 17 or newer and there is no java here; install a JRE (Debian: default-jre-headless)" >&2; exit 1; }
	$(RUN) -c 'from pipeline.ingest.environment import python; python()'
	.venv-ingest/bin/python -m pip install --quiet 'pyspark>=3.5,<5' 'ray>=2.40,<3'
	@touch $@

lint: .venv/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

photographs: .venv/.installed-dev
	$(RUN) -m benchmarks.photographs

peers: .venv-peers/.installed

.venv-peers/.installed: requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r requirements-peers.txt
	@touch $@

# What it takes to run: the starter's renderer, no development tools.
.venv/.installed: pyproject.toml
	$(call install,starter)
	@touch $@

# What it takes to test, which includes the former.
.venv/.installed-dev: pyproject.toml
	$(call install,starter$(comma)dev)
	@touch .venv/.installed $@

.venv/.installed-full: pyproject.toml
	$(call install,starter$(comma)dev$(comma)ray)
	@touch .venv/.installed .venv/.installed-dev $@

comma := ,
define install
@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.11 or 3.12; name one that is: make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -m venv .venv; \
fi
@echo "installing .[$(1)] into .venv"
@.venv/bin/python -m pip install --quiet -e '.[$(1)]'
endef

clean:
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./data -prune -o -path ./runs -prune -o -name __pycache__ -prune -exec rm -rf {} +

clean-data:
	rm -rf data runs
