// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Core;

// Theory. A directory of the host that a guest may use. The device side speaks a file protocol and holds paths; the host
// side turns each call into system calls that cannot leave the directory: a path is a list of names, each of which is
// opened below the one before without following links. Results are error numbers of Linux, because that is what the
// protocol (9P2000.L) carries whatever the host is; 0 means done.

/// <summary>A place in a shared directory: names from its root. Immutable.</summary>
public sealed class SharedPath
{
    /// <summary>Longest name.</summary>
    public const int MaxNameBytes = 255;

    /// <summary>Deepest path.</summary>
    public const int MaxDepth = 128;

    private readonly byte[] _name;

    private SharedPath(SharedPath? parent, byte[] name)
    {
        Parent = parent;
        _name = name;
        Depth = parent is null ? 0 : parent.Depth + 1;
    }

    /// <summary>The shared directory itself.</summary>
    public static SharedPath Root { get; } = new(null, []);

    /// <summary>The directory that it is in; null for the root.</summary>
    public SharedPath? Parent { get; }

    /// <summary>Number of names.</summary>
    public int Depth { get; }

    /// <summary>The last name; empty for the root.</summary>
    public ReadOnlySpan<byte> Name => _name;

    /// <summary>True for a name that denotes something in a directory: no slash, no NUL, not "." or "..".</summary>
    public static bool IsName(ReadOnlySpan<byte> name) =>
        name.Length is > 0 and <= MaxNameBytes && name.IndexOfAny((byte)'/', (byte)0) < 0
        && !name.SequenceEqual("."u8) && !name.SequenceEqual(".."u8);

    /// <summary>A place in this one.</summary>
    /// <exception cref="ArgumentException">Not a name, see <see cref="IsName"/>, or too deep.</exception>
    public SharedPath Child(ReadOnlySpan<byte> name) => IsName(name) && Depth < MaxDepth
        ? new SharedPath(this, name.ToArray())
        : throw new ArgumentException("not a name in a directory", nameof(name));

    /// <summary>This path after what was at <paramref name="from"/> has moved.</summary>
    public SharedPath Moved(SharedPath from, SharedPath to)
    {
        if (IsSame(from))
        {
            return to;
        }

        if (Parent is null)
        {
            return this;
        }

        SharedPath parent = Parent.Moved(from, to);
        return ReferenceEquals(parent, Parent) ? this : new SharedPath(parent, _name);
    }

    /// <summary>True for the same names.</summary>
    public bool IsSame(SharedPath other)
    {
        SharedPath? a = this;
        SharedPath? b = other;
        while (a is not null && b is not null && a.Depth == b.Depth)
        {
            if (ReferenceEquals(a, b))
            {
                return true;
            }

            if (!a.Name.SequenceEqual(b.Name))
            {
                return false;
            }

            a = a.Parent;
            b = b.Parent;
        }

        return a is null && b is null;
    }
}

/// <summary>Attributes of a file; numbers and bits as in Linux.</summary>
public struct SharedStat
{
    /// <summary>Type and permissions.</summary>
    public uint Mode;

    /// <summary>Owner.</summary>
    public uint Uid;

    /// <summary>Group.</summary>
    public uint Gid;

    /// <summary>Hard links.</summary>
    public ulong Links;

    /// <summary>Device number of a device file.</summary>
    public ulong Device;

    /// <summary>Length in bytes.</summary>
    public ulong SizeBytes;

    /// <summary>Good size for transfers.</summary>
    public ulong BlockBytes;

    /// <summary>Allocated units of 512 bytes.</summary>
    public ulong Blocks;

    /// <summary>Number in its file system.</summary>
    public ulong Inode;

    /// <summary>Which file system.</summary>
    public ulong FileSystem;

    /// <summary>Last access, since 1970.</summary>
    public (long Seconds, long Nanoseconds) Accessed;

    /// <summary>Last change of content.</summary>
    public (long Seconds, long Nanoseconds) Modified;

    /// <summary>Last change of attributes.</summary>
    public (long Seconds, long Nanoseconds) Changed;
}

