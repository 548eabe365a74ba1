# Every target works from a fresh clone; what a target needs and the machine lacks, it installs into .tools/ or says how to get.

CARGO ?= cargo

.PHONY: demo demo-smollm2 test check bench load tools docs

## The main job on embedded defaults: gateway, orchestrator and a small language model in one process.
demo:
	$(CARGO) run --no-default-features --bin headgate -- dev

## The same with SmolLM2-135M-Instruct, served by llama.cpp's own server.
demo-smollm2:
	slm/llama_cpp/install.sh
	$(CARGO) build --release --bin headgate
	scripts/demo-smollm2.sh

## Everything that must hold, on real servers. The one command that says whether this tree is good.
test: tools
	scripts/test.sh

## Format, lints, dependencies: fast, no servers.
check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	scripts/deny.sh

## What the tests need besides Rust: a Python environment, npm packages, Chromium, nginx, Apache Kafka, valgrind.
tools:
	scripts/tools.sh

## Instruction-level costs: decode, gate, chain, encode, verdict; allocations per clean event.
bench:
	$(CARGO) bench -p headgate-benches

## CPU per event and request, added latency, memory per stream, cancel latency; beside nginx in the same run.
load:
	$(CARGO) run --release -p headgate-loadtests -- --peer nginx

## Generated documents: schemas, OpenAPI, AsyncAPI, the settings reference.
docs:
	scripts/docs.sh
