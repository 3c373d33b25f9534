// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using Microsoft.Win32.SafeHandles;
using Vmm.Host.Native;

namespace Vmm.Host.Sandbox;

// Theory. Landlock (Linux 5.13 and later, landlock(7)) takes from a process every file that it did not name beforehand; it needs no
// rights and no set-up, so a private daemon's VMs are confined like root's. The rules bind the thread that puts them in
// place and what it starts later. A .NET process has threads before its first line runs, so the process confines its main
// thread and then executes itself anew: all threads of the new program are bound. The process number, the descriptors and
// the limits stay.
//
// Rights on a directory hold for all below it. A path that is not there is left out: what does not exist cannot be read.

/// <summary>What a rule lets a process do with a file, or with everything below a directory.</summary>
public enum FileRights
{
    /// <summary>Read files, list directories.</summary>
    Read,

    /// <summary>The same, and run programs and map libraries.</summary>
    Execute,

    /// <summary>Read and write files that are there, and use devices.</summary>
    Write,

    /// <summary>Make sockets in a directory, and remove what is in it, without reading or writing it.</summary>
    Listen,

    /// <summary>Everything but to run programs and to make devices.</summary>
    Own,
}

/// <summary>Confines a process to the files that it names (Linux: Landlock).</summary>
public sealed class FileSandbox
{
    private const int CreateRuleset = 444;
    private const int AddRule = 445;
    private const int RestrictSelf = 446;
    private const int VersionFlag = 1;
    private const int RulePathBeneath = 1;

    // linux/landlock.h, LANDLOCK_ACCESS_FS_*.
    private const ulong ExecuteBit = 1 << 0;
    private const ulong WriteFileBit = 1 << 1;
    private const ulong ReadFileBit = 1 << 2;
    private const ulong ReadDirBit = 1 << 3;
    private const ulong ReferBit = 1 << 13;
    private const ulong TruncateBit = 1 << 14;
    private const ulong IoctlDeviceBit = 1 << 15;
    private const ulong ListenBits = (1 << 5) | (1 << 9);
    private const ulong MakeDeviceBits = (1 << 6) | (1 << 11);
    private const ulong FileBits = ExecuteBit | WriteFileBit | ReadFileBit | TruncateBit | IoctlDeviceBit;

    // LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and LANDLOCK_SCOPE_SIGNAL.
    private const ulong ScopeBits = 3;

    private readonly List<(string Path, FileRights Rights)> _rules = [];

    /// <summary>Adds a rule. Rules add up.</summary>
    public void Allow(string? path, FileRights rights)
    {
        if (!string.IsNullOrEmpty(path))
        {
            _rules.Add((path, rights));
        }
    }

    /// <summary>Confines the calling thread and whatever it starts.</summary>
    /// <param name="reason">Null on success; otherwise one line that says why there is no confinement.</param>
    /// <exception cref="HostException">A rule was refused.</exception>
    public unsafe bool TryEnter(out string? reason)
    {
        int version = OsAbi.Current.System == HostSystem.Linux ? (int)LibC.syscall(CreateRuleset, 0, 0, VersionFlag) : 0;
        if (version <= 0)
        {
            reason = "this system has no Landlock";
            return false;
        }

        ulong handled = HandledBits(version);
        var attributes = stackalloc ulong[3];
        attributes[0] = handled;
        attributes[1] = 0;
        attributes[2] = version >= 6 ? ScopeBits : 0;
        nint size = version >= 6 ? 24 : version >= 4 ? 16 : 8;
        nint descriptor = LibC.syscall(CreateRuleset, (nint)attributes, size, 0);
        if (descriptor < 0)
        {
            throw HostException.Last("landlock_create_ruleset");
        }

        using var ruleset = new SafeFileHandle(descriptor, ownsHandle: true);
        foreach ((string path, FileRights rights) in _rules)
        {
            Add(ruleset, path, handled, rights);
        }

        if (!HostProcess.TryRefuseNewPrivileges() || LibC.syscall(RestrictSelf, descriptor, 0, 0) != 0)
        {
            throw HostException.Last("landlock_restrict_self");
        }

        reason = null;
        return true;
    }

    private static ulong HandledBits(int version)
    {
        ulong all = (1 << 13) - 1;
        all |= version >= 2 ? ReferBit : 0;
        all |= version >= 3 ? TruncateBit : 0;
        all |= version >= 5 ? IoctlDeviceBit : 0;
        return all;
    }

    private static unsafe void Add(SafeFileHandle ruleset, string path, ulong handled, FileRights rights)
    {
        const int OpenPath = 0x200000;
        using var file = new SafeFileHandle(LibC.open(path, OpenPath | OsAbi.Linux.OpenCloseOnExec, 0), ownsHandle: true);
        if (file.IsInvalid)
        {
            return;
        }

        ulong bits = rights switch
        {
            FileRights.Read => ReadFileBit | ReadDirBit,
            FileRights.Execute => ReadFileBit | ReadDirBit | ExecuteBit,
            FileRights.Listen => ListenBits,
            FileRights.Write => ReadFileBit | ReadDirBit | WriteFileBit | TruncateBit | IoctlDeviceBit,
            _ => handled & ~(ExecuteBit | MakeDeviceBits),
        };
        bits &= System.IO.Directory.Exists(path) ? handled : handled & FileBits;

        // SAFETY: struct landlock_path_beneath_attr is packed, 8 + 4 bytes; the kernel reads it during the call only.
        byte* rule = stackalloc byte[12];
        *(ulong*)rule = bits;
        *(int*)(rule + 8) = (int)file.DangerousGetHandle();
        if (LibC.syscall4(AddRule, ruleset.DangerousGetHandle(), RulePathBeneath, (nint)rule, 0) != 0)
        {
            throw HostException.Last($"landlock_add_rule {path}");
        }
    }
}
