# What a person types. Everything a target needs beyond make is named and installed where it is missing (tools/require).

.PHONY: run test check e2e
.DEFAULT_GOAL := run

# The releases that e2e boots: make e2e RELEASES="trixie sid"
RELEASES ?= trixie bookworm

# Serve here and now, without systemd, by the built-in policy, which admits you alone. Prints where, and what to type.
run:
	@tools/run

# Everything, as CI runs it.
test: check e2e

# What needs neither root nor a booted systemd. As root, more of it runs: the tests whose peers really are other users.
check:
	@tools/require cargo:cargo cc:gcc
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings
	cargo test --locked

# The program and its units on real systems: each release booted with its own systemd.
e2e:
	@tests/e2e/run $(RELEASES)
