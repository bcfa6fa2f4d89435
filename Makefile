PYTHON  ?= python3
RUNTIME ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)# which onnxruntime: cpu or cuda
VENV    := .venv
BIN     := $(VENV)/bin

export ORT_DISABLE_TELEMETRY = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1

.PHONY: demo demo-digits examples bench-serve bench-serve-peers test check format protos venv clean

demo: venv  ## a pretrained MiniLM, real tweets: fine-tune, export, serve, ask
	rm -rf demo/tweets
	$(BIN)/python examples/demo.py tweets --out demo

demo-digits: venv  ## an ImageNet EfficientNet-Lite0, handwritten digits: the same commands
	rm -rf demo/digits
	$(BIN)/python examples/demo.py digits --out demo

examples: venv  ## the tutorials (docs/tutorials.md), each from data to a served answer beside a baseline
	rm -rf demo/cifar10 demo/last_layers demo/dense demo/bert demo/word_vectors demo/own_onnx
	$(BIN)/python examples/cifar10.py
	$(BIN)/python examples/last_layers.py multiclass
	$(BIN)/python examples/last_layers.py multilabel
	$(BIN)/python examples/last_layers.py regression
	$(BIN)/python examples/dense.py
	$(BIN)/python examples/bert.py
	$(BIN)/python examples/bert.py --pair
	$(BIN)/python examples/word_vectors.py chinese
	$(BIN)/python examples/word_vectors.py english
	$(BIN)/python examples/own_onnx.py

bench-serve: venv  ## how fast the server is beside its limits; benchmarks/results/serve_speed.md is written anew
	$(BIN)/python -m benchmarks.serve_speed --keep

bench-serve-peers: venv  ## our server beside others, each in an environment of its own: benchmarks/results/serve_peers.md
	$(BIN)/python -m benchmarks.serve_peers --keep

test: venv  ## the tests
	$(BIN)/pytest -q

check: venv  ## format, lint, types, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_protos.py

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: venv  ## regenerate the wire's code, with the oldest grpcio-tools that is supported
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. protos/inference.proto

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME),dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist
