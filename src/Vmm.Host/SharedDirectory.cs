// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using Vmm.Core;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. A shared directory is one descriptor, opened when the machine is made. Every call walks from it: each name on
// the way is opened with openat(2), O_DIRECTORY and O_NOFOLLOW, and the last one is used with a call that takes
// (directory, name) and does not follow links. "..", slashes and absolute paths cannot occur (SharedPath), links are never
// followed by us (the guest follows them itself, inside its own tree), so the walk cannot leave the directory, whatever a
// guest or another process renames meanwhile. Only regular files and directories are opened: devices, FIFOs and sockets
// of the host are visible and not reachable, and none can be made. Set-user-id bits are never set.
//
// Ownership: files belong to the user that the VM runs as; chown is tried and its refusal ignored, as others do for
// shares without privilege. Layouts of struct stat, dirent and statvfs differ by system and stand in FileLayout.

/// <summary>A directory of the host for a guest; see the theory above.</summary>
public sealed unsafe class SharedDirectory : ISharedDirectory
{
    private const int NotPermitted = 1;
    private const int IoError = 5;
    private const int NotAllowed = 13;
    private const int Invalid = 22;
    private const int ReadOnlyFs = 30;
    private const int MaxEntries = 1 << 20;
    private const uint TypeMask = 0xF000;
    private const uint TypeDirectory = 0x4000;
    private const uint TypeRegular = 0x8000;
    private const uint PermissionBits = 0x3FF; // sticky and rwx; no set-user-id, no set-group-id
    private const int WriteOnly = 1;
    private const int ReadWrite = 2;

    private static readonly FileLayout s_layout = FileLayout.Current;

    private readonly int _root;
    private bool _disposed;

    /// <summary>Opens a directory.</summary>
    /// <param name="path">On the host; links in this path are followed, it is the administrator's.</param>
    /// <param name="isReadOnly">Refuse changes.</param>
    /// <exception cref="HostException">It is not there or not a directory.</exception>
    public SharedDirectory(string path, bool isReadOnly)
    {
        OsAbi abi = OsAbi.Current;
        IsReadOnly = isReadOnly;
        _root = LibC.open(path, abi.OpenDirectory | abi.OpenCloseOnExec, 0);
        if (_root < 0)
        {
            throw HostException.Last($"share {path}");
        }
    }

    /// <inheritdoc/>
    public bool IsReadOnly { get; }

    /// <inheritdoc/>
    public int Stat(SharedPath path, out SharedStat stat)
    {
        stat = default;
        using var place = new Place(this, path);
        if (place.Error != 0)
        {
            return place.Error;
        }

        byte* raw = stackalloc byte[FileLayout.StatBytes];
        fixed (byte* name = place.Name)
        {
            // SAFETY: the name is NUL-terminated and the buffer larger than struct stat of the three systems.
            if (LibC.fstatat(place.Directory, name, raw, s_layout.NoFollow) != 0)
            {
                return LastError();
            }
        }

        stat = s_layout.ReadStat(new ReadOnlySpan<byte>(raw, FileLayout.StatBytes));
        return 0;
    }

    /// <inheritdoc/>
    public int Open(SharedPath path, SharedAccess access, out ISharedHandle? handle)
    {
        handle = null;
        bool changes = (access & (SharedAccess.Write | SharedAccess.Truncate)) != 0;
        if (changes && IsReadOnly)
        {
            return ReadOnlyFs;
        }

        // Looked at before it is opened: opening a device can do things.
        int error = Stat(path, out SharedStat stat);
        if (error != 0)
        {
            return error;
        }

        if ((stat.Mode & TypeMask) is not (TypeRegular or TypeDirectory))
        {
            return NotAllowed;
        }

        using var place = new Place(this, path);
        return place.Error != 0 ? place.Error : OpenAt(place, Flags(access), 0, out handle);
    }

    /// <inheritdoc/>
    public int Create(SharedPath path, SharedAccess access, bool exclusive, uint mode, out ISharedHandle? handle)
    {
        handle = null;
        if (IsReadOnly)
        {
            return ReadOnlyFs;
        }

        if (!exclusive && Stat(path, out _) == 0)
        {
            return Open(path, access, out handle);
        }

        using var place = new Place(this, path);
        OsAbi abi = OsAbi.Current;
        return place.Error != 0
            ? place.Error
            : OpenAt(place, Flags(access) | abi.OpenCreate | abi.OpenExclusive, mode & PermissionBits, out handle);
    }

