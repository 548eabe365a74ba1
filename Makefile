# Every target works from a fresh clone; what a target needs and the machine lacks, it installs into .tools/ or says how to get.

CARGO ?= cargo

.PHONY: demo demo-smollm2 test check bench counts pgo load tools docs

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
	$(CARGO) clippy -p headgate-gateway -p headgate-orchestrator --no-default-features --all-targets -- -D warnings
	$(CARGO) clippy -p headgate-gateway -p headgate-orchestrator --no-default-features --features headgate-gateway/kafka --all-targets -- -D warnings
	scripts/deny.sh

## What the tests need besides Rust: a Python environment, npm packages, Chromium, nginx, Apache Kafka, valgrind.
tools:
	scripts/tools.sh

## Nanoseconds: decode, gate, chain, encode, verdict.
bench:
	$(CARGO) bench -p headgate-benches

## Instructions of the same, held against benches/counts.yaml; `make counts ACCEPT=accept` keeps what is counted now.
counts:
	$(CARGO) run --release -p headgate-benches -- $(ACCEPT)

## The fastest build, for production: laid out by what a load run calls. A quarter of an hour on two cores. Writes target/pgo/headgate-pgo.
pgo:
	scripts/pgo.sh

## Everything that is measured under load, beside all peers: CPU, latency, memory, cancelling, growth; a quarter of an hour on an idle
## machine, after the builds. Writes loadtests/{results.json,RESULTS.md,latency.svg}. LOAD='--realtime' for a machine that others use too.
load:
	scripts/tools.sh load
	scripts/pgo.sh
	$(CARGO) run --release -p headgate-loadtests -- all --headgate target/pgo/headgate-pgo $(LOAD)

## Generated documents: schemas, OpenAPI, AsyncAPI, the settings reference.
docs:
	scripts/docs.sh
