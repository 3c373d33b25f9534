#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
# build.sh KERNEL_BUILD_DIR OUT: build OUT/vmk_kvm.ko for the tests.
set -eu
kdir=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../../../kmod" && pwd)
mkdir -p "$out/k"
objs=
for f in "$top"/core/*.[ch] "$top"/x86/*.[chS] "$top"/include/*.h \
    "$here"/kvm_linux.c "$here"/Kbuild; do
	ln -sf "$f" "$out/k/"
done
for f in "$top"/core/*.c "$top"/x86/*.c "$top"/x86/*.S; do
	b=$(basename "$f"); objs="$objs ${b%.*}"
done
make -s -C "$kdir" M="$out/k" VMK_OBJS="$objs" modules
cp "$out/k/vmk_kvm.ko" "$out/"