    /// <inheritdoc/>
    public int MakeDirectory(SharedPath path, uint mode) =>
        Change(path, (directory, name) => LibC.mkdirat(directory, name, mode & PermissionBits));

    /// <inheritdoc/>
    public int MakeSymbolicLink(SharedPath path, ReadOnlySpan<byte> target)
    {
        if (target.Length is 0 or > 4095 || target.IndexOf((byte)0) >= 0)
        {
            return Invalid;
        }

        byte[] terminated = [.. target, 0];
        return Change(path, (directory, name) =>
        {
            fixed (byte* pointer = terminated)
            {
                return LibC.symlinkat(pointer, directory, name);
            }
        });
    }

    /// <inheritdoc/>
    public int ReadLink(SharedPath path, Span<byte> into, out int length)
    {
        length = 0;
        using var place = new Place(this, path);
        if (place.Error != 0)
        {
            return place.Error;
        }

        fixed (byte* name = place.Name)
        fixed (byte* buffer = into)
        {
            nint count = LibC.readlinkat(place.Directory, name, buffer, (nuint)into.Length);
            if (count < 0)
            {
                return LastError();
            }

            length = (int)count;
            return 0;
        }
    }

    /// <inheritdoc/>
    public int MakeHardLink(SharedPath existing, SharedPath path)
    {
        ArgumentNullException.ThrowIfNull(existing);
        using var from = new Place(this, existing);
        if (from.Error != 0)
        {
            return from.Error;
        }

        int directory = from.Directory;
        byte[] source = from.Name;
        return Change(path, (target, name) =>
        {
            // Flags 0: a link is linked, not what it points to.
            fixed (byte* pointer = source)
            {
                return LibC.linkat(directory, pointer, target, name, 0);
            }
        });
    }

    /// <inheritdoc/>
    public int Rename(SharedPath from, SharedPath to)
    {
        ArgumentNullException.ThrowIfNull(from);
        if (from.Parent is null)
        {
            return Invalid;
        }

        using var old = new Place(this, from);
        if (old.Error != 0)
        {
            return old.Error;
        }

        int directory = old.Directory;
        byte[] source = old.Name;
        return Change(to, (target, name) =>
        {
            fixed (byte* pointer = source)
            {
                return LibC.renameat(directory, pointer, target, name);
            }
        });
    }

    /// <inheritdoc/>
    public int Remove(SharedPath path, bool isDirectory) =>
        Change(path, (directory, name) => LibC.unlinkat(directory, name, isDirectory ? s_layout.RemoveDirectory : 0));

    /// <inheritdoc/>
    public int Change(SharedPath path, in SharedChange change)
    {
        if (IsReadOnly)
        {
            return ReadOnlyFs;
        }

        int error = 0;
        if (change.SizeBytes is { } size)
        {
            error = Open(path, SharedAccess.Write, out ISharedHandle? file);
            using (file)
            {
                if (error == 0)
                {
                    error = ((Handle)file!).Truncate(size);
                }
            }
        }

        if (error == 0 && change.Mode is { } mode)
        {
            error = ChangeMode(path, mode);
        }

        if (error == 0 && (change.Uid is not null || change.Gid is not null))
        {
            error = ChangeOwner(path, change.Uid ?? uint.MaxValue, change.Gid ?? uint.MaxValue);
        }

        return error == 0 && (change.Accessed is not null || change.Modified is not null)
            ? ChangeTimes(path, change.Accessed, change.Modified)
            : error;
    }

    /// <inheritdoc/>
    public int Space(SharedPath path, out SharedSpace space)
    {
        ulong* raw = stackalloc ulong[64];
        space = default;

        // SAFETY: 512 bytes, more than struct statvfs of the three systems.
        if (LibC.fstatvfs(_root, raw) != 0)
        {
            return LastError();
        }

        space = s_layout.ReadSpace(new ReadOnlySpan<ulong>(raw, 64));
        return 0;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (!_disposed)
        {
            _disposed = true;
            LibC.close(_root);
        }
    }

    private delegate int NameCall(int directory, byte* name);

    private static int LastError()
    {
        int raw = Marshal.GetLastPInvokeError();
        if (OsAbi.Current.System == HostSystem.Linux)
        {
            return raw;
        }

        return OsAbi.Current.ToErrno(raw) switch
        {
            Errno.EAGAIN => 11,
            Errno.EDEADLK => 35,
            Errno.ENOSYS => 38,
            Errno.ENOTEMPTY => 39,
            Errno.EOPNOTSUPP => 95,
            Errno.EDQUOT => 122,
            Errno.Other => IoError,
            _ => raw <= 34 ? raw : IoError, // the old numbers are the same everywhere
        };
    }

