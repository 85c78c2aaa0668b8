PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := demo/checkpoint
BUNDLE := demo/checkpoint-ivc
PICTURE := samples/pictures/shapes.png

.PHONY: demo test lint docs generate clean

demo: $(VENV)/installed  ## set up, export the sample, ask about a picture, draw which tokens were kept
	$(BIN)/python -m samples.make_sample $(MODEL)
	$(BIN)/ivc-export --model $(MODEL) --ratio 0.5 --output $(BUNDLE) --force
	$(BIN)/ivc-run $(BUNDLE) --image $(PICTURE) --prompt "Where is the red ring?" --max-tokens 24 --show demo/kept.png
	@echo "the kept tokens are drawn in demo/kept.png"

test: $(VENV)/installed-dev lint  ## set up, check style and types, run the tests
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed-dev  ## build the documentation site into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

generate: $(VENV)/installed-dev  ## write graphs/README.md, graphs/listings/ and the generated pages of docs/ anew
	$(BIN)/python -m tools.generate

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --upgrade pip

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -e .[dev]
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) demo site build dist .mypy_cache .pytest_cache .ruff_cache
