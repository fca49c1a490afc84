# The commands for people. Each target names what it needs beyond make, and installs what is missing (tools/require).

.PHONY: run test lint check check-root suites unit-tests doctests features e2e units deb installed package-test lintian piuparts \
	debians-rust kernels bench bench-quick fuzz soak flood tonic crate audit
# One after another, but for what `test` and `check` ask to have side by side.
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
else
# What the recipes start, such as cargo and debian/rules, has jobs of its own.
unexport MAKEFLAGS
endif
.DEFAULT_GOAL := run

# The Debian releases that e2e and package-test boot: make e2e RELEASES="trixie sid"
RELEASES ?= trixie bookworm

become_root := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=XDG_CACHE_HOME,HOME,TMPDIR)

# Serve without systemd, by the built-in policy, which admits only your own user. Prints the socket and a command to try.
run:
	@tools/run

# Most tests wait more than they compute: some run side by side, the longest first. Output comes when a target is done.
side_by_side = $(MAKE) --no-print-directory --jobs=6 --output-sync=target SIDE_BY_SIDE=yes

# Everything, as CI runs it.
test: lint
	+$(side_by_side) units package-test suites features check-root
	+$(MAKE) --no-print-directory bench-quick

# Tests that need peers of other users, control groups or mount namespaces. Each fails with that message without root.
root_tests := lifecycle equation outside proxy_ids handover_faults handover abuse access deny examples identity journals names newcomer \
	record services
tests := $(notdir $(basename $(wildcard tests/*.rs)))
other_tests := $(filter-out $(root_tests),$(tests))

# The checks that need neither root nor a booted systemd. As root, all tests of the workspace.
check: lint
	+$(side_by_side) suites features

# Formatting and clippy, then everything compiled that is run afterwards, and what the library's crate would hold.
lint:
	@tools/require cargo:cargo cc:gcc nc:netcat-openbsd setpriv:util-linux newuidmap:uidmap strace:strace systemd-analyze:systemd \
		man:man-db journalctl:systemd systemd-journal-remote
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings
	cargo test --locked --no-run
	cargo build --locked --examples
	packaging/crate

# Each file of tests/, then unit tests and doctests.
suites := $(if $(filter 0,$(shell id -u)),$(root_tests)) $(other_tests)
suites: $(suites:%=suite-%) unit-tests doctests
$(suites:%=suite-%): suite-%:
	tools/no-login cargo test --locked --test $*
unit-tests:
	cargo test --locked --lib --bins --examples
doctests:
	cargo test --locked --doc

features:
	@tools/features

# The tests that check leaves out without root: built as your user, run by sudo.
check-root:
ifneq ($(shell id -u),0)
	@tools/require sudo:sudo
	env "CARGO_TARGET_$$(rustc --version --verbose | sed -n 's/^host: //p' | tr a-z- A-Z_)_RUNNER=sudo --preserve-env $(CURDIR)/tools/no-login env PATH=$$PATH" \
		cargo test --locked $(root_tests:%=--test %)
endif

# The program on real systems, each release booted with its own systemd: the units of the tree, then the package.
e2e: units installed

units:
	@tests/e2e/run $(RELEASES)

# The Debian packages, into out/, where those of other versions may lie.
deb:
	packaging/build-deb

version = $(shell dpkg-parsechangelog --show-field Version)
architecture = $(shell dpkg --print-architecture)
debs = out/echod_$(version)_$(architecture).deb out/peergate_$(version)_$(architecture).deb

# The finished package: installation, upgrade, removal and debian/tests on each booted release. A target of its own, so
# that make test, which needs it twice, runs it once.
installed: $(RELEASES:%=installed-%)
$(RELEASES:%=installed-%): installed-%: deb
	packaging/test-deb $(debs) $*

# The same, then lintian and piuparts on the package, then its source compiled by Debian 13's own compiler.
package-test: installed lintian piuparts debians-rust
lintian: deb
	packaging/lint-deb out/peergate_$(version).dsc out/peergate_$(version)_$(architecture).changes
piuparts: deb
	$(become_root) packaging/piuparts-deb $(debs) $(RELEASES)
debians-rust: deb
	$(become_root) packaging/build-clean --features out/peergate_$(version).dsc

# The finished packages on the kernels that Debian 12 and 13 ship, emulated: up to an hour. Before a release.
kernels: deb
	nice tests/e2e/kernels $(debs)

# The table in benches/README.md, measured anew. Takes long, and needs a machine without other work.
bench:
	benches/run --write benches/README.md

# A short run of the benchmark with its check of every byte, without the table. Then each micro-benchmark once (as a test,
# so without the optimization that measuring needs).
bench-quick:
	benches/run --install --quick
	cargo test --locked --bench policy --bench line

# The fuzzers: a minute for each target, or make fuzz SECONDS=900
SECONDS ?= 60
fuzz:
	fuzz/run $(SECONDS)

# Everything at once for ten minutes, on echod and through the proxy; another length: tests/soak/run [--proxy] SECONDS
soak:
	tests/soak/run
	tests/soak/run --proxy

# The tests of floods at full size: a million denials, ten thousand idle connections and as many refused.
flood:
	cargo build --release --locked --example peer
	ECHOD_TEST_VISITS=100 cargo test --release --locked --test identity -- many_groups
	ECHOD_TEST_DENIALS=1000000 cargo test --release --locked --test equation -- at_full_speed at_once
	ECHOD_TEST_IDLE=10000 cargo test --release --locked --test abuse

# The example on tonic: a package of its own, which needs Rust 1.88 and many crates.
tonic:
	cargo clippy --locked --all-targets --manifest-path examples/tonic_health/Cargo.toml -- --deny warnings
ifeq ($(shell id -u),0)
	cargo test --locked --manifest-path examples/tonic_health/Cargo.toml
endif

# The library's crate, compiled from what it holds, up to the upload, and its public items against the newest release. Before a
# release.
crate:
	packaging/crate --verify

# Licences, sources and known vulnerabilities of the dependencies.
audit:
	packaging/audit