    private static int Flags(SharedAccess access)
    {
        OsAbi abi = OsAbi.Current;
        int flags = abi.OpenNoFollow | abi.OpenCloseOnExec | abi.OpenNonBlocking | abi.OpenNoControllingTerminal;
        flags |= (access & SharedAccess.Write) == 0 ? 0 : (access & SharedAccess.Read) != 0 ? ReadWrite : WriteOnly;
        flags |= (access & SharedAccess.Truncate) != 0 ? abi.OpenTruncate : 0;
        flags |= (access & SharedAccess.Append) != 0 ? s_layout.OpenAppend : 0;
        flags |= (access & SharedAccess.Directory) != 0 ? abi.OpenDirectory : 0;
        return flags;
    }

    private static int OpenAt(Place place, int flags, uint mode, out ISharedHandle? handle)
    {
        handle = null;
        int fd;
        fixed (byte* name = place.Name)
        {
            fd = LibC.openat(place.Directory, name, flags, mode);
        }

        if (fd < 0)
        {
            return LastError();
        }

        var opened = new Handle(fd);
        if (opened.Stat(out SharedStat stat) != 0 || (stat.Mode & TypeMask) is not (TypeRegular or TypeDirectory))
        {
            opened.Dispose(); // it became something else in between
            return NotAllowed;
        }

        handle = opened;
        return 0;
    }

    private int Change(SharedPath path, NameCall call)
    {
        if (IsReadOnly)
        {
            return ReadOnlyFs;
        }

        ArgumentNullException.ThrowIfNull(path);
        if (path.Parent is null)
        {
            return NotPermitted; // the root itself stays
        }

        using var place = new Place(this, path);
        if (place.Error != 0)
        {
            return place.Error;
        }

        fixed (byte* name = place.Name)
        {
            return call(place.Directory, name) == 0 ? 0 : LastError();
        }
    }

    private int ChangeMode(SharedPath path, uint mode)
    {
        // fchmodat(2) follows links on Linux, so the file is opened; one that may not be read may perhaps be written.
        int error = Open(path, SharedAccess.Read, out ISharedHandle? file);
        if (error == NotAllowed)
        {
            error = Open(path, SharedAccess.Write, out file);
        }

        using (file)
        {
            return error != 0 ? error : ((Handle)file!).SetMode(mode & PermissionBits);
        }
    }

    private int ChangeOwner(SharedPath path, uint uid, uint gid)
    {
        using var place = new Place(this, path);
        if (place.Error != 0)
        {
            return place.Error;
        }

        fixed (byte* name = place.Name)
        {
            int error = LibC.fchownat(place.Directory, name, uid, gid, s_layout.NoFollow) == 0 ? 0 : LastError();
            return error == NotPermitted ? 0 : error;
        }
    }

    private int ChangeTimes(
        SharedPath path, (long Seconds, long Nanoseconds)? accessed, (long Seconds, long Nanoseconds)? modified)
    {
        using var place = new Place(this, path);
        if (place.Error != 0)
        {
            return place.Error;
        }

        LibC.TimeSpec* times = stackalloc LibC.TimeSpec[2];
        times[0] = Time(accessed);
        times[1] = Time(modified);
        fixed (byte* name = place.Name)
        {
            // SAFETY: two structures on this stack and a NUL-terminated name.
            return LibC.utimensat(place.Directory, name, times, s_layout.NoFollow) == 0 ? 0 : LastError();
        }
    }

    private static LibC.TimeSpec Time((long Seconds, long Nanoseconds)? time) => time switch
    {
        null => new LibC.TimeSpec { Nanoseconds = s_layout.TimeOmit },
        { Nanoseconds: < 0 or > 999_999_999 } => new LibC.TimeSpec { Nanoseconds = s_layout.TimeNow },
        { } given => new LibC.TimeSpec { Seconds = given.Seconds, Nanoseconds = given.Nanoseconds },
    };

