// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Runtime.InteropServices;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>This process and others: sessions, signals, and the rights that a process gives up. Any thread.</summary>
public static class HostProcess
{
    private const string Passwords = "/etc/passwd";

    // The same numbers on all three systems.
    private const int SigKill = 9;
    private const int SigTerm = 15;

    /// <summary>True when this process has root's rights.</summary>
    public static bool IsRoot => LibC.geteuid() == 0;

    /// <summary>Leaves the terminal's session, so that its signals do not reach this process.</summary>
    /// <returns>False when the process already leads a group; nothing has changed then.</returns>
    public static bool TryLeaveSession() => LibC.setsid() >= 0;

    /// <summary>True when a process of that number is there (a zombie is).</summary>
    public static bool Exists(int pid) => pid > 1 && (LibC.kill(pid, 0) == 0 || HostException.Last("kill").Error == Errno.EPERM);

    /// <summary>True when a process of that number is there and has not ended; a zombie, which nobody has waited for, has (Linux).</summary>
    public static bool IsRunning(int pid)
    {
        if (!Exists(pid))
        {
            return false;
        }

        try
        {
            // proc(5): "PID (NAME) STATE ..."; the name may hold anything.
            string stat = OsAbi.Current.System == HostSystem.Linux ? File.ReadAllText($"/proc/{pid}/stat") : string.Empty;
            return !stat.AsSpan(stat.LastIndexOf(')') + 1).StartsWith(" Z");
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            // Hidden (hidepid), or gone at this moment; the next look tells.
            return true;
        }
    }

    /// <summary>Ends a process; <paramref name="force"/> gives it no say.</summary>
    /// <returns>False when there is no such process or no right to.</returns>
    public static bool TryEnd(int pid, bool force) => pid > 1 && LibC.kill(pid, force ? SigKill : SigTerm) == 0;

    /// <summary>Becomes another user for good, with that user's groups only. All threads; root only.</summary>
    /// <param name="user">Name of the user.</param>
    /// <exception cref="HostException">There is no such user, or this process may not.</exception>
    public static void BecomeUser(string user)
    {
        ArgumentNullException.ThrowIfNull(user);
        (uint id, uint group) = FindUser(user);
        if (LibC.initgroups(user, group) != 0 || LibC.setgid(group) != 0 || LibC.setuid(id) != 0)
        {
            throw HostException.Last($"become user {user}");
        }

        if (id != 0 && LibC.setuid(0) == 0)
        {
            throw new HostException($"becoming user {user} did not take root's rights away");
        }
    }

    /// <summary>Keeps this process and its children from ever gaining rights by running set-user-ID programs (Linux).</summary>
    /// <returns>False where the system has no such thing.</returns>
    public static bool TryRefuseNewPrivileges()
    {
        const int SetNoNewPrivileges = 38;
        return OsAbi.Current.System == HostSystem.Linux && LibC.prctl(SetNoNewPrivileges, 1, 0, 0, 0) == 0;
    }

    /// <summary>
    /// Becomes another program: the same process number, descriptors that are not closed on execution, environment. Returns
    /// only by exception.
    /// </summary>
    /// <exception cref="HostException">The program cannot be run.</exception>
    public static unsafe void Execute(string program, IReadOnlyList<string> arguments)
    {
        ArgumentNullException.ThrowIfNull(arguments);
        var variables = new List<string>();
        foreach (System.Collections.DictionaryEntry variable in Environment.GetEnvironmentVariables())
        {
            variables.Add($"{variable.Key}={variable.Value}");
        }

        // SAFETY: the kernel copies the strings; the lists end with a null pointer; leaked only if there is nothing to run.
        byte** words = ToStrings([program, .. arguments]);
        byte** environment = ToStrings(variables);
        _ = LibC.execve(words[0], words, environment);
        throw HostException.Last($"run {program}");
    }

    /// <summary>
    /// Gives up what no VM's process needs, for good, once everything is open: other programs and processes (FreeBSD: new
    /// privileges and being traced; illumos: the basic privileges proc_exec, proc_fork, proc_info, proc_session and
    /// file_link_any). Linux has <see cref="Sandbox.SystemCallFilter"/> for it.
    /// </summary>
    /// <returns>False where the system refused or has no such thing.</returns>
    public static bool TryGiveUpProcesses() => TryGiveUpProcesses(OsAbi.Current.System);

