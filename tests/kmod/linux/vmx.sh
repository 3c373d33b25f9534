#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
#
# vmx.sh OUT: the module on VMX, which is Bochs's Haswell, interpreted: minutes
# to the first line.  Debian's kernel with our module instead of kvm_intel runs
# guest/nested_test.c, then loads and unloads the module 20 times.  Prints TAP
# lines; the console stays in OUT/vmx/console.log.
set -u

out=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../../.." && pwd)

skip() {
	echo "ok 1 - kmod vmx: # SKIP $1"; exit 0
}

for p in bochs xvfb-run grub-mkrescue xorriso busybox cpio; do
	command -v $p >/dev/null || skip "$p is missing"
done
kver=
for k in /boot/vmlinuz-*-amd64; do
	v=${k#/boot/vmlinuz-}
	case $v in *cloud*) continue;; esac
	[ -d "/usr/src/linux-headers-$v" ] && kver=$v
done
[ -n "$kver" ] || skip "no linux-image-amd64 with linux-headers-amd64"
if ! "$here/build.sh" "/usr/src/linux-headers-$kver" "$out/linux" \
    >"$out/linux.log" 2>&1; then
	sed 's/^/# /' "$out/linux.log"
	echo "not ok 1 - kmod vmx: the module builds for $kver"
	exit 1
fi

work=$out/vmx
rm -rf "$work"
mkdir -p "$work/root/bin" "$work/iso/boot/grub"
cp "$(command -v busybox)" "$work/root/bin/busybox"
cp "$out/linux/vmk_kvm.ko" "$work/root/"
cc -O2 -static -Wall -Wextra -Werror -I"$here/.." \
    "$here/../guest/nested_test.c" "$here/../guest/payloads.S" -lpthread \
    -o "$work/root/bin/nested_test" || exit 1
cat >"$work/root/init" <<'END'
#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev
$b mount -t proc p /proc
$b mount -t devtmpfs d /dev
$b dmesg | $b grep -iE 'fpu|xsave|vmx' | $b sed 's/^/# /'
$b insmod /vmk_kvm.ko || { $b dmesg | $b tail -n 5 | $b sed 's/^/# /'
	echo "not ok 0 - host: the module loads"; echo "vmx: end"
	$b sleep 2; $b poweroff -f; }
$b dmesg | $b grep 'kvm:' | $b sed 's/^/# /'
/bin/nested_test
i=0
$b rmmod vmk_kvm
while [ $i -lt 20 ] && $b insmod /vmk_kvm.ko && $b rmmod vmk_kvm; do
	i=$((i + 1))
done
[ $i = 20 ] || printf 'not '
echo "ok 0 - host: load and unload 20 times"
$b dmesg | $b grep -E 'BUG|Oops|WARNING:|Call Trace|stall' && printf 'not '
echo "ok 0 - host: a clean kernel log"
echo "vmx: end"
$b sleep 2
$b poweroff -f
END
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc 2>/dev/null | gzip -1) \
    >"$work/iso/boot/root.gz"
cp "/boot/vmlinuz-$kver" "$work/iso/boot/vmlinuz"
cat >"$work/iso/boot/grub/grub.cfg" <<'END'
set timeout=0
menuentry host {
	linux /boot/vmlinuz console=ttyS0 quiet panic=-1 tsc=unstable
	initrd /boot/root.gz
}
END
grub-mkrescue -o "$work/host.iso" "$work/iso" >"$work/iso.log" 2>&1
rm -rf "$work/iso" "$work/root"
# Linux finds the Skylake's XSAVE inconsistent and turns it off; we need it.
sed s/corei7_skylake_x/corei7_haswell_4770/ "$top/tests/hosts/bochsrc" \
    >"$work/bochsrc"
echo c >"$work/rc"
log=$work/console.log
: >"$log"
(cd "$work" && exec timeout --kill-after=5 "${VMX_TIMEOUT:-1500}" \
    xvfb-run -a bochs -q -f bochsrc -rc rc >bochs.out 2>&1 </dev/null) &
runner=$!
while kill -0 $runner 2>/dev/null; do
	sleep 2
	if grep -q '^vmx: end' "$log"; then
		sleep 2
		kill $runner 2>/dev/null
	fi
done

tr -d '\r' <"$log" | awk '
	/^(not )?ok [0-9]+ - / {
		sub(/ok [0-9]+ - /, "ok " ++n " - kmod vmx: ")
		print
		if ($1 == "not") bad++
		next
	}
	/^# / { print }
	/^vmx: end/ { end = 1 }
	END {
		if (!end) {
			print "not ok " ++n " - kmod vmx: the host lived"
			bad++
		}
		exit bad != 0
	}'
