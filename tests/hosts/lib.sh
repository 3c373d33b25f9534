# SPDX-License-Identifier: BSD-2-Clause
# tests/hosts/lib.sh: what the test hosts share. A test host is a small Linux (L1) with a hypervisor's processor
# features, made of Debian's kernel, its kvm modules, a static busybox and this project's programs. Sourced by the
# scripts beside it, from the root of the repository; prints TAP.
#
# Needs root for nothing. Whatever is missing ends in one "ok NAME # SKIP reason" line.

# skip NAME REASON
skip() {
	echo "ok $1 # SKIP $2"
	exit 0
}

# Sets kernel and modules: the newest Debian kernel that has a kvm module (the cloud flavour has none).
find_kernel() {
	kernel=
	for candidate in /boot/vmlinuz-*; do
		version=${candidate#/boot/vmlinuz-}
		if [ -r "$candidate" ] && ls /lib/modules/"$version"/kernel/arch/x86/kvm/kvm.ko* >/dev/null 2>&1; then
			kernel=$candidate
			modules=/lib/modules/$version/kernel
		fi
	done
	[ -n "$kernel" ]
}

# add_module ROOT PATH: copies a module (without .ko), unpacked, into ROOT/m.
add_module() {
	mkdir -p "$1/m"
	if [ -f "$modules/$2.ko" ]; then
		cp "$modules/$2.ko" "$1/m/"
	elif [ -f "$modules/$2.ko.xz" ]; then
		xz -dc "$modules/$2.ko.xz" >"$1/m/${2##*/}.ko"
	fi
}

# add_program ROOT FILE DESTINATION: copies a program and the shared libraries that it names.
add_program() {
	mkdir -p "$1/$(dirname "$3")"
	cp "$2" "$1/$3"
	ldd "$2" 2>/dev/null | grep -oE '/[^ ]+' | while read -r library; do
		mkdir -p "$1/$(dirname "$library")"
		cp -L "$library" "$1/$library"
	done
}

# new_root DIR INIT: an empty root with busybox and an init.
new_root() {
	rm -rf "$1"
	mkdir -p "$1/bin" "$1/proc" "$1/sys" "$1/dev" "$1/tmp" "$1/run"
	cp "$(command -v busybox)" "$1/bin/busybox"
	cp "$2" "$1/init"
	chmod 755 "$1/init"
}

# pack ROOT FILE: makes an initial RAM disk.
pack() {
	(cd "$1" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1 >"$2.new"
	mv -f "$2.new" "$2"
}

# build_l1 WORK: makes WORK/l1.gz, the RAM disk of the test host, with an L2 guest inside.
build_l1() {
	work=$1
	mkdir -p "$work"
	new_root "$work/l2" tests/hosts/l2-init
	if "${CC:-gcc}" -O2 -static -o "$work/l2/bin/counter" tests/hosts/counter.c 2>/dev/null; then
		cp "$work/l2/bin/counter" "$work/counter"
	fi
	pack "$work/l2" "$work/l2.gz"

	new_root "$work/l1" tests/hosts/l1-init
	for module in drivers/char/hw_random/rng-core virt/lib/irqbypass drivers/crypto/ccp/ccp \
		arch/x86/kvm/kvm arch/x86/kvm/kvm-amd arch/x86/kvm/kvm-intel; do
		add_module "$work/l1" "$module"
	done
	cp tests/hosts/l1-cases "$work/l1/cases"
	[ ! -x "$work/counter" ] || cp "$work/counter" "$work/l1/bin/counter"
	mkdir -p "$work/l1/vm"
	cp "$kernel" "$work/l1/vm/vmlinuz"
	cp "$work/l2.gz" "$work/l1/vm/initrd.gz"
	if [ -x out/bin/vmctl ]; then
		add_program "$work/l1" out/bin/vmctl bin/vmctl
		# .NET finds OpenSSL at run time; the checksum of a snapshot comes from there.
		for library in /usr/lib/*/libssl.so.3 /usr/lib/*/libcrypto.so.3; do
			[ ! -f "$library" ] || add_program "$work/l1" "$library" "${library#/}"
		done
	fi
	add_firmware "$work/l1" || rm -f "$work/l1/vm/pc.iso"
	[ -z "${with_driver_tests:-}" ] || add_driver_tests "$work/l1"
	if [ -n "${with_virtio:-}" ]; then
		PREPARE=1 WORK=$PWD/$work/l1/virtio tests/guests/virtio kvm >"$work/virtio.log" 2>&1 || cat "$work/virtio.log"
		cp tests/guests/crash "$work/l1/virtio/"
		add_module "$work/l1" drivers/net/tun
		PATH=$PATH:/sbin:/usr/sbin
		for program in mkfs.ext4 e2fsck dbclient; do
			[ -z "$(command -v $program)" ] || add_program "$work/l1" "$(readlink -f "$(command -v $program)")" bin/$program
		done
	fi
	pack "$work/l1" "$work/l1.gz"
	rm -rf "$work/l1" "$work/l2"
}

# add_firmware ROOT: SeaBIOS, and a disc with GRUB that boots L2's kernel; it is a disk with a partition table too. False
# where a package for it is missing.
add_firmware() {
	[ -r /usr/share/seabios/bios-256k.bin ] && [ -d /usr/lib/grub/i386-pc ] || return 1
	for tool in grub-mkrescue xorriso mformat; do
		command -v $tool >/dev/null || return 1
	done
	mkdir -p "$1/usr/share/seabios" "$work/disc/boot/grub"
	cp /usr/share/seabios/bios-256k.bin "$1/usr/share/seabios/"
	cp "$1/vm/vmlinuz" "$1/vm/initrd.gz" "$work/disc/boot/"
	printf '%s\n' 'serial --unit=0' 'terminal_output serial' 'linux /boot/vmlinuz console=ttyS0 quiet panic=-1 action=poweroff' \
		'initrd /boot/initrd.gz' boot >"$work/disc/boot/grub/grub.cfg"
	grub-mkrescue -d /usr/lib/grub/i386-pc -o "$1/vm/pc.iso" "$work/disc" >"$work/mkrescue.log" 2>&1
	made=$?
	rm -rf "$work/disc"
	return $made
}

# add_driver_tests ROOT: the tests of Vmm.Kvm and a .NET runtime to run them with.
add_driver_tests() {
	dotnet_root=$(dirname "$(readlink -f "$(command -v dotnet)")")
	framework=$(dotnet --list-runtimes | sed -n 's/^Microsoft.NETCore.App \(10[^ ]*\) \[\(.*\)\]$/\2\/\1/p' | tail -1)
	add_program "$1" "$dotnet_root/dotnet" "$dotnet_root/dotnet"
	for library in libcoreclr.so libSystem.Native.so libclrjit.so; do
		add_program "$1" "$framework/$library" tmp/probe
	done
	rm -f "$1/tmp/probe"
	mkdir -p "$1$framework" "$1$dotnet_root/host" "$1/tests"
	cp -R "$framework/." "$1$framework/"
	cp -R "$dotnet_root/host/fxr" "$1$dotnet_root/host/"
	cp -R tests/Vmm.Kvm.Tests/bin/"${CONFIGURATION:-Release}"/net10.0/. "$1/tests/"
	ln -sf "$dotnet_root/dotnet" "$1/bin/dotnet"
}

# live LOG SECONDS QEMU-ARGUMENT...: one life of a test host in QEMU, its console added to LOG. It ends by itself, after
# SECONDS, or when the console has said nothing for $SILENCE_SECONDS: then what its processors are at is added to LOG too,
# in lines that begin with "# ". Sets status to QEMU's, or to 124.
live() {
	console=$1
	deadline=$(($(date +%s) + $2))
	shift 2
	monitor=${console%.log}.monitor
	rm -f "$monitor"
	mkfifo "$monitor"
	exec 9<>"$monitor"
	qemu-system-x86_64 "$@" -nodefaults -display none -no-reboot -chardev "file,id=console,path=$console,append=on" \
		-serial chardev:console -monitor stdio <&9 >"$monitor.out" 2>&1 &
	host=$!
	size=
	while kill -0 $host 2>/dev/null; do
		sleep 1
		now=$(date +%s)
		if [ "$(wc -c <"$console")" != "$size" ]; then
			size=$(wc -c <"$console")
			spoke=$now
		elif [ $((now - spoke)) -gt "${SILENCE_SECONDS:-240}" ] || [ "$now" -gt $deadline ]; then
			echo 'info registers -a' >&9
			sleep 2
			kill -KILL $host
			echo
			echo "# the test host was ended $((now - spoke)) s after its last word; its processors:"
			tr -d '\r' <"$monitor.out" | grep -E '^(CPU|R[A-Z0-9 ]+=|[CDEFGS]S =|CR)' | sed 's/^/# /'
		fi >>"$console"
	done
	status=0
	wait $host || status=$?
	[ $status != 137 ] || status=124
	exec 9>&-
	rm -f "$monitor"
}

# judge LOG: turns what L1 printed into TAP. L1 prints "RESULT name expected status" after each case and what L2
# printed before it; driver tests print TAP themselves.
judge() {
	tr -d '\r' <"$1" | awk '
		/^(not )?ok ([0-9]+ )?- / { print; next }
		/^# / { print; next }
		/^CASE / { userland = ""; name = $2; wanted = $3; next }
		/L2 userland/ { userland = $0; next }
		/^RESULT / {
			good = ($3 == $4)
			why = good ? "" : ": status " $4 ", expected " $3
			if (index(userland, "cpus=" wanted " ") == 0) { good = 0; why = why "; its user space did not see " wanted " processors: " userland }
			print (good ? "ok" : "not ok") " - " $2 (good ? "" : why)
			next
		}
		/^END/ { ended = 1 }
		END { if (!ended) print "not ok - the test host came to its end" }'
}