    /// <summary>The same as another system does it, for tests.</summary>
    internal static unsafe bool TryGiveUpProcesses(HostSystem system)
    {
        // FreeBSD sys/procctl.h, sys/wait.h.
        const int IdOfProcess = 0;
        const int TraceControl = 7;
        const int TraceDisable = 2;
        const int NoNewPrivilegesControl = 19;

        // illumos sys/priv.h: PRIV_SET removes what the set does not have.
        const int PrivilegeSet = 2;
        const string Basic = "basic,!proc_exec,!proc_fork,!proc_info,!proc_session,!file_link_any";
        switch (system)
        {
            case HostSystem.FreeBsd:
                int disable = TraceDisable;
                int enable = 1;
                return LibC.procctl(IdOfProcess, Environment.ProcessId, NoNewPrivilegesControl, &enable) == 0
                    & LibC.procctl(IdOfProcess, Environment.ProcessId, TraceControl, &disable) == 0;
            case HostSystem.Illumos:
                nint set = LibC.priv_str_to_set(Basic, ",", 0);
                return set != 0 && LibC.setppriv(PrivilegeSet, "Permitted", set) == 0 && LibC.setppriv(PrivilegeSet, "Limit", set) == 0;
            default:
                return false;
        }
    }

    /// <summary>Keeps the calling thread on one of the host's processors, for good.</summary>
    /// <param name="processor">Its number, from 0, as the system counts.</param>
    /// <returns>False when the host has no such processor for this process.</returns>
    public static bool TryPinThread(int processor) => TryPinThread(processor, OsAbi.Current.System);

    /// <summary>The same as another system does it, for tests.</summary>
    internal static unsafe bool TryPinThread(int processor, HostSystem system)
    {
        const int Words = 16;
        if (processor is < 0 or >= Words * 64)
        {
            return false;
        }

        // SAFETY: a set of 1024 processors, which no system reads beyond.
        ulong* set = stackalloc ulong[Words];
        new Span<ulong>(set, Words).Clear();
        set[processor / 64] = 1UL << (processor % 64);
        switch (system)
        {
            case HostSystem.FreeBsd:
                // sys/cpuset.h: CPU_LEVEL_WHICH, CPU_WHICH_TID. Releases before 14 want their own size, 256 processors.
                return LibC.cpuset_setaffinity(3, 1, -1, Words * 8, set) == 0
                    || (processor < 256 && LibC.cpuset_setaffinity(3, 1, -1, 32, set) == 0);
            case HostSystem.Illumos:
                // sys/procset.h: P_LWPID, P_MYID.
                return LibC.processor_bind(8, -1, processor, null) == 0;
            default:
                return LibC.sched_setaffinity(0, Words * 8, set) == 0;
        }
    }

    private static unsafe byte** ToStrings(List<string> texts)
    {
        // SAFETY: one pointer more than there are texts; each text is zero-terminated by the marshaller.
        var list = (byte**)NativeMemory.AllocZeroed((nuint)(texts.Count + 1), (nuint)sizeof(byte*));
        for (int i = 0; i < texts.Count; i++)
        {
            list[i] = (byte*)Marshal.StringToCoTaskMemUTF8(texts[i]);
        }

        return list;
    }

    /// <summary>True when /etc/passwd has a user of that name.</summary>
    public static bool UserExists(string user)
    {
        try
        {
            _ = FindUser(user);
            return true;
        }
        catch (HostException)
        {
            return false;
        }
    }

    /// <summary>Has this process's standard output and error go to the end of a file, which is made; a link is not followed.</summary>
    /// <exception cref="HostException">The file cannot be opened.</exception>
    public static void RedirectOutput(string path)
    {
        const int WriteOnly = 1;
        int append = OsAbi.Current.System == HostSystem.Linux ? 0x400 : 8;
        int file = LibC.open(path, WriteOnly | append | OsAbi.Current.OpenCreate | OsAbi.Current.OpenNoFollow, 0x1B0);
        if (file < 0 || LibC.dup2(file, 1) < 0 || LibC.dup2(file, 2) < 0)
        {
            throw HostException.Last(path);
        }

        _ = LibC.close(file);
    }

    /// <summary>
    /// Numbers of a user and its group, from passwd(5): name:password:uid:gid:... A user of NIS or LDAP is not found here;
    /// service accounts are local.
    /// </summary>
    /// <exception cref="HostException">There is no such user.</exception>
    public static (uint User, uint Group) FindUser(string user)
    {
        ArgumentNullException.ThrowIfNull(user);
        foreach (string line in File.Exists(Passwords) ? File.ReadLines(Passwords) : [])
        {
            string[] fields = line.Split(':');
            if (fields.Length >= 4 && string.Equals(fields[0], user, StringComparison.Ordinal)
                && uint.TryParse(fields[2], NumberStyles.None, CultureInfo.InvariantCulture, out uint id)
                && uint.TryParse(fields[3], NumberStyles.None, CultureInfo.InvariantCulture, out uint group))
            {
                return (id, group);
            }
        }

        throw new HostException($"there is no user \"{user}\" on this host");
    }
}
