# Esker's commands. Each cargo command is for the whole workspace. Another set of
# packages could resolve to other features and compile RocksDB, by far the longest part
# of the build, once more. CONTRIBUTING.md explains this.

CARGO ?= cargo
export CARGO

# Arguments of `esker playground`: make playground ARGS='--stores 5 --data-dir data'
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help prerequisites build install playground test clients neighbours simulate clusters mutants bench parts check fmt

# A workspace of its own: see its Cargo.toml.
CONSENSUS_BENCH = --manifest-path benches/consensus/Cargo.toml

help: ## shows this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

prerequisites:
	@scripts/prerequisites.sh

build: prerequisites ## builds everything
	$(CARGO) build

# Where `make install` puts the binary; packages set DESTDIR as well.
PREFIX ?= /usr/local
DESTDIR ?=

# What is measured and installed: see optimised.toml. RocksDB is the one of `make build`.
OPTIMISED = --config optimised.toml

install: prerequisites ## builds an optimised `esker` and installs it; PREFIX=/usr/local
	install -d "$(DESTDIR)$(PREFIX)/bin"
	@test -w "$(DESTDIR)$(PREFIX)/bin" || { echo "$(DESTDIR)$(PREFIX)/bin cannot be written to: set PREFIX"; exit 1; }
	$(CARGO) build $(OPTIMISED) --bin esker
	install -s -m 755 "$$($(CARGO) metadata --no-deps --offline --format-version 1 \
	    | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug/esker" "$(DESTDIR)$(PREFIX)/bin/esker"

# Cargo is asked where the binary is, because CARGO_TARGET_DIR or a setting may move
# it.
playground: build ## builds, and starts a cluster on this machine; ARGS are its options
	@exec "$$($(CARGO) metadata --no-deps --offline --format-version 1 \
	    | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug/esker" playground $(ARGS)

test: prerequisites ## builds everything and runs all tests
	$(CARGO) test

# This is not a part of the tests, which need no network.
clients: build ## runs published Python clients, which it installs, against a cluster
	@tests/clients/run "$$($(CARGO) metadata --no-deps --offline --format-version 1 \
	    | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')"

neighbours: prerequisites ## 20,000 idle connections on one node under load; NEIGHBOURS=5000 for fewer
	ESKER_NEIGHBOURS=$${NEIGHBOURS:-20000} $(CARGO) test --test port thousands -- --nocapture

simulate: ## runs simulated Raft groups under faults; ARGS='--seeds 50000' and more
	$(CARGO) run --release -p esker-raft-simulator -- $(if $(ARGS),$(ARGS),--seeds 10000)

clusters: prerequisites ## runs simulated clusters under faults; ARGS='--seeds 2000' and more
	$(CARGO) build
	"$$($(CARGO) metadata --no-deps --offline --format-version 1 \
	    | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug/esker-simulator" $(if $(ARGS),$(ARGS),--seeds 500)

mutants: prerequisites ## plants every deliberate bug in turn, and demands that it is found
	$(CARGO) test --features esker-simulator/mutants --test mutants -- --nocapture

# Uses the profile of everything else: cargo's profile for benchmarks would compile
# RocksDB again.
bench: prerequisites ## measures whole clusters, beside the machine's limit and etcd; ARGS=--help
	$(CARGO) bench --profile dev $(OPTIMISED) --bench cluster -- $(ARGS)

parts: prerequisites ## measures one store on this machine's disk, and Raft beside other libraries
	$(CARGO) bench --profile dev $(OPTIMISED) --bench store
	$(CARGO) bench $(CONSENSUS_BENCH)

check: ## checks the formatting, clippy's warnings and those of the documentation
	@scripts/prerequisites.sh lint
	$(CARGO) fmt --all --check
	$(CARGO) fmt $(CONSENSUS_BENCH) --check
	$(CARGO) clippy --all-targets --features tikv-target -- -D warnings
	$(CARGO) clippy --workspace --no-default-features -- -D warnings
	$(CARGO) clippy $(CONSENSUS_BENCH) --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --quiet

fmt: ## formats the code
	@scripts/prerequisites.sh lint
	$(CARGO) fmt --all
	$(CARGO) fmt $(CONSENSUS_BENCH)
