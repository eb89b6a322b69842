# `make` alone prints the help page. Stages are words before the verb: `make stage0 stage1 bench`.
# A stage word with a verb behind it does nothing of its own; the verb's rule sees which stages were named.

MODEL    ?=
DEVICE   ?=
DTYPE    ?=
WORKLOAD ?=
PEERS    ?=
SWEEP    ?=
EXECUTION ?=
PREFIX_INDEX ?=
TP       ?=
HOST     ?=
PORT     ?=
REPLICAS ?=
PRESET   ?=
ASK      ?=
NVTX     ?=
KEEP     ?=
TASK     ?=
FRESH    ?=
FIT      ?=
PYTHON   ?=

# Verbs for the whole repository, for one stage or several, and for either. A new one is a word here, its rule (one for
# a stage has it already: `python -m stages.<folder> <verb>`), and a line of make/help.txt.
WHOLE_VERBS := help setup test-all gpu-test gpu-bench gpu-ladder gptq-interop clients lint report interview busy clean
STAGE_VERBS := demo generate chat serve diff trace profile quantize quality simulate
BOTH_VERBS  := bench test arena race notebooks lab build

EXISTING := $(patsubst stages/m%/engine.py,m%,$(sort $(wildcard stages/m[0-9]_*/engine.py)))
number    = $(firstword $(subst _, ,$(1:m%=%)))
WORDS    := $(foreach folder,$(EXISTING),stage$(call number,$(folder)))

# -- what was asked for ------------------------------------------------------------------------------------------------

STAGES  := $(filter stage%,$(MAKECMDGOALS))
VERBS   := $(filter-out stage%,$(MAKECMDGOALS))
FOLDERS := $(foreach word,$(STAGES),$(filter $(word:stage%=m%)_%,$(EXISTING)))
STAMP   := .venv/.stamp
PEERS_STAMP := .venv/.stamp-peers
LAB_STAMP := .venv/.stamp-lab
SCALE_STAMP := .venv/.stamp-scale

UNKNOWN := $(firstword $(filter-out $(WORDS),$(STAGES)))
ifneq ($(UNKNOWN),)
  $(error unknown stage "$(UNKNOWN)": there are $(WORDS))
endif
UNKNOWN := $(firstword $(filter-out $(WHOLE_VERBS) $(STAGE_VERBS) $(BOTH_VERBS) $(STAMP) $(PEERS_STAMP) $(LAB_STAMP) $(SCALE_STAMP),$(VERBS)))
ifneq ($(UNKNOWN),)
  ifneq ($(STAGES),)
    $(error a stage has no verb "$(UNKNOWN)": there are $(STAGE_VERBS) $(BOTH_VERBS))
  endif
  $(error unknown word "$(UNKNOWN)": there are $(WHOLE_VERBS) $(BOTH_VERBS), and $(WORDS) before a verb. `make` alone explains them)
endif
ifneq ($(STAGES),)
  UNKNOWN := $(firstword $(filter $(WHOLE_VERBS),$(VERBS)))
  ifneq ($(UNKNOWN),)
    $(error "$(UNKNOWN)" is for the whole repository, not for a stage: `make $(UNKNOWN)`. A stage has $(STAGE_VERBS) $(BOTH_VERBS))
  endif
  UNKNOWN := $(firstword $(filter serve lab,$(VERBS)))
  ifneq ($(and $(UNKNOWN),$(word 2,$(STAGES))),)
    $(error "$(UNKNOWN)" runs until it is stopped: name one stage, as in `make $(lastword $(STAGES)) $(UNKNOWN)`)
  endif
else
  UNKNOWN := $(firstword $(filter $(STAGE_VERBS),$(VERBS)))
  ifneq ($(UNKNOWN),)
    $(error "$(UNKNOWN)" needs a stage before it: `make $(lastword $(WORDS)) $(UNKNOWN)`)
  endif
endif

ifneq ($(and $(EXECUTION),$(filter-out bench,$(VERBS))),)
  $(error EXECUTION= is for bench only)
endif
ifneq ($(and $(KEEP),$(filter-out notebooks,$(VERBS))),)
  $(error KEEP= is for notebooks only)
