// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using Vmm.Host.Native;

namespace Vmm.Host.Sandbox;

// Theory. A guest that breaks out of a device model runs code in the VM's process. seccomp(2) takes from that process every
// system call that it does not need once the guest runs: no programs, no other processes, no new privileges, no mounts,
// no kernel interfaces beyond files, sockets, memory, threads and /dev/kvm.
//
// One filter holds for all threads (SECCOMP_FILTER_FLAG_TSYNC): .NET's pool moves work between threads, so a thread's role is
// not known when the filter is put in place. What each role was seen to need (strace of VMs with every device, under the
// software CPU and KVM, through start, console, VNC, snapshot, pause and end) decides what is on the list:
//
//   vCPU            ioctl (KVM), arch_prctl (GS for translated code), futex, rt_sigtimedwait, tgkill, sched_yield, mmap, mprotect, madvise
//   workers, disks  pread64, pwrite64, preadv, preadv2, pwritev, fdatasync, fsync, fallocate, ftruncate, futex, and
//                   io_uring_enter on rings that were restricted to such calls before (IoUring.cs); no new rings
//   networks, VNC,  socket, bind, connect, listen, accept4, sendto, sendmsg, recvfrom, recvmsg, poll, ppoll, eventfd2, ioctl
//   consoles
//   control, pool   the same, epoll_*, openat, newfstatat, rename, unlink, flock, fcntl, readlink (exit.json, lease, snapshot)
//   runtime, libc   futex, mmap, munmap, mprotect, madvise, membarrier, clone3 -> clone, rseq, set_robust_list, rt_sig*,
//                   prctl (names), prlimit64 (reading), getrusage, sysinfo, sched_*affinity, exit, exit_group
//
// Three answers. ALLOW for the list. KILL for calls that only a process in foreign hands makes: to run a program, to look
// into another process, to mount, to load code into the kernel, to change users; it dies there and then, and the daemon's
// log shows signal 31. EPERM for everything else (ENOSYS for clone3, so that libc falls back to clone, whose flags a
// filter can see): a newer libc or runtime that tries a new call finds it refused and goes on, where KILL would turn an
// upgrade of the host into an outage.
//
// Executable memory stays possible: the software CPU makes code (CodeMemory), and mapping a file of one's own is no way out.
// Which files may be opened is not seccomp's to say; FileSandbox does that.

/// <summary>The filter of system calls of a VM's process (Linux on x86-64).</summary>
public static class SystemCallFilter
{
    private const uint ArchX8664 = 0xC000003E;
    private const uint X32Bit = 0x40000000;
    private const uint Allow = 0x7FFF0000;
    private const uint KillProcess = 0x80000000;
    private const uint RefuseWith = 0x00050000;
    private const uint OffsetNumber = 0;
    private const uint OffsetArch = 4;
    private const uint OffsetArguments = 16;
    private const int Eperm = 1;
    private const int Enosys = 38;
    private const uint CloneThread = 0x10000;

    private const int SystemCallSeccomp = 317;
    private const int SetModeFilter = 1;
    private const int FlagThreadSync = 1;

    // Numbers of arch/x86/entry/syscalls/syscall_64.tbl; a test compares them with the system's header.
    private static readonly (string Name, uint Number)[] s_allowed =
    [
        ("read", 0), ("write", 1), ("close", 3), ("stat", 4), ("fstat", 5), ("lstat", 6), ("poll", 7), ("lseek", 8), ("mmap", 9),
        ("mprotect", 10), ("munmap", 11), ("brk", 12), ("rt_sigaction", 13), ("rt_sigprocmask", 14), ("rt_sigreturn", 15),
        ("preadv2", 327), ("io_uring_enter", 426),
        ("pread64", 17), ("pwrite64", 18), ("readv", 19), ("writev", 20), ("access", 21), ("sched_yield", 24), ("mremap", 25),
        ("msync", 26), ("mincore", 27), ("madvise", 28), ("dup", 32), ("nanosleep", 35), ("getpid", 39), ("connect", 42),
        ("accept", 43), ("sendto", 44), ("recvfrom", 45), ("sendmsg", 46), ("recvmsg", 47), ("shutdown", 48), ("bind", 49),
        ("listen", 50), ("getsockname", 51), ("getpeername", 52), ("setsockopt", 54), ("getsockopt", 55), ("exit", 60),
        ("uname", 63), ("fcntl", 72), ("flock", 73), ("fsync", 74), ("fdatasync", 75), ("truncate", 76), ("ftruncate", 77),
        ("getcwd", 79), ("rename", 82), ("mkdir", 83), ("rmdir", 84), ("unlink", 87), ("readlink", 89), ("chmod", 90), ("fchmod", 91),
        ("umask", 95), ("gettimeofday", 96), ("getrlimit", 97), ("getrusage", 98), ("sysinfo", 99), ("times", 100), ("getuid", 102),
        ("getgid", 104), ("geteuid", 107), ("getegid", 108), ("getppid", 110), ("rt_sigpending", 127), ("rt_sigtimedwait", 128),
        ("sigaltstack", 131), ("statfs", 137), ("fstatfs", 138), ("arch_prctl", 158), ("gettid", 186), ("time", 201), ("futex", 202),
        ("sched_setaffinity", 203), ("sched_getaffinity", 204), ("getdents64", 217), ("restart_syscall", 219), ("fadvise64", 221),
        ("clock_gettime", 228), ("clock_getres", 229), ("clock_nanosleep", 230), ("exit_group", 231), ("epoll_wait", 232),
        ("epoll_ctl", 233), ("get_mempolicy", 239), ("openat", 257), ("mkdirat", 258), ("newfstatat", 262), ("unlinkat", 263),
        ("renameat", 264), ("linkat", 265), ("symlinkat", 266), ("readlinkat", 267), ("fchmodat", 268), ("faccessat", 269),
        ("ppoll", 271), ("set_robust_list", 273), ("sync_file_range", 277), ("utimensat", 280), ("epoll_pwait", 281), ("fallocate", 285),
        ("accept4", 288), ("eventfd2", 290), ("epoll_create1", 291), ("pipe2", 293), ("preadv", 295), ("pwritev", 296),
        ("recvmmsg", 299), ("sendmmsg", 307), ("getcpu", 309), ("renameat2", 316), ("getrandom", 318), ("memfd_create", 319),
        ("membarrier", 324), ("copy_file_range", 326), ("statx", 332), ("rseq", 334), ("close_range", 436), ("faccessat2", 439),
        ("epoll_pwait2", 441),
    ];

