# make run   the service on the manifold that ships in models/, no Redis needed
# make test  everything the tests need, and all of them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000

# What lowering needs of the extra `executorch`: seconds, where all of it with other backends takes a minute.
EXECUTORCH := executorch torchao ruamel.yaml ruamel.yaml.clib tabulate

.PHONY: run test lint train clean

$(VENV)/service.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[service]'
	touch $@

$(VENV)/dev.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps --no-compile $(EXECUTORCH)
	touch $@

run: $(VENV)/service.done
	$(BIN)/neumeta-serve --port $(PORT)

test: $(VENV)/dev.done
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/mypy

train: $(VENV)/dev.done
	$(BIN)/neumeta-train tiny --resume

clean:
	rm -rf $(VENV) runs
