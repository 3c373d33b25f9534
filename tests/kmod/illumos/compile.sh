#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
#
# compile.sh UTS OUT: compile and link the illumos module on Linux against the
# kernel headers in UTS (usr/src/uts of a source tree), warnings as errors,
# with gcc and clang, and hold its undefined symbols against symbols.txt.
#
# The quotes in $flags belong to a macro's value and reach the compiler as they stand.
# shellcheck disable=SC2089,SC2090
set -eu
uts=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../../../kmod" && pwd)

# As Makefile.uts and i86pc's makefiles have them; the Linux of the host's
# compiler must not show.
flags="-m64 -O2 -std=gnu11 -mcmodel=kernel -mno-red-zone -ffreestanding
    -fno-pic -fno-pie -fno-strict-aliasing -fno-common -mno-mmx -mno-sse
    -msoft-float -fno-asynchronous-unwind-tables -nostdinc -U__linux__ -Ulinux
    -D_KERNEL -D_SYSCALL32 -D_SYSCALL32_IMPL -D_ELF64 -D_DDI_STRICT -Dsun
    -D__sun -D__SVR4 -D_MACHDEP -Di86pc -Wall -Wextra -Werror
    -Wno-unused-parameter -Wno-unknown-pragmas -Wframe-larger-than=2048
    -isystem $uts/i86pc -isystem $uts/intel -isystem $uts/common
    -I$top/include -I$top/core -I$top/x86 -I$top/os/illumos
    -DVMK_TYPES_HEADER=\"vmk_host_types.h\""
for cc in clang gcc; do
	rm -rf "$out/o"
	mkdir -p "$out/o"
	for f in "$top"/core/*.c "$top"/x86/*.[cS] "$top"/os/illumos/*.c; do
		# shellcheck disable=SC2086	# words on purpose
		$cc $flags -c "$f" -o "$out/o/$(basename "${f%.[cS]}").o"
	done
done
ld -m elf_x86_64 -r -o "$out/kvm" "$out"/o/*.o
echo "kmod: illumos module compiled and linked against $uts"

bad=$(nm -u "$out/kvm" | awk '{ print $2 }' | sort -u |
    comm -23 - "$here/symbols.txt")
[ -z "$bad" ] || { echo "kmod: symbols that nobody listed: $bad"; exit 1; }
echo "kmod: every symbol that it wants is on the list"
