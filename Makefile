# Everything from a fresh Debian 12 (or newer) machine with nothing but cargo, git and make. What is missing is installed with apt when
# root; otherwise the line to run is printed. What takes long is made once, in $(CACHE).

SHELL = /bin/sh
CACHE = $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/cofferdam

.PHONY: help demo kernel kernel-crate images test soak bench setup base tools clean-cache

help:
	@echo "make demo         run a command in a real Debian 12 in a microVM"
	@echo "make kernel       build the small guest kernel, which everything uses once it is there"
	@echo "make kernel-crate make the crate cofferdam-kernel, with that kernel inside, in target/"
	@echo "make images       images by buildah, docker and umoci with programs of Debian's, which make soak compares and runs; as root, some minutes"
	@echo "make test         all tests (without hardware KVM, those that need it run in the lab: lab/README.md)"
	@echo "make soak         the guests' tests at full length, for hours; COFFERDAM_SOAK=N sets the seconds and rounds of the longest (20)"
	@echo "make bench        all benches"
	@echo "make setup        guest kernel, root file system, kernels and a system of Debian's, and the lab's image where it is needed"
	@echo "make clean-cache  remove $(CACHE)"

# Whatever it takes is made side by side; of kernels that is one of Debian's, which needs no compiling.
demo:
	@guest/demo/run

kernel:
	@guest/kernel/build >/dev/null

kernel-crate:
	@guest/kernel/crate

images: setup
	@guest/images debian >/dev/null

test: setup
	@.ci/test

soak: images
	@COFFERDAM_SOAK=$${COFFERDAM_SOAK:-20} .ci/test --lib --test registry --test images -- images_of killed::
	@COFFERDAM_SOAK=$${COFFERDAM_SOAK:-20} .ci/test --test kvm

bench: setup
	@lab/need docker-registry iperf3 passt skopeo umoci
	cargo bench --all-features

# Kernels and a whole system as Debian has them are for tests.
setup: base
	@lab/need acl apache2-utils attr bzip2 cpio curl dmsetup docker-registry erofs-utils iproute2 mount nginx openssh-client openssl procps qemu-utils \
		skopeo umoci xz-utils zstd
	@guest/stock-kernels >/dev/null
	@guest/system >/dev/null
	@guest/rootfs tools >/dev/null
	@guest/rootfs network >/dev/null
	@guest/layout >/dev/null
	@guest/layout services >/dev/null
	@guest/images >/dev/null

# The kernel and the root file system are for guests, the lab for machines without hardware KVM.
base: tools
	@guest/kernel/build >/dev/null
	@guest/rootfs >/dev/null
	@lab/runner --setup

tools:
	@command -v cargo >/dev/null || { echo "make: cargo is not installed; see https://rustup.rs" >&2; exit 1; }
	@lab/need gcc libc6-dev busybox-static

clean-cache:
	rm -rf "$(CACHE)"
