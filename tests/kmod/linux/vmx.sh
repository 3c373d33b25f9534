#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
#
# vmx.sh OUT [PART...]: the module on VMX, which is Bochs's Haswell,
# interpreted: minutes to the first line.  Parts as in nested.sh; by default
# the payloads, 20 loads, and a boot with vmctl under every irqchip.  Prints
# TAP lines; the console stays in OUT/vmx/console.log.
set -u

mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
parts=${*:-payloads unload vmctl-kernel-1 vmctl-split-1 vmctl-user-1}
label=vmx
cd "$(dirname "$0")/../../.." || exit 1
. tests/kmod/linux/lib.sh

need bochs xvfb-run grub-mkrescue xorriso busybox cpio cc
build_module
build_host
work=$out/vmx
rm -rf "$work"
mkdir -p "$work/iso/boot/grub"
mv "$out/vmx.gz" "$work/iso/boot/root.gz"
cp "$kernel" "$work/iso/boot/vmlinuz"
cat >"$work/iso/boot/grub/grub.cfg" <<EOT
set timeout=0
menuentry host {
	linux /boot/vmlinuz console=ttyS0 quiet panic=-1 tsc=unstable loads=20 patience=500 parts=$(echo "$parts" | tr ' ' ',') payloads=slow${PAYLOADS:+,$PAYLOADS}
	initrd /boot/root.gz
}
EOT
grub-mkrescue -o "$work/host.iso" "$work/iso" >"$work/iso.log" 2>&1
rm -rf "$work/iso"
# Linux finds the Skylake's XSAVE inconsistent and turns it off; we need it.
sed s/corei7_skylake_x/corei7_haswell_4770/ tests/hosts/bochsrc \
    >"$work/bochsrc"
# Debian's Bochs has its debugger built in: "c" starts the machine, and a
# guest that powered off leaves Bochs in there.
echo c >"$work/rc"
log=$work/console.log
: >"$log"
(cd "$work" && exec timeout --kill-after=5 "${VMX_TIMEOUT:-2300}" \
    xvfb-run -a bochs -q -f bochsrc -rc rc >bochs.out 2>&1 </dev/null) &
runner=$!
while kill -0 $runner 2>/dev/null; do
	sleep 2
	if grep -q '^host: end' "$log"; then
		sleep 2
		kill $runner 2>/dev/null
	fi
done
report "$log"
