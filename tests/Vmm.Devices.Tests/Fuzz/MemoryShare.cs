// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using System.Text;
using Vmm.Core;

namespace Vmm.Devices.Tests.Fuzz;

/// <summary>A directory in memory, small and strict: enough for 9P to have something to talk about.</summary>
internal sealed class MemoryShare : ISharedDirectory
{
    private const int NoEntry = 2, Exists = 17, NotDirectory = 20, IsDirectory = 21, Invalid = 22, TooLarge = 27, NoSpace = 28, NotEmpty = 39;
    private const int MaxNodes = 64;
    private const int MaxBytes = 64 * 1024;

    private readonly Dictionary<string, Node> _nodes = new(StringComparer.Ordinal) { [""] = new Node { Mode = 0x41ED } };

    public bool IsReadOnly => false;

    public int Stat(SharedPath path, out SharedStat stat)
    {
        stat = default;
        if (!_nodes.TryGetValue(Key(path), out Node? node))
        {
            return NoEntry;
        }

        stat = node.Stat;
        return 0;
    }

    public int Open(SharedPath path, SharedAccess access, out ISharedHandle? handle)
    {
        handle = null;
        if (!_nodes.TryGetValue(Key(path), out Node? node))
        {
            return NoEntry;
        }

        if (!node.IsDirectory && (access & SharedAccess.Directory) != 0)
        {
            return NotDirectory;
        }

        if (node.IsDirectory && (access & SharedAccess.Write) != 0)
        {
            return IsDirectory;
        }

        if ((access & SharedAccess.Truncate) != 0)
        {
            node.Data.Clear();
        }

        handle = new Handle(this, node, Key(path));
        return 0;
    }

    public int Create(SharedPath path, SharedAccess access, bool exclusive, uint mode, out ISharedHandle? handle)
    {
        handle = null;
        if (_nodes.ContainsKey(Key(path)))
        {
            return exclusive ? Exists : Open(path, access, out handle);
        }

        int error = Add(path, 0x8000 | (mode & 0xFFF));
        return error != 0 ? error : Open(path, access, out handle);
    }

    public int MakeDirectory(SharedPath path, uint mode) => Add(path, 0x4000 | (mode & 0xFFF));

    public int MakeSymbolicLink(SharedPath path, ReadOnlySpan<byte> target)
    {
        int error = Add(path, 0xA1FF);
        if (error == 0)
        {
            _nodes[Key(path)].Data.AddRange(target);
        }

        return error;
    }

    public int ReadLink(SharedPath path, Span<byte> into, out int length)
    {
        length = 0;
        if (!_nodes.TryGetValue(Key(path), out Node? node) || (node.Mode & 0xF000) != 0xA000)
        {
            return Invalid;
        }

        length = Math.Min(into.Length, node.Data.Count);
        node.Data.GetRange(0, length).ToArray().CopyTo(into);
        return 0;
    }

    public int MakeHardLink(SharedPath existing, SharedPath path)
    {
        if (!_nodes.TryGetValue(Key(existing), out Node? node) || node.IsDirectory)
        {
            return NoEntry;
        }

        int error = Add(path, 0);
        if (error == 0)
        {
            _nodes[Key(path)] = node;
        }

        return error;
    }

    public int Rename(SharedPath from, SharedPath to)
    {
        string old = Key(from), fresh = Key(to);
        if (!_nodes.TryGetValue(old, out Node? node) || old.Length == 0)
        {
            return NoEntry;
        }

        if (fresh == old || fresh.StartsWith(old + "/", StringComparison.Ordinal))
        {
            return fresh == old ? 0 : Invalid;
        }

        if (_nodes.TryGetValue(fresh, out Node? target) && target.IsDirectory)
        {
            return Exists;
        }

        if (!_nodes.TryGetValue(Parent(fresh), out Node? parent) || !parent.IsDirectory)
        {
            return NoEntry;
        }

        foreach (string key in _nodes.Keys.Where(k => k.StartsWith(old + "/", StringComparison.Ordinal)).ToList())
        {
            _nodes.Remove(key, out Node? moved);
            _nodes[fresh + key[old.Length..]] = moved!;
        }

        _nodes.Remove(old);
        _nodes[fresh] = node;
        return 0;
    }

