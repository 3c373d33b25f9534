#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
#
# nested.sh OUT [PART...]: run the module on Debian's kernel in QEMU's TCG.
#
# The host that boots is Debian's generic kernel with our module in place of
# kvm and kvm_amd, on an emulated AMD processor that has SVM with nested paging
# and nothing more.  Parts; the first three by default:
#   payloads  guest/nested_test.c
#   unload    load and unload the module 100 times
#   qemu      stock QEMU boots Debian's kernel to a busybox shell under every
#             kind of irqchip
#   vmctl     out/bin/vmctl, if built, does so with 1, 2 and 4 vCPUs
#   vmctl-IRQCHIP-CPUS  one of them
#   kvmtool   the same, if $KVMTOOL names it or `lkvm` is installed
#   bench     exits a second, ours and kvm_amd's
# $PAYLOADS names some of
# nested_test's tests.  Prints TAP lines; everything else begins with '#'.
set -u

mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
parts=${*:-payloads unload qemu}
label=nested
cd "$(dirname "$0")/../../.." || exit 1
. tests/kmod/linux/lib.sh

need qemu-system-x86_64 busybox cpio cc
build_module
build_host
timeout "${NESTED_TIMEOUT:-900}" qemu-system-x86_64 -accel tcg,thread=multi \
    -cpu max,+svm,+npt -smp 2 -m 2048 -nographic -no-reboot -nodefaults \
    -serial stdio -kernel "$kernel" -initrd "$out/nested.gz" \
    -append "console=ttyS0 quiet panic=-1 reboot=t loads=100 payloads=${PAYLOADS:-} parts=$(echo \
    "$parts" | tr ' ' ',')" </dev/null >"$out/nested.log" 2>&1
report "$out/nested.log"
