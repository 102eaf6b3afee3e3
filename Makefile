# Needs make and Python >= 3.11; everything else is installed into $(VENV) on first use and re-used afterwards.
#   make demo           train a LoRA on the CPU on the embedded tiny model; demo-edit: the same for an edit
#   make check          lint, format, static and quick unit tests
#   make test           every test that needs no GPU; test-learning: the longer proofs that training learns; test-soak:
#                       hundreds of kills and faults; test-oldest: the core of it on the oldest versions that are promised
# Another interpreter: make demo PYTHON=python3.12. An environment that exists already: make test VENV=path/to/venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# Two processes with one thread each: the tiny models gain nothing from more threads. The slow files begin (conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# test-oldest has an environment of its own: every lower bound of requirements_flux.txt, exactly.
OLDEST_VENV ?= .venv-oldest
OLDEST_STAMP := $(OLDEST_VENV)/.installed
OLDEST_TESTS := tests/test_training.py tests/test_checkpoints.py tests/test_lora.py tests/test_comfyui.py tests/test_fp8.py

RUN_STAMP := $(VENV)/.installed-flux
DEV_STAMP := $(VENV)/.installed-dev
DEMO_PHOTOS := outputs/demo/photos
LAST_DEMO_PHOTO := $(DEMO_PHOTOS)/toy-5.jpg
DEMO_PAIRS := outputs/demo/night
LAST_DEMO_PAIR := $(DEMO_PAIRS)/unseen_target/003.png

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-edit check test test-learning test-soak test-oldest format clean

help:
	@sed -n '2,6s/^# *//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python >= 3.11 with venv and pip is needed, but PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11 (Debian and Ubuntu: install python3-venv too)." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): requirements_flux.txt $(BIN)/python
	$(PIP_INSTALL) -r requirements_flux.txt
	@touch $@

# Both files in one call, so that pip never moves a version of the first one to please the second.
$(DEV_STAMP): requirements_dev.txt $(RUN_STAMP)
	$(PIP_INSTALL) -r requirements_flux.txt -r requirements_dev.txt
	@touch $@

# The photos are written one after the other: when the last one is there, all are.
$(LAST_DEMO_PHOTO): tools/draw_demo_photos.py tools/tiny_world.py | $(RUN_STAMP)
	$(BIN)/python tools/draw_demo_photos.py $(DEMO_PHOTOS)

demo: $(RUN_STAMP) $(LAST_DEMO_PHOTO)
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml \
	  train_dreambooth_lora_flux2.py @configs/runs/demo_cpu.args
	$(BIN)/python tools/demo_result.py outputs/demo/lora $(DEMO_PHOTOS)

$(LAST_DEMO_PAIR): tools/draw_edit_pairs.py tools/tiny_world.py | $(RUN_STAMP)
	$(BIN)/python tools/draw_edit_pairs.py $(DEMO_PAIRS)

demo-edit: $(RUN_STAMP) $(LAST_DEMO_PAIR)
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml \
	  train_dreambooth_lora_flux2_img2img.py @configs/runs/demo_edit_cpu.args

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/sync_regions.py
	$(PYTEST) -m "not e2e and not launch and not slow and not gpu" tests

test: $(DEV_STAMP)
	$(PYTEST) --durations=25 -m "not gpu and not learning and not soak" tests

test-learning: $(DEV_STAMP)
	OMP_NUM_THREADS=1 LEARNING_JSON=benchmarks/learning.json $(BIN)/python -m pytest -q -s tests/test_learning.py

test-soak: $(DEV_STAMP)
	OMP_NUM_THREADS=1 SOAK_JSON=1 $(BIN)/python -m pytest -q -m soak --durations=10 tests

$(OLDEST_STAMP): requirements_flux.txt requirements_dev.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	sed 's/>=/==/' requirements_flux.txt > $(OLDEST_VENV)/requirements.txt
	$(OLDEST_VENV)/bin/python -m pip install --disable-pip-version-check -r $(OLDEST_VENV)/requirements.txt \
	  -r requirements_dev.txt
	@touch $@

# -rs: what is skipped there is said with its reason.
test-oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -q -n 2 --dist loadfile -rs $(OLDEST_TESTS)

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps $(VENV) and every other folder under outputs/: those may hold a LoRA that took hours.
clean:
	rm -rf outputs/demo .pytest_cache .ruff_cache
	find . \( -path './$(VENV)' -o -path './$(OLDEST_VENV)' \) -prune -o -type d -name __pycache__ -print | xargs rm -rf