/// <summary>Space of a file system.</summary>
public struct SharedSpace
{
    /// <summary>Unit of the counts of blocks.</summary>
    public ulong BlockBytes;

    /// <summary>Blocks.</summary>
    public ulong Blocks;

    /// <summary>Free blocks.</summary>
    public ulong FreeBlocks;

    /// <summary>Free blocks for ordinary users.</summary>
    public ulong AvailableBlocks;

    /// <summary>Files.</summary>
    public ulong Files;

    /// <summary>Files that could still be made.</summary>
    public ulong FreeFiles;
}

/// <summary>What to change; null leaves a thing alone.</summary>
public struct SharedChange
{
    /// <summary>Permissions.</summary>
    public uint? Mode;

    /// <summary>Owner.</summary>
    public uint? Uid;

    /// <summary>Group.</summary>
    public uint? Gid;

    /// <summary>Length.</summary>
    public ulong? SizeBytes;

    /// <summary>Last access; Nanoseconds -1 means now.</summary>
    public (long Seconds, long Nanoseconds)? Accessed;

    /// <summary>Last change of content; Nanoseconds -1 means now.</summary>
    public (long Seconds, long Nanoseconds)? Modified;
}

/// <summary>How to open.</summary>
[Flags]
public enum SharedAccess
{
    /// <summary>Nothing.</summary>
    None = 0,

    /// <summary>Reading.</summary>
    Read = 1,

    /// <summary>Writing.</summary>
    Write = 2,

    /// <summary>Cut to length 0.</summary>
    Truncate = 4,

    /// <summary>Each write goes to the end.</summary>
    Append = 8,

    /// <summary>Only if it is a directory.</summary>
    Directory = 16,
}

/// <summary>An entry of a directory.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Inode">Its number.</param>
/// <param name="Type">DT_* of Linux; 0 for unknown.</param>
public sealed record SharedEntry(byte[] Name, ulong Inode, byte Type);

/// <summary>An open file or directory. One thread at a time.</summary>
public interface ISharedHandle : IDisposable
{
    /// <summary>Attributes.</summary>
    int Stat(out SharedStat stat);

    /// <summary>Reads; fewer bytes only at the end.</summary>
    int Read(long offset, Span<byte> into, out int count);

    /// <summary>Writes.</summary>
    int Write(long offset, ReadOnlySpan<byte> from, out int count);

    /// <summary>Waits until everything written is on stable storage.</summary>
    int Sync(bool dataOnly);

    /// <summary>All entries but "." and "..".</summary>
    int List(out IReadOnlyList<SharedEntry> entries);
}

/// <summary>A directory of the host. One thread at a time. Results are 0 or error numbers of Linux.</summary>
public interface ISharedDirectory : IDisposable
{
    /// <summary>Nothing may be changed.</summary>
    bool IsReadOnly { get; }

    /// <summary>Attributes, of a link itself.</summary>
    int Stat(SharedPath path, out SharedStat stat);

    /// <summary>Opens a regular file or a directory, nothing else.</summary>
    int Open(SharedPath path, SharedAccess access, out ISharedHandle? handle);

    /// <summary>Makes and opens a regular file.</summary>
    int Create(SharedPath path, SharedAccess access, bool exclusive, uint mode, out ISharedHandle? handle);

    /// <summary>Makes a directory.</summary>
    int MakeDirectory(SharedPath path, uint mode);

    /// <summary>Makes a symbolic link, which is never followed here.</summary>
    int MakeSymbolicLink(SharedPath path, ReadOnlySpan<byte> target);

    /// <summary>Reads a symbolic link.</summary>
    int ReadLink(SharedPath path, Span<byte> into, out int length);

    /// <summary>Makes a hard link.</summary>
    int MakeHardLink(SharedPath existing, SharedPath path);

    /// <summary>Moves.</summary>
    int Rename(SharedPath from, SharedPath to);

    /// <summary>Removes a file or an empty directory.</summary>
    int Remove(SharedPath path, bool isDirectory);

    /// <summary>Changes attributes.</summary>
    int Change(SharedPath path, in SharedChange change);

    /// <summary>Space.</summary>
    int Space(SharedPath path, out SharedSpace space);
}
