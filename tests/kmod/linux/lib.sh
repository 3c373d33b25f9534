# SPDX-License-Identifier: BSD-2-Clause
#
# lib.sh: what nested.sh and vmx.sh share: a Linux host that has our module in
# place of Debian's kvm.  Sourced by both, from the root of the repository,
# after `label` has been set, `out` to a folder and `parts` to what is to run.

: "${label:?}" "${out:?}" "${parts:?}"
. tests/hosts/lib.sh

# need PROGRAM...
need() {
	for p in "$@"; do
		command -v "$p" >/dev/null || skip "kmod $label" "$p is missing"
	done
}

# The newest generic kernel with headers, and the module built for it.
build_module() {
	kver=
	for k in /boot/vmlinuz-*-amd64; do
		v=${k#/boot/vmlinuz-}
		case $v in *cloud*) continue;; esac
		[ -d "/usr/src/linux-headers-$v" ] && kver=$v
	done
	[ -n "$kver" ] || skip "kmod $label" \
	    "no linux-image-amd64 with linux-headers-amd64"
	kernel=/boot/vmlinuz-$kver
	# shellcheck disable=SC2034 # for add_module
	modules=/lib/modules/$kver/kernel
	mkdir -p "$out"
	if ! tests/kmod/linux/build.sh "/usr/src/linux-headers-$kver" \
	    "$out/linux" >"$out/linux.log" 2>&1; then
		sed 's/^/# /' "$out/linux.log"
		echo "not ok - kmod $label: the module builds for $kver"
		exit 1
	fi
}

# wants PART: is it, or one that begins with PART-, among those asked for?
wants() {
	case " $parts " in *" $1 "*|*" $1-"*) return 0;; esac
	return 1
}

# The host's root, and the guests in it, for $parts.
build_host() {
	root=$out/$label-root
	new_root "$root" tests/kmod/linux/init
	mkdir -p "$root/m" "$root/g" "$root/rom"
	cp "$out/linux/vmk_kvm.ko" "$root/m/"
	cc -O2 -static -Wall -Wextra -Werror -Itests/kmod \
	    tests/kmod/guest/nested_test.c tests/kmod/guest/payloads.S \
	    -lpthread -o "$root/bin/nested_test" || exit 1
	if wants qemu || wants vmctl || wants kvmtool; then
		new_root "$out/inner" tests/kmod/linux/inner-init
		pack "$out/inner" "$root/g/initrd"
		cp "$kernel" "$root/g/vmlinuz"
	fi
	if wants qemu; then
		add_program "$root" "$(command -v qemu-system-x86_64)" bin/qemu
		cp /usr/share/seabios/bios-256k.bin \
		    /usr/share/qemu/linuxboot_dma.bin \
		    /usr/share/qemu/kvmvapic.bin "$root/rom/"
	fi
	if wants vmctl && [ -x out/bin/vmctl ]; then
		add_program "$root" out/bin/vmctl bin/vmctl
		# .NET finds OpenSSL at run time.
		for l in /usr/lib/*/libssl.so.3 /usr/lib/*/libcrypto.so.3; do
			[ ! -f "$l" ] || add_program "$root" "$l" "${l#/}"
		done
	fi
	kvmtool=${KVMTOOL:-$(command -v lkvm)}
	if wants kvmtool && [ -x "$kvmtool" ]; then
		add_program "$root" "$kvmtool" bin/lkvm
	fi
	if wants bench; then
		for m in virt/lib/irqbypass drivers/char/hw_random/rng-core \
		    drivers/crypto/ccp/ccp arch/x86/kvm/kvm \
		    arch/x86/kvm/kvm-amd; do
			add_module "$root" $m
		done
	fi
	pack "$root" "$out/$label.gz"
	rm -rf "$root" "$out/inner"
}

# report LOG: number the lines anew and close the account.  A part that its
# host did not live to finish has shown only what failed in it.
report() {
	tr -d '\r' <"$1" | awk -v label="kmod $label: " '
		function settle(all,  i, line) {
			for (i = 1; i <= held; i++) {
				line = lines[i]
				if (!all && line ~ /^ok/)
					continue
				if (line ~ /^not/)
					bad++
				if (line !~ /^#/)
					sub(/ok [0-9]+ - /, \
					    "ok " ++n " - " label, line)
				print line
			}
			held = 0
		}
		/^(not )?ok [0-9]+ - / || /^# / { lines[++held] = $0 }
		/^host: begin/ { settle(0) }
		/^host: did / { settle(1) }
		# Several rounds of each; the best of a noisy machine counts.
		/^rate / {
			if ($4 > best[$2, $3]) best[$2, $3] = $4
			kind[$3] = 1
		}
		/^host: end/ { end = 1 }
		END {
			settle(end)
			for (k in kind) {
				ours = best["ours", k]
				theirs = best["theirs", k]
				print "bench kmod-" k " " ours " exits/s " theirs
				slow = !(theirs > 0 && ours >= 0.9 * theirs)
				print (slow ? "not ok " : "ok ") ++n " - " \
				    label k ", at least 0.9 of kvm_amd"
				bad += slow
			}
			if (!end) {
				print "not ok " ++n " - " label "the host lived"
				bad++
			}
			exit bad != 0
		}'
	status=$?
	grep -q '^host: end' "$1" || tail -n 25 "$1" | tr -d '\r' |
	    sed 's/^/# /'
	return $status
}
