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

export SILENCE_SECONDS="${SILENCE_SECONDS:-200}"	# more than the patience of init
need qemu-system-x86_64 busybox cpio cc
build_module
build_host
log=$out/nested.log
: >"$log"

start() {			# part...
	live "$log" "${NESTED_TIMEOUT:-600}" -accel tcg,thread=multi \
	    -cpu max,+svm,+npt -smp 2 -m 2048 -kernel "$kernel" \
	    -initrd "$out/nested.gz" -append "console=ttyS0 quiet nokaslr \
panic=-1 softlockup_panic=1 reboot=t loads=100 patience=150 \
payloads=${PAYLOADS:-} parts=$(echo "$*" | tr ' ' ',')"
}

# shellcheck disable=SC2086 # a list of words
start $parts
if ! grep -q '^host: end' "$log"; then
	# The emulated processor falls now and then under Debian's own kvm too
	# (tests/hosts/svm), so that one fall says nothing about the module.
	# It is shown, and what it cut off runs again; a second one counts.
	left=
	for part in $parts; do
		grep -q "^host: did ${part}[[:space:]]*$" "$log" || left="$left $part"
	done
	tail -n 40 "$log" | tr -d '\r' | sed 's/^#* */# /'
	echo "# the host fell with QEMU's status $status; again:$left"
	echo >>"$log"
	# shellcheck disable=SC2086 # a list of words
	start $left
fi
report "$log"
