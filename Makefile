# SPDX-License-Identifier: BSD-2-Clause
#
# Two commands do everything on a fresh machine: `make run` and `make test`. `make help` lists the rest.
# Plain make(1): works with GNU make, FreeBSD's make and illumos' make; the logic is in tests/setup and tests/run.

PREFIX = /usr/local
DESTDIR =
DOTNET = dotnet
CONFIGURATION = Release
ARGS =

bindir = $(DESTDIR)$(PREFIX)/bin
mandir = $(DESTDIR)$(PREFIX)/share/man
sharedir = $(DESTDIR)$(PREFIX)/share/vmm
exampledir = $(DESTDIR)$(PREFIX)/share/examples/vmm
bashdir = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
zshdir = $(DESTDIR)$(PREFIX)/share/zsh/site-functions
fishdir = $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d

.PHONY: help all run test check bench fmt clean install uninstall deb kmod fuzz fuzz-cpu setup \
	test-soft test-kvm test-svm test-vmx test-kmod test-freebsd test-illumos demo-fleet

help:
	@echo 'make all        build out/bin/vmctl, a native program'
	@echo 'make run        boot a small Linux to its shell; ARGS="FILE" runs another definition'
	@echo 'make test       build and test everything; the last line is the result'
	@echo 'make check      formats, linters, rules of the house'
	@echo 'make bench      measure; table on the terminal and out/bench.json'
	@echo 'make fuzz       fuzz for a bounded time'
	@echo 'make fuzz-cpu   compare the software processor with this one, 10 million times'
	@echo 'make kmod       build the kernel module for this host'
	@echo 'make install    to $$(DESTDIR)$$(PREFIX), which is $(DESTDIR)$(PREFIX); `make uninstall` takes it away'
	@echo 'make deb        a Debian package in out/'
	@echo 'make demo-fleet bring five VMs up, show them, take them down'
	@echo 'make test-HOST  one test host: soft kvm svm vmx kmod freebsd illumos'
	@echo 'make setup      install what building and testing need (as root; lists it otherwise)'
	@echo 'make fmt, make clean'

all:
	@tests/setup build
	@src/Vmm.Fleet/Web/fetch
	@$(DOTNET) publish src/Vmctl/Vmctl.csproj -c $(CONFIGURATION) --nologo -v quiet -o out/publish
	@mkdir -p out/bin out/completion
	@cp -f out/publish/vmctl out/bin/vmctl.new
	@mv -f out/bin/vmctl.new out/bin/vmctl
	@out/bin/vmctl completion bash >out/completion/vmctl
	@out/bin/vmctl completion zsh >out/completion/_vmctl
	@out/bin/vmctl completion fish >out/completion/vmctl.fish
	@echo 'built out/bin/vmctl'

run:
	@tests/setup build run
	@$(MAKE) -s all
	@[ -n "$(ARGS)" ] || tests/guests/demo out/demo
	@file='$(ARGS)'; out/bin/vmctl run $${file:-config/demo.yaml}; status=$$?; [ $$status -le 2 ] || exit $$status

test:
	@tests/run test

check:
	@tests/run check

bench:
	@tests/run bench

fuzz:
	@tests/run fuzz

fuzz-cpu:
	@tests/run fuzz-cpu

test-soft:
	@tests/run soft

test-kvm:
	@tests/run kvm

test-svm:
	@tests/run svm

test-vmx:
	@tests/run vmx

test-kmod:
	@tests/run kmod

test-freebsd:
	@tests/run freebsd

test-illumos:
	@tests/run illumos

setup:
	@tests/setup build run test check

fmt:
	@$(DOTNET) format Vmm.sln --verbosity quiet

kmod:
	@cd kmod && $(MAKE)

demo-fleet:
	@tests/setup build run
	@$(MAKE) -s all
	@tests/guests/demo out/demo
	@tests/fleet/demo

install:
	@test -x out/bin/vmctl || { echo 'run "make all" first'; exit 1; }
	mkdir -p $(bindir) $(mandir)/man5 $(mandir)/man8 $(sharedir) $(exampledir)/fleet $(bashdir) $(zshdir) $(fishdir)
	install -m 755 out/bin/vmctl $(bindir)/vmctl
	install -m 644 src/Vmctl/man/vmctl.8 $(mandir)/man8/vmctl.8
	install -m 644 src/Vmctl/man/vmm.yaml.5 $(mandir)/man5/vmm.yaml.5
	install -m 644 config/vmm.schema.json $(sharedir)/vmm.schema.json
	install -m 644 config/sample.yaml $(exampledir)/sample.yaml
	install -m 644 config/fleet/shop.yaml $(exampledir)/fleet/shop.yaml
	install -m 644 out/completion/vmctl $(bashdir)/vmctl
	install -m 644 out/completion/_vmctl $(zshdir)/_vmctl
	install -m 644 out/completion/vmctl.fish $(fishdir)/vmctl.fish

# Directories of ours go too; those that others share stay, except below a DESTDIR where nothing else is.
uninstall:
	rm -f $(bindir)/vmctl $(mandir)/man8/vmctl.8 $(mandir)/man5/vmm.yaml.5
	rm -f $(sharedir)/vmm.schema.json $(exampledir)/sample.yaml $(exampledir)/fleet/shop.yaml
	rm -f $(bashdir)/vmctl $(zshdir)/_vmctl $(fishdir)/vmctl.fish
	-rmdir $(sharedir) $(exampledir)/fleet $(exampledir)
	@[ -z "$(DESTDIR)" ] || find "$(DESTDIR)" -depth -type d -exec rmdir {} \; 2>/dev/null || :

deb:
	@$(MAKE) -s all
	@ports/debian/build out

clean:
	rm -rf out
	find src tests \( -name bin -o -name obj \) -type d -prune -exec rm -rf {} +