    private static readonly (string Name, uint Number)[] s_deadly =
    [
        ("fork", 57), ("vfork", 58), ("execve", 59), ("ptrace", 101), ("setuid", 105), ("setgid", 106), ("setreuid", 113),
        ("setregid", 114), ("setgroups", 116), ("setresuid", 117), ("setresgid", 119), ("setfsuid", 122), ("setfsgid", 123),
        ("capset", 126), ("pivot_root", 155), ("chroot", 161), ("mount", 165), ("umount2", 166), ("swapon", 167), ("swapoff", 168),
        ("reboot", 169), ("iopl", 172), ("ioperm", 173), ("init_module", 175), ("delete_module", 176), ("kexec_load", 246),
        ("add_key", 248), ("request_key", 249), ("keyctl", 250), ("unshare", 272), ("perf_event_open", 298),
        ("open_by_handle_at", 304), ("setns", 308), ("process_vm_readv", 310), ("process_vm_writev", 311), ("finit_module", 313),
        ("kexec_file_load", 320), ("bpf", 321), ("execveat", 322), ("userfaultfd", 323), ("pidfd_send_signal", 424),
        ("open_tree", 428), ("move_mount", 429), ("fsopen", 430), ("fsmount", 432), ("pidfd_open", 434), ("pidfd_getfd", 438),
        ("process_madvise", 440), ("mount_setattr", 442),
    ];

    // Calls whose arguments decide.
    private static readonly (string Name, uint Number)[] s_judged =
    [
        ("ioctl", 16), ("socket", 41), ("clone", 56), ("kill", 62), ("prctl", 157), ("tgkill", 234), ("prlimit64", 302), ("clone3", 435),
    ];

    // Requests to terminals (the console of `vmctl run`, pseudo-terminals), to descriptors, and to TAP and block devices.
    private static readonly uint[] s_ioctls =
    [
        0x5401, 0x5402, 0x5403, 0x5404, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x80045430, 0x40045431,
        0x400454CA, 0x400454D0, 0x400454D8, 0x1268, 0x1277, 0x80081272,
    ];

    private static readonly uint[] s_families = [1, 2, 10];

    // PR_SET_NAME, PR_GET_NAME, PR_SET_VMA (names of mappings), PR_GET_DUMPABLE.
    private static readonly uint[] s_prctls = [15, 16, 0x53564D41, 3];

    /// <summary>Names and numbers of all calls that the filter knows, for the test that compares them with the header.</summary>
    public static IReadOnlyList<(string Name, uint Number)> Known { get; } = [.. s_allowed, .. s_deadly, .. s_judged];

    /// <summary>Puts the filter on all threads of this process, for good. Also refuses new privileges.</summary>
    /// <param name="reason">Null on success; otherwise one line that says why there is no filter.</param>
    /// <returns>False where there is no seccomp, or the host forbids it.</returns>
    public static unsafe bool TryEnter(out string? reason)
    {
        if (OsAbi.Current.System != HostSystem.Linux || RuntimeInformation.ProcessArchitecture != Architecture.X64)
        {
            reason = "this system has no seccomp";
            return false;
        }

        if (!HostProcess.TryRefuseNewPrivileges())
        {
            reason = "new privileges cannot be refused";
            return false;
        }

        BpfInstruction[] code = Assemble((uint)Environment.ProcessId);

        // SAFETY: the kernel reads `code` during the call only; the length is the array's, checked against the kernel's limit.
        fixed (BpfInstruction* instructions = code)
        {
            var program = new SocketFilterProgram { Length = (ushort)code.Length, Instructions = instructions };
            nint result = LibC.syscall(SystemCallSeccomp, SetModeFilter, FlagThreadSync, (nint)(&program));
            reason = result switch
            {
                0 => null,
                > 0 => $"thread {result} has a filter of its own",
                _ => Explain(Marshal.GetLastPInvokeError()),
            };
            return result == 0;
        }
    }

