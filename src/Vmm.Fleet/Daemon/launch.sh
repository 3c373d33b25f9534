#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
# launch.sh UMASK LOG NICE FILES CPU MEMORY NAME COMMAND...: starts a VM's process with its limits, prints its number, and leaves
# it behind as nobody's child. LOG may be empty: standard error then. NICE, FILES, CPU (percent of one processor) and MEMORY
# (bytes) may be 0: no limit. Built into vmctl; tests/fleet/suite runs it on a real kernel's cgroups.
umask "$1"
log=$2 nice=$3 files=$4 cpu=$5 memory=$6 name=$7
shift 7
exec 3>&1 </dev/null
if [ -n "$log" ]; then exec >>"$log" 2>&1; else exec >&2; fi
# shellcheck disable=SC3045 # the sh of all three systems has -n
[ "$files" = 0 ] || ulimit -n "$files" || exit 1

# Linux: a cgroup of its own (cgroup-v2, "No Internal Process Constraint": limits are for groups whose parent has no processes).
# The daemon's service may make groups in its own (systemd: Delegate=), after it has moved its processes into one of them;
# who is in no service and may write there takes the top.
enter_cgroup() {
	top=/sys/fs/cgroup
	[ -f "$top/cgroup.controllers" ] || return 1
	own=$(sed -n 's/^0:://p' /proc/self/cgroup)
	case $own in
	*.service | *.service/vmm-daemon)
		base=$top${own%/vmm-daemon}
		mkdir -p "$base/vmm-daemon" || return 1
		while read -r pid; do
			echo "$pid" >"$base/vmm-daemon/cgroup.procs"
		done <"$base/cgroup.procs"
		;;
	*)
		base=$top/vmm
		mkdir -p "$base" && echo '+cpu +memory' >"$top/cgroup.subtree_control" || return 1
		;;
	esac
	echo '+cpu +memory' >"$base/cgroup.subtree_control" && mkdir -p "$base/vm-$name" || return 1
	{ [ "$cpu" = 0 ] || echo "$((cpu * 1000)) 100000" >"$base/vm-$name/cpu.max"; } &&
		{ [ "$memory" = 0 ] || echo "$memory" >"$base/vm-$name/memory.max"; } &&
		echo $$ >"$base/vm-$name/cgroup.procs"
}

# FreeBSD: rctl(8), once the process is there.
limit_process() {
	{ [ "$cpu" = 0 ] || rctl -a "process:$1:pcpu:deny=$cpu"; } && { [ "$memory" = 0 ] || rctl -a "process:$1:memoryuse:deny=$memory"; }
}

system=none
[ "$cpu" = 0 ] && [ "$memory" = 0 ] || system=$(uname -s)
enforced=yes
[ "$system" != Linux ] || enter_cgroup || enforced=
(
	exec 3>&-
	[ "$nice" = 0 ] && exec "$@"
	exec nice -n "$nice" "$@"
) &
pid=$!
case $system in
none | Linux) ;;
FreeBSD) limit_process "$pid" || enforced= ;;
*) enforced= ;;
esac
[ -n "$enforced" ] || echo "vmctl: $name: its limits on processor and memory are not enforced on this host"
echo "$pid" >&3
