#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
#
# nested.sh OUT [PART...]: run the module on Debian's kernel in QEMU's TCG.
#
# The host that boots is Debian's generic kernel with our module in place of
# kvm and kvm_amd, on an emulated AMD processor that has SVM with nested paging
# and nothing more.  Parts, all by default:
#   payloads  guest/nested_test.c
#   unload    load and unload the module 100 times
#   qemu      stock QEMU boots Debian's kernel to a busybox shell: irqchip off,
#             and split and on where the module offers them
#   vmctl     out/bin/vmctl does the same with 1, 2 and 4 vCPUs, if built (not by
#             default)
#   bench     exits a second, ours and kvm_amd's (not by default)
# Prints TAP lines; everything else begins with '#'.
set -u

out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
parts=${*:-payloads unload qemu}
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../../.." && pwd)
n=0

skip() {
	n=$((n + 1)); echo "ok $n - kmod nested # SKIP $1"; exit 0
}

# The newest generic kernel with headers; the cloud flavour has no KVM.
kver=
for k in /boot/vmlinuz-*-amd64; do
	v=${k#/boot/vmlinuz-}
	case $v in *cloud*) continue;; esac
	[ -d "/usr/src/linux-headers-$v" ] && kver=$v
done
[ -n "$kver" ] || skip "no linux-image-amd64 with linux-headers-amd64"
command -v qemu-system-x86_64 >/dev/null || skip "no qemu-system-x86"
[ -x /bin/busybox ] || skip "no busybox-static"

if ! "$here/build.sh" "/usr/src/linux-headers-$kver" "$out/linux" \
    >"$out/linux.log" 2>&1; then
	sed 's/^/# /' "$out/linux.log"
	echo "not ok 1 - kmod nested: the module builds for $kver"
	exit 1
fi

root=$out/nested
rm -rf "$root"
mkdir -p "$root/bin" "$root/m" "$root/g" "$root/rom"
cp /bin/busybox "$root/bin/"
cp "$out/linux/vmk_kvm.ko" "$root/m/"
cc -O2 -static -Wall -Wextra -Werror -I"$here/.." \
    "$here/../guest/nested_test.c" "$here/../guest/payloads.S" -lpthread \
    -o "$root/bin/nested_test" || exit 1
for m in virt/lib/irqbypass drivers/char/hw_random/rng-core \
    drivers/crypto/ccp/ccp arch/x86/kvm/kvm arch/x86/kvm/kvm-amd; do
	cp "/lib/modules/$kver/kernel/$m.ko" "$root/m/" 2>/dev/null
done

want_qemu=
case " $parts " in *" qemu "*|*" vmctl "*)
	want_qemu=1
	cp "/boot/vmlinuz-$kver" "$root/g/vmlinuz"
	inner=$out/inner
	rm -rf "$inner"
	mkdir -p "$inner/bin"
	cp /bin/busybox "$inner/bin/"
	cat >"$inner/init" <<'END'
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc p /proc
echo "inner: up, $(/bin/busybox grep -c ^processor /proc/cpuinfo) cpus"
/bin/busybox sleep 1
echo "inner: slept, $(/bin/busybox uname -m)"
/bin/busybox reboot -f
END
	chmod +x "$inner/init"
	(cd "$inner" && find . | cpio -o -H newc 2>/dev/null | gzip -1) \
	    >"$root/g/initrd"
	;;
esac

program() {			# path, name in the host's /bin
	cp "$1" "$root/bin/$2"
	mkdir -p "$root/lib64"
	cp -L /lib64/ld-linux-x86-64.so.2 "$root/lib64/"
	for l in $(ldd "$1" | awk '$3 ~ /^\// { print $3 }'); do
		mkdir -p "$root$(dirname "$l")"
		cp -L "$l" "$root$l"
	done
}

if [ -n "$want_qemu" ]; then
	program "$(command -v qemu-system-x86_64)" qemu
	cp /usr/share/seabios/bios-256k.bin /usr/share/qemu/linuxboot_dma.bin \
	    /usr/share/qemu/kvmvapic.bin "$root/rom/"
fi
vmctl=$top/out/bin/vmctl
case " $parts " in *" vmctl "*)
	if [ -x "$vmctl" ]; then
		program "$vmctl" vmctl
	else
		echo "# out/bin/vmctl has not been built"
	fi;;
esac

cat >"$root/init" <<'END'
#!/bin/busybox sh
# Runs as PID 1 of the nested host.
b=/bin/busybox
$b mkdir -p /proc /sys /dev /tmp
$b mount -t proc p /proc
$b mount -t sysfs s /sys
$b mount -t devtmpfs d /dev
$b mount -t tmpfs t /tmp
echo				# end the firmware's last line

result() {			# status, name
	if [ "$1" = 0 ]; then echo "ok 0 - $2"; else echo "not ok 0 - $2"; fi
}

clean() {			# nothing in the log that a bug would leave
	! $b dmesg | $b grep -E 'BUG|Oops|WARNING:|Call Trace|stall'
}