    /// <summary>The directory that a path's last name is in, as a descriptor, and that name with a NUL.</summary>
    private readonly ref struct Place
    {
        private readonly bool _owned;

        public Place(SharedDirectory owner, SharedPath path)
        {
            ArgumentNullException.ThrowIfNull(path);
            Directory = owner._root;
            Name = path.Parent is null ? ".\0"u8.ToArray() : [.. path.Name, 0];
            if (path.Depth <= 1)
            {
                return;
            }

            var names = new Stack<SharedPath>();
            for (SharedPath at = path.Parent!; at.Parent is not null; at = at.Parent)
            {
                names.Push(at);
            }

            OsAbi abi = OsAbi.Current;
            foreach (SharedPath step in names)
            {
                int next;
                fixed (byte* name = (byte[])[.. step.Name, 0])
                {
                    next = LibC.openat(
                        Directory, name, abi.OpenDirectory | abi.OpenNoFollow | abi.OpenCloseOnExec, 0);
                }

                int error = next < 0 ? LastError() : 0;
                if (_owned)
                {
                    LibC.close(Directory);
                }

                if (error != 0)
                {
                    _owned = false;
                    Error = error;
                    return;
                }

                Directory = next;
                _owned = true;
            }
        }

        public int Directory { get; }

        public byte[] Name { get; }

        public int Error { get; }

        public void Dispose()
        {
            if (_owned)
            {
                LibC.close(Directory);
            }
        }
    }

    /// <summary>An open file.</summary>
    private sealed class Handle : ISharedHandle
    {
        private readonly int _fd;
        private bool _closed;

        public Handle(int fd) => _fd = fd;

        public int Stat(out SharedStat stat)
        {
            byte* raw = stackalloc byte[FileLayout.StatBytes];

            // SAFETY: larger than struct stat of the three systems.
            if (LibC.fstat(_fd, raw) != 0)
            {
                stat = default;
                return LastError();
            }

            stat = s_layout.ReadStat(new ReadOnlySpan<byte>(raw, FileLayout.StatBytes));
            return 0;
        }

        public int Read(long offset, Span<byte> into, out int count)
        {
            count = 0;
            fixed (byte* pointer = into)
            {
                while (count < into.Length)
                {
                    // SAFETY: the buffer is pinned and the rest of its length is passed.
                    nint got = LibC.pread(_fd, pointer + count, (nuint)(into.Length - count), offset + count);
                    if (got < 0)
                    {
                        return count > 0 ? 0 : LastError();
                    }

                    if (got == 0)
                    {
                        break;
                    }

                    count += (int)got;
                }
            }

            return 0;
        }

        public int Write(long offset, ReadOnlySpan<byte> from, out int count)
        {
            count = 0;
            fixed (byte* pointer = from)
            {
                while (count < from.Length)
                {
                    // SAFETY: the buffer is pinned and the rest of its length is passed.
                    nint put = LibC.pwrite(_fd, pointer + count, (nuint)(from.Length - count), offset + count);
                    if (put < 0)
                    {
                        return count > 0 ? 0 : LastError();
                    }

                    count += (int)put;
                }
            }

            return 0;
        }

        public int Sync(bool dataOnly) => (dataOnly ? LibC.fdatasync(_fd) : LibC.fsync(_fd)) == 0 ? 0 : LastError();

        public int Truncate(ulong length) =>
            length > long.MaxValue ? Invalid : LibC.ftruncate(_fd, (long)length) == 0 ? 0 : LastError();

        public int SetMode(uint mode) => LibC.fchmod(_fd, mode) == 0 ? 0 : LastError();

        public int List(out IReadOnlyList<SharedEntry> entries)
        {
            var list = new List<SharedEntry>();
            entries = list;
            int copy;
            fixed (byte* here = ".\0"u8)
            {
                // A descriptor of its own, since closedir closes it and its position moves.
                copy = LibC.openat(_fd, here, OsAbi.Current.OpenDirectory | OsAbi.Current.OpenCloseOnExec, 0);
            }

            if (copy < 0)
            {
                return LastError();
            }

            nint directory = LibC.fdopendir(copy);
            if (directory == 0)
            {
                int error = LastError();
                LibC.close(copy);
                return error;
            }

            byte* entry;
            while (list.Count < MaxEntries && (entry = LibC.readdir(directory)) != null)
            {
                // SAFETY: readdir gives a structure with a NUL-terminated name, valid until the next call.
                ReadOnlySpan<byte> name = MemoryMarshal.CreateReadOnlySpanFromNullTerminated(entry + s_layout.EntryName);
                if (SharedPath.IsName(name))
                {
                    byte type = s_layout.EntryType < 0 ? (byte)0 : entry[s_layout.EntryType];
                    list.Add(new SharedEntry(name.ToArray(), *(ulong*)entry, type));
                }
            }

            LibC.closedir(directory);
            return 0;
        }

        public void Dispose()
        {
            if (!_closed)
            {
                _closed = true;
                LibC.close(_fd);
            }
        }
    }
}
