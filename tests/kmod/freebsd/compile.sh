#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
#
# compile.sh SYS OUT [KERNEL]: compile kvm.ko and kvm_linux.ko on Linux with
# clang and lld against the FreeBSD kernel sources in SYS (the sys directory
# of a source tree, 13.2 to 15), warnings as errors.  With KERNEL (kernel.full
# of a build) also check that it has every symbol that kvm.ko wants.
#
# The quotes in $flags belong to a macro's value and reach the compiler as they stand.
# shellcheck disable=SC2089,SC2090
set -eu
sys=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
kernel=${3:-}
top=$(cd "$(dirname "$0")/../../../kmod" && pwd)

arch=$sys/amd64
[ -d "$arch" ] || arch=$sys/arch/amd64
rm -rf "$out/h" "$out/o"
mkdir -p "$out/h" "$out/o"
cd "$out/h"
ln -s "$arch/include" machine
ln -s "$sys/x86/include" x86
[ ! -d "$sys/i386" ] || ln -s "$sys/i386/include" i386
for m in -h -p -q; do
	awk -f "$sys/tools/vnode_if.awk" "$sys/kern/vnode_if.src" $m
done
for m in device bus; do
	awk -f "$sys/tools/makeobjops.awk" "$sys/kern/${m}_if.m" -h
done
printf '#define SMP 1\n#define MAC 1\n#define VIMAGE 1\n' >opt_global.h

# As sys/conf/kern.mk has them, and -Wextra for our own code.
flags="-target x86_64-unknown-freebsd13.2 -O2 -std=gnu11 -nostdinc
    -ffreestanding -fno-strict-aliasing -fno-common -fwrapv
    -fno-omit-frame-pointer -fstack-protector -mcmodel=kernel -mno-red-zone
    -mno-mmx -mno-sse -mno-aes -mno-avx -msoft-float
    -fno-asynchronous-unwind-tables -Wall -Wextra -Werror -Wredundant-decls
    -Wnested-externs -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith
    -Wundef -Wno-pointer-sign -Wno-unused-parameter -Wno-unknown-pragmas
    -Wframe-larger-than=2048
    -D__printf__=__freebsd_kprintf__ -D_KERNEL -DKLD_MODULE
    -DHAVE_KERNEL_OPTION_HEADERS -include $out/h/opt_global.h
    -isystem $out/h -isystem $sys -isystem $sys/contrib/ck/include
    -isystem $sys/arch -I$top/include -I$top/core -I$top/x86
    -I$top/os/freebsd -DVMK_TYPES_HEADER=\"vmk_host_types.h\""
for f in "$top"/core/*.c "$top"/x86/*.c "$top"/os/freebsd/*.c; do
	# shellcheck disable=SC2086	# words on purpose
	clang $flags -c "$f" -o "$out/o/$(basename "$f" .c).o"
done
for f in "$top"/x86/*.S; do
	# shellcheck disable=SC2086
	clang $flags -x assembler-with-cpp -DLOCORE -c "$f" \
	    -o "$out/o/$(basename "$f" .S).o"
done
cd "$out/o"
script=$sys/conf/ldscript.kmod.amd64
ld.lld -m elf_x86_64_fbsd -r -T "$script" -o ../kvm_linux.ko kvm_linux.o
mv kvm_linux.o ..
ld.lld -m elf_x86_64_fbsd -r -T "$script" -o ../kvm.ko ./*.o
echo "kmod: FreeBSD modules compiled and linked against $sys"

[ -n "$kernel" ] || exit 0
nm "$kernel" | awk 'NF == 3 { print $3 }' | sort -u >../kernel.syms
missing=$(nm -u ../kvm.ko | awk '{ print $2 }' | sort -u |
    grep -vE '^__(start|stop)_set_' | comm -23 - ../kernel.syms)
[ -z "$missing" ] || { echo "kmod: not in the kernel: $missing"; exit 1; }
echo "kmod: every symbol of kvm.ko is in $kernel"