    /// <summary>What a refusal means. The filter itself is right wherever the tests have run, so EINVAL speaks of the kernel.</summary>
    internal static string Explain(int rawErrno) => OsAbi.Current.ToErrno(rawErrno) is Errno.EINVAL or Errno.ENOSYS
        ? "this kernel has no seccomp filters (FreeBSD's Linuxulator has none)"
        : new HostException("seccomp", rawErrno).Message;

    /// <summary>The filter as the kernel takes it.</summary>
    internal static BpfInstruction[] Assemble(uint ownProcess)
    {
        var verdicts = new SortedDictionary<uint, Action<BpfProgram>>();
        foreach ((_, uint number) in s_allowed)
        {
            verdicts.Add(number, static program => program.Finish(Allow));
        }

        foreach ((_, uint number) in s_deadly)
        {
            verdicts.Add(number, static program => program.Finish(KillProcess));
        }

        verdicts.Add(16, static program =>
        {
            // KVM's requests have the type 0xAE.
            program.Load(Argument(1));
            program.Mask(0xFF00);
            AllowIfOneOf(program, [0xAE00], andElse: null);
            program.Load(Argument(1));
            AllowIfOneOf(program, s_ioctls, RefuseWith | Eperm);
        });
        verdicts.Add(41, static program => AllowIfArgumentIsOneOf(program, 0, s_families));
        verdicts.Add(56, static program =>
        {
            // Threads, never processes.
            program.Load(Argument(0));
            program.Mask(CloneThread);
            AllowIfOneOf(program, [CloneThread], RefuseWith | Eperm);
        });
        verdicts.Add(62, program => AllowIfArgumentIsOneOf(program, 0, [ownProcess]));
        verdicts.Add(157, static program => AllowIfArgumentIsOneOf(program, 0, s_prctls));
        verdicts.Add(234, program => AllowIfArgumentIsOneOf(program, 0, [ownProcess]));
        verdicts.Add(302, static program =>
        {
            // Reading limits: the new ones are a null pointer, both halves.
            var refuse = new BpfProgram.Label();
            program.Load(Argument(2));
            program.UnlessEqual(0, refuse);
            program.Load(Argument(2) + 4);
            program.UnlessEqual(0, refuse);
            program.Finish(Allow);
            program.Place(refuse);
            program.Finish(RefuseWith | Eperm);
        });
        verdicts.Add(435, static program => program.Finish(RefuseWith | Enosys));
        return Assemble(verdicts);
    }

    private static BpfInstruction[] Assemble(SortedDictionary<uint, Action<BpfProgram>> verdicts)
    {
        var program = new BpfProgram();
        var foreign = new BpfProgram.Label();
        program.Load(OffsetArch);
        program.UnlessEqual(ArchX8664, foreign);
        program.Load(OffsetNumber);
        program.IfAtLeast(X32Bit, foreign);
        EmitTree(program, [.. verdicts], 0, verdicts.Count);

        // 32-bit and x32 calls have other numbers: nobody here makes them.
        program.Place(foreign);
        program.Finish(KillProcess);
        return program.Assemble();
    }

    // A binary search over the numbers, with the verdicts as its leaves: about 8 comparisons for any call.
    private static void EmitTree(BpfProgram program, KeyValuePair<uint, Action<BpfProgram>>[] verdicts, int first, int end)
    {
        if (end - first == 1)
        {
            var other = new BpfProgram.Label();
            program.UnlessEqual(verdicts[first].Key, other);
            verdicts[first].Value(program);
            program.Place(other);
            program.Finish(RefuseWith | Eperm);
            return;
        }

        int middle = (first + end) / 2;
        var upper = new BpfProgram.Label();
        program.IfAtLeast(verdicts[middle].Key, upper);
        EmitTree(program, verdicts, first, middle);
        program.Place(upper);
        EmitTree(program, verdicts, middle, end);
    }

    private static void AllowIfArgumentIsOneOf(BpfProgram program, int argument, uint[] values)
    {
        program.Load(Argument(argument));
        AllowIfOneOf(program, values, RefuseWith | Eperm);
    }

    private static void AllowIfOneOf(BpfProgram program, uint[] values, uint? andElse)
    {
        var allow = new BpfProgram.Label();
        var otherwise = new BpfProgram.Label();
        for (int i = 0; i < values.Length - 1; i++)
        {
            program.IfEqual(values[i], allow);
        }

        program.UnlessEqual(values[^1], otherwise);
        program.Place(allow);
        program.Finish(Allow);
        program.Place(otherwise);
        if (andElse is { } verdict)
        {
            program.Finish(verdict);
        }
    }

    // Low half of an argument: all that the kernel looks at in the int arguments that are judged here.
    private static uint Argument(int index) => OffsetArguments + (uint)(8 * index);

    /// <summary>struct sock_fprog.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private unsafe struct SocketFilterProgram
    {
        internal ushort Length;
        internal BpfInstruction* Instructions;
    }
}
