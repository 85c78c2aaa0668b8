PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
OPTIMUM := .venv-optimum
RAY := .venv-ray
EVAL := .venv-eval
QUICK := tests/contract tests/exporter tests/graph tests/lowering tests/report tests/test_files.py \
	tests/bundle/test_manifest.py tests/bundle/test_staging.py tests/checkpoint/test_folders.py tests/cli/test_bad_inputs.py \
	tests/runtime/test_failures.py tests/runtime/test_fused.py tests/runtime/test_generate.py tests/runtime/test_videos.py \
	tests/serve tests/source/test_hub.py
MODEL := samples/spatial-vl
BUNDLE := demo/spatial-vl-ivc
PICTURES := samples/pictures

.PHONY: demo test lowest optimum ray eval lint docs generate clean

demo: $(VENV)/installed  ## set up, export the sample, ask about pictures, draw which tokens were kept
	$(BIN)/ivc-export --model $(MODEL) --calibration $(MODEL)/calibration.json --output $(BUNDLE) --force
	$(BIN)/ivc-run $(BUNDLE) --image $(PICTURES)/scene-1.png --prompt "Find the large green moon." --show demo/kept-1.png
	$(BIN)/ivc-run $(BUNDLE) --image $(PICTURES)/scene-2.png --prompt "What color is the star?" --show demo/kept-2.png
	$(BIN)/ivc-run $(BUNDLE) --image $(PICTURES)/scene-3.png --prompt "How many yellow objects are there?" --show demo/kept-3.png
	@echo "half of the visual tokens were kept: demo/kept-1.png to demo/kept-3.png show which"

test: $(VENV)/installed-dev lint  ## set up, check style and types, run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto  # as many processes as cores, each with one thread

lowest: $(LOWEST)/pinned  ## the demo, and the tests that need no PyTorch, on the lowest versions that pyproject.toml allows
	$(MAKE) demo VENV=$(LOWEST)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto $(QUICK)

optimum: $(OPTIMUM)/installed $(VENV)/installed-dev  ## optimum-cli export ivc, in an environment with optimum
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cli/test_optimum.py

ray: $(RAY)/installed  ## ivc-serve --replicas, in an environment with Ray
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/serve/test_replicas.py

eval: $(EVAL)/installed  ## the model of lmms-eval, in an environment with lmms-eval
	OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest tests/evaluate

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed-dev  ## build the documentation site into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

generate: $(VENV)/installed-dev  ## write graphs/README.md, graphs/listings/ and the generated pages of docs/ anew
	$(BIN)/python -m tools.generate

%/bin/python:
	$(PYTHON) -m venv $*
	$(@D)/pip install -q --disable-pip-version-check --upgrade pip

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e .[cpu]
	@touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -e .[dev]
	@touch $@ $(VENV)/installed

$(LOWEST)/pinned: $(LOWEST)/bin/python pyproject.toml tools/lowest.py
	$(LOWEST)/bin/python -m tools.lowest cpu serve test video > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install -q --disable-pip-version-check -r $(LOWEST)/lowest.txt -e .
	@touch $(LOWEST)/installed $@

$(OPTIMUM)/installed: $(OPTIMUM)/bin/python pyproject.toml ivc_export/cli/optimum.py
	$(OPTIMUM)/bin/pip install -q --disable-pip-version-check -e .
	$(OPTIMUM)/bin/pip install -q --disable-pip-version-check --no-deps optimum==2.3.0  # its commands need no PyTorch
	@touch $@

$(RAY)/installed: $(RAY)/bin/python pyproject.toml
	$(RAY)/bin/pip install -q --no-compile --disable-pip-version-check -e .[cpu,ray] openai pytest
	@touch $@

$(EVAL)/installed: $(EVAL)/bin/python pyproject.toml tools/lmms_eval.txt
	$(EVAL)/bin/pip install -q --no-compile --disable-pip-version-check -e .[cpu] -r tools/lmms_eval.txt pytest
	$(EVAL)/bin/pip install -q --no-compile --disable-pip-version-check --no-deps lmms-eval==0.7.3
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(OPTIMUM) $(RAY) $(EVAL) demo site build dist .mypy_cache .pytest_cache .ruff_cache