unload_test() {
	i=0
	while [ $i -lt 100 ]; do
		$b insmod /m/vmk_kvm.ko && $b rmmod vmk_kvm || break
		i=$((i + 1))
	done
	[ $i = 100 ]; result $? "host: load and unload 100 times"
}

boot() {			# name, command...
	name=$1; shift
	$b timeout -s KILL 500 "$@" </dev/null >/tmp/log 2>&1
	$b grep -q 'inner: slept, x86_64' /tmp/log
	st=$?
	[ $st = 0 ] || $b grep -v "host doesn.t support" /tmp/log | $b tail -n 30 | $b sed 's/^/# /'
	result $st "$name: $($b grep -o 'inner: up.*' /tmp/log | $b tr -d '\r')"
}

qemu() {			# name, irqchip, extra...
	name=$1; chip=$2; shift 2
	boot "$name" /bin/qemu -L /rom -accel "kvm,kernel-irqchip=$chip" \
	    -machine pc -m 256 -nographic -vga none -nodefaults -no-reboot \
	    -serial stdio -kernel /g/vmlinuz -initrd /g/initrd \
	    -append "console=ttyS0 panic=-1 reboot=t quiet" "$@"
}

for part in $($b sed 's/.*parts=\([^ ]*\).*/\1/; s/,/ /g' /proc/cmdline); do
	case $part in
	unload)
		unload_test ;;
	payloads)
		$b insmod /m/vmk_kvm.ko
		/bin/nested_test
		$b rmmod vmk_kvm; result $? "host: the module unloads" ;;
	qemu)
		$b insmod /m/vmk_kvm.ko
		qemu "qemu, irqchip off" off
		if /bin/nested_test has-irqchip; then
			qemu "qemu, irqchip split" split
			qemu "qemu, irqchip on" on
			qemu "qemu, irqchip on, 2 vCPUs" on -smp 2
		fi
		$b rmmod vmk_kvm; result $? "host: unloads after QEMU" ;;
	vmctl)
		if [ ! -x /bin/vmctl ]; then
			echo "ok 0 - vmctl # SKIP not built"
			continue
		fi
		$b insmod /m/vmk_kvm.ko
		for chip in user split kernel; do for cpus in 1 2 4; do
			# The smaller numbers say nothing new in the others.
			[ $chip = kernel ] || [ $cpus != 2 ] || continue
			cat >/tmp/vm.yaml <<EOT
name: inner
cpus: $cpus
memory: 256M
accel: kvm
irqchip: $chip
boot:
  kernel: /g/vmlinuz
  initrd: /g/initrd
  cmdline: "console=ttyS0 panic=-1 reboot=t quiet"
serial: [stdio]
EOT
			boot "vmctl, irqchip $chip" /bin/vmctl run /tmp/vm.yaml
		done; done
		$b rmmod vmk_kvm; result $? "host: unloads after vmctl" ;;
	bench)
		$b insmod /m/vmk_kvm.ko
		/bin/nested_test bench | $b sed 's/^bench/rate ours/'
		$b rmmod vmk_kvm
		for m in rng-core irqbypass ccp kvm kvm-amd; do
			$b insmod /m/$m.ko 2>/dev/null
		done
		/bin/nested_test bench | $b sed 's/^bench/rate theirs/' ;;
	esac
done
clean; result $? "host: a clean kernel log"
echo "nested: end"
$b poweroff -f
END
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$out/nested.gz"

log=$out/nested.log
timeout "${NESTED_TIMEOUT:-900}" qemu-system-x86_64 -accel tcg \
    -cpu max,+svm,+npt -smp 2 -m 2048 -nographic -no-reboot -nodefaults \
    -serial stdio -kernel "/boot/vmlinuz-$kver" -initrd "$out/nested.gz" \
    -append "console=ttyS0 quiet panic=-1 reboot=t parts=$(echo "$parts" |
    tr ' ' ',')" </dev/null >"$log" 2>&1

# Number the lines anew; the console ends lines with CR LF.
tr -d '\r' <"$log" | awk '
	/^(not )?ok [0-9]+ - / {
		sub(/ok [0-9]+ - /, "ok " ++n " - kmod nested: ")
		print
		if ($1 == "not") bad++
		next
	}
	/^# / { print }
	# Several rounds of each; the best of a noisy machine counts.
	/^rate / { if ($4 > best[$2, $3]) best[$2, $3] = $4; kind[$3] = 1 }
	/^nested: end/ { end = 1 }
	END {
		for (k in kind)
			print "bench kmod-" k "-exits " best["ours", k] \
			    " exits/s " best["theirs", k]
		if (!end) {
			print "not ok " ++n " - kmod nested: the host lived"
			bad++
		}
		exit bad != 0
	}'
status=$?
grep -q '^nested: end' "$log" || tail -n 25 "$log" | tr -d '\r' |
    sed 's/^/# /'
exit $status