    public int Remove(SharedPath path, bool isDirectory)
    {
        string key = Key(path);
        if (key.Length == 0 || !_nodes.TryGetValue(key, out Node? node))
        {
            return NoEntry;
        }

        if (node.IsDirectory != isDirectory)
        {
            return isDirectory ? NotDirectory : IsDirectory;
        }

        if (_nodes.Keys.Any(k => k.StartsWith(key + "/", StringComparison.Ordinal)))
        {
            return NotEmpty;
        }

        _nodes.Remove(key);
        return 0;
    }

    public int Change(SharedPath path, in SharedChange change)
    {
        if (!_nodes.TryGetValue(Key(path), out Node? node))
        {
            return NoEntry;
        }

        if (change.SizeBytes is { } size)
        {
            if (size > MaxBytes)
            {
                return TooLarge;
            }

            node.Resize((int)size);
        }

        node.Mode = (node.Mode & 0xF000) | ((change.Mode ?? node.Mode) & 0xFFF);
        return 0;
    }

    public int Space(SharedPath path, out SharedSpace space)
    {
        space = new SharedSpace { BlockBytes = 4096, Blocks = 100, FreeBlocks = 50, AvailableBlocks = 50, Files = MaxNodes };
        return 0;
    }

    public void Dispose()
    {
    }

    private static string Key(SharedPath path) => path.Parent is null ? "" : Key(path.Parent) + "/" + Encoding.Latin1.GetString(path.Name);

    private static string Parent(string key) => key[..key.LastIndexOf('/')];

    private int Add(SharedPath path, uint mode)
    {
        string key = Key(path);
        if (_nodes.ContainsKey(key))
        {
            return Exists;
        }

        if (!_nodes.TryGetValue(Parent(key), out Node? parent))
        {
            return NoEntry;
        }

        if (!parent.IsDirectory)
        {
            return NotDirectory;
        }

        if (_nodes.Count >= MaxNodes)
        {
            return NoSpace;
        }

        _nodes[key] = new Node { Mode = mode, Inode = (ulong)key.Length + ((ulong)_nodes.Count << 16) };
        return 0;
    }

    private sealed class Node
    {
        public uint Mode { get; set; }

        public ulong Inode { get; init; } = 1;

        public List<byte> Data { get; } = [];

        public bool IsDirectory => (Mode & 0xF000) == 0x4000;

        public SharedStat Stat => new()
        {
            Mode = Mode,
            Links = 1,
            SizeBytes = (ulong)Data.Count,
            BlockBytes = 4096,
            Inode = Inode,
        };

        public void Resize(int size)
        {
            if (size < Data.Count)
            {
                Data.RemoveRange(size, Data.Count - size);
            }

            Data.AddRange(new byte[Math.Max(0, size - Data.Count)]);
        }
    }

    private sealed class Handle(MemoryShare share, Node node, string key) : ISharedHandle
    {
        public int Stat(out SharedStat stat)
        {
            stat = node.Stat;
            return 0;
        }

        public int Read(long offset, Span<byte> into, out int count)
        {
            count = 0;
            if (node.IsDirectory || offset < 0)
            {
                return node.IsDirectory ? IsDirectory : Invalid;
            }

            count = (int)Math.Clamp(node.Data.Count - offset, 0, into.Length);
            for (int i = 0; i < count; i++)
            {
                into[i] = node.Data[(int)offset + i];
            }

            return 0;
        }

        public int Write(long offset, ReadOnlySpan<byte> from, out int count)
        {
            count = 0;
            if (offset < 0 || offset > MaxBytes - from.Length)
            {
                return TooLarge;
            }

            node.Resize(Math.Max(node.Data.Count, (int)offset + from.Length));
            for (int i = 0; i < from.Length; i++)
            {
                node.Data[(int)offset + i] = from[i];
            }

            count = from.Length;
            return 0;
        }

        public int Sync(bool dataOnly) => 0;

        public int List(out IReadOnlyList<SharedEntry> entries)
        {
            entries = [.. share._nodes
                .Where(n => n.Key.Length > 0 && Parent(n.Key) == key)
                .Select(n => new SharedEntry(Encoding.Latin1.GetBytes(n.Key[(key.Length + 1)..]), n.Value.Inode, (byte)(n.Value.Mode >> 12)))];
            return node.IsDirectory ? 0 : NotDirectory;
        }

        public void Dispose()
        {
        }
    }
}