endif
ifneq ($(and $(PORT),$(filter-out serve arena,$(VERBS))),)
  $(error PORT= is for serve and arena only)
endif
ifneq ($(and $(REPLICAS),$(filter-out serve,$(VERBS))),)
  $(error REPLICAS= is for serve only)
endif
ifneq ($(and $(TASK)$(FRESH),$(filter-out build,$(VERBS))),)
  $(error TASK= and FRESH= are for build only)
endif
ifneq ($(and $(FIT),$(filter-out simulate,$(VERBS))),)
  $(error FIT= is for simulate only)
endif
ifneq ($(and $(TP),$(filter-out bench trace profile demo generate chat serve,$(VERBS))),)
  $(error TP= is for bench, trace, profile, demo, generate, chat and serve)
endif
ifneq ($(and $(PREFIX_INDEX),$(filter-out bench trace profile,$(VERBS))),)
  $(error PREFIX_INDEX= is for bench, trace and profile)
endif

# -- the interpreter: one that was given, as it is; else the virtual environment's ------------------------------------

ifneq ($(PYTHON),)
  PY := $(PYTHON)
  READY :=
  PEERS_READY :=
  LAB_READY :=
  SCALE_READY :=
else
  PY := .venv/bin/python
  READY := $(STAMP)
  PEERS_READY := $(if $(filter-out 0 no false,$(PEERS)),$(PEERS_STAMP))
  LAB_READY := $(LAB_STAMP)
  SCALE_READY := $(SCALE_STAMP)
endif

comma := ,
empty :=
space := $(empty) $(empty)
joined = $(subst $(space),$(1),$(strip $(2)))
SHORT := $(foreach word,$(STAGES),$(word:stage%=m%))
MODEL_OPTIONS = $(if $(MODEL),--model "$(MODEL)") $(if $(DEVICE),--device $(DEVICE)) $(if $(DTYPE),--dtype $(DTYPE))
SERVE_OPTIONS = $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(if $(REPLICAS),--replicas $(REPLICAS))
VERB_OPTIONS = $(strip $(if $(filter diff,$@),,$(MODEL_OPTIONS)) $(if $(filter serve,$@),$(SERVE_OPTIONS)) \
	$(if $(TP),$(if $(filter demo generate chat serve,$@),--tensor-parallel-size $(TP))) \
	$(if $(filter profile,$@),$(if $(WORKLOAD),--workload $(WORKLOAD)) $(NVTX_OPTION)) $(if $(filter profile trace,$@),$(INDEX_OPTION)))
NVTX_OPTION = $(if $(filter-out 0 no false,$(NVTX)),--nvtx)
INDEX_OPTION = $(if $(PREFIX_INDEX),--engine prefix_index=$(PREFIX_INDEX)) $(if $(TP),--engine tensor_parallel_size=$(TP))
RACE_OPTIONS = $(strip $(SHORT) $(MODEL_OPTIONS) $(if $(filter arena,$@),$(if $(PORT),--port $(PORT))) \
	$(if $(filter race,$@),$(if $(PRESET),--preset $(PRESET)) $(if $(ASK),--prompt "$(ASK)")))
# The main job is for any machine: the CPU, unless another device is asked for.
BENCH_OPTIONS = $(if $(SHORT),--stages $(call joined,$(comma),$(SHORT))) --workload $(or $(WORKLOAD),ladder) \
	$(MODEL_OPTIONS) $(if $(DEVICE),,--device cpu) $(if $(filter-out 0 no false,$(PEERS)),--peers) \
	$(if $(filter-out 0 no false,$(SWEEP)),--sweep) $(if $(EXECUTION),--execution $(EXECUTION)) $(INDEX_OPTION)
# The least of the lines, in per cent, that the tests of everything execute.
COVERAGE = FOLOVLLM_COVERAGE=93
# A process for each CPU, where pytest-xdist is installed.
SIDE_BY_SIDE = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses auto --maxprocesses 8 --dist worksteal)

.DEFAULT_GOAL := help
.PHONY: $(WHOLE_VERBS) $(STAGE_VERBS) $(BOTH_VERBS) $(WORDS)
.NOTPARALLEL:

# -- the rules ---------------------------------------------------------------------------------------------------------

help:
	@cat make/help.txt
	@echo
	@echo "Stages here:"
	@for folder in $(EXISTING); do echo "  $$folder" | sed 's/m\([0-9]\)_/stage\1  m\1_/'; done

setup: $(READY) $(PEERS_READY)
	@echo "ready: $$($(PY) --version)"

$(STAMP): pyproject.toml constraints.txt make/setup.sh
	@sh make/setup.sh

$(PEERS_STAMP): $(STAMP)
	@echo "installing the peers, once: llama.cpp is compiled for this processor, which takes about 3 minutes"
	@sh make/peers.sh $(PY) $@

$(LAB_STAMP): $(STAMP)
	@echo "installing JupyterLab, once"
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	@touch $@

$(SCALE_STAMP): $(STAMP)
	@echo "installing Ray, once"
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[scale]'
	@touch $@

# A stage word alone is its demonstration.
$(WORDS): $(if $(VERBS),,demo)
	@:

serve: $(if $(REPLICAS),$(SCALE_READY))
$(filter-out quality simulate,$(STAGE_VERBS)): $(READY)
	@set -e; for folder in $(FOLDERS); do $(PY) -m stages.$$folder $@ $(VERB_OPTIONS); done

# What quantising costs: of the last stage only, by the harness.
quality: $(READY)
	$(if $(filter-out m7_%,$(FOLDERS)),$(error "quality" is for quantised weights: `make stage7 quality`))
	@$(PY) -m benchmarks quality $(MODEL_OPTIONS)

# What a cluster of it would do; FIT=1: measure first what its steps take here.
simulate: $(READY)
	@set -e; for stage in $(SHORT); do $(PY) -m benchmarks simulate --stage $$stage $(MODEL_OPTIONS) $(if $(filter-out 0 no false,$(FIT)),--fit); done

arena race: $(READY)
	@$(PY) -m stages $@ $(RACE_OPTIONS)

bench: $(READY) $(PEERS_READY)
	@$(PY) -m benchmarks compare $(BENCH_OPTIONS)

report: $(READY)
	@$(PY) -m benchmarks report

# With a report of it: the pages for interviews, filled.
interview: $(READY)
	@$(PY) -m benchmarks interview $(MODEL_OPTIONS)
	@$(PY) -m benchmarks report

busy: $(READY)
	@PYTHONPATH=. $(PY) tests/busy/measure.py $(if $(filter-out 0 no false,$(SWEEP)),--sweep)

notebooks: $(READY)
	@$(PY) -m notebooks $(strip $(SHORT) $(if $(filter-out 0 no false,$(KEEP)),--keep))

lab: $(LAB_READY)
	@$(PY) -m notebooks $(strip $(SHORT) --lab)

# A learner's own: not right yet is no failure of make.
build: $(READY)
	@$(PY) -m notebooks.starters $(strip $(SHORT) $(if $(TASK),--task $(TASK)) $(if $(filter-out 0 no false,$(FRESH)),--fresh))

test: $(READY)
	@$(if $(SHORT),,$(COVERAGE)) $(PY) -m pytest $(SIDE_BY_SIDE) $(if $(SHORT),-k "$(call joined,$(space)or$(space),$(SHORT))")

test-all: $(READY) $(SCALE_READY)
	@FOLOVLLM_DEEP=1 $(COVERAGE) $(PY) -m tests.record $(SIDE_BY_SIDE) -m "slow or not slow"

gpu-test: $(READY)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no GPU: PyTorch sees none here, so nothing was tested")'
	@$(PY) -m pytest tests/gpu -m gpu $(SIDE_BY_SIDE)

gpu-bench gpu-ladder: $(READY)
	@$(PY) -m benchmarks gpu $(@:gpu-%=%) $(MODEL_OPTIONS)

gptq-interop: $(READY)
	@sh make/gptq_interop.sh "$$(command -v $(PY))"

clients: $(READY)
	@sh make/clients.sh "$$(command -v $(PY))"

lint: $(READY)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m pyright --pythonpath "$$(command -v $(PY))"

clean:
	rm -rf .venv build dist *.egg-info .coverage .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
