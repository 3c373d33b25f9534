// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>
/// 9P transport (VIRTIO 1.2 §5.9 names it; the protocol is 9P2000.L) with the file server behind it: a directory of the
/// host as a file system of the guest. A fid is a path (<see cref="SharedPath"/>) and, once opened, a handle. Requests
/// are served one after the other on the worker; each is read in one copy and checked on the copy. Everything that a
/// client can make grow is bounded: fids, message size, names, depth.
/// </summary>
/// <remarks>
/// Saved state holds the fids with their paths and how they were open; on load they are opened again, and one whose file is
/// gone answers with ESTALE. What was written is the host's business. Extended attributes are not supported; locks are
/// granted, since there is one client.
/// </remarks>
public sealed class Virtio9P : VirtioModel
{
    private const ulong FeatureMountTag = 1;
    private const int MaxMessageBytes = 1 << 20;
    private const int DefaultMessageBytes = 8192;
    private const int MinMessageBytes = 512;
    private const int MaxFids = 16384;
    private const int MaxWalk = 16;
    private const int HeaderBytes = 7;
    private const uint NoFid = uint.MaxValue;

    private const int ErrorBadFid = 9;
    private const int ErrorInvalid = 22;
    private const int ErrorTooManyFiles = 24;
    private const int ErrorPermission = 1;
    private const int ErrorNotSupported = 95;
    private const int ErrorNameTooLong = 36;
    private const int ErrorStale = 116;
    private const int ErrorIo = 5;

    private const uint ModeTypeMask = 0xF000;
    private const uint ModeDirectory = 0x4000;
    private const uint ModeLink = 0xA000;

    private static readonly ushort[] s_queueSizes = [128];

    private readonly Dictionary<uint, Fid> _fids = [];
    private readonly ISharedDirectory _share;
    private readonly byte[] _config;
    private byte[] _request = new byte[DefaultMessageBytes];
    private byte[] _reply = new byte[DefaultMessageBytes];
    private int _messageBytes = DefaultMessageBytes;
    private long _malformed;

    /// <summary>Makes one.</summary>
    /// <param name="share">The directory; owned.</param>
    /// <param name="tag">Name under which the guest mounts it, 1 to 64 bytes.</param>
    public Virtio9P(ISharedDirectory share, string tag)
    {
        byte[] name = Encoding.UTF8.GetBytes(tag);
        ArgumentOutOfRangeException.ThrowIfZero(name.Length, nameof(tag));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(name.Length, 64, nameof(tag));
        _share = share;
        _config = new byte[2 + name.Length];
        BinaryPrimitives.WriteUInt16LittleEndian(_config, (ushort)name.Length);
        name.CopyTo(_config, 2);
    }

    private enum Message : byte
    {
        Error = 7, // Rlerror
        StatFs = 8,
        Open = 12,
        Create = 14,
        Symlink = 16,
        MakeNode = 18,
        Rename = 20,
        ReadLink = 22,
        GetAttributes = 24,
        SetAttributes = 26,
        XattrWalk = 30,
        XattrCreate = 32,
        ReadDirectory = 40,
        Sync = 50,
        Lock = 52,
        GetLock = 54,
        Link = 70,
        MakeDirectory = 72,
        RenameAt = 74,
        UnlinkAt = 76,
        Version = 100,
        Authenticate = 102,
        Attach = 104,
        Flush = 108,
        Walk = 110,
        Read = 116,
        Write = 118,
        Clunk = 120,
        Remove = 122,
    }

    /// <inheritdoc/>
    public override VirtioDeviceType Type => VirtioDeviceType.NineP;

    /// <inheritdoc/>
    public override ulong OfferedFeatures => FeatureMountTag;

    /// <inheritdoc/>
    public override ReadOnlySpan<ushort> QueueSizes => s_queueSizes;

    /// <inheritdoc/>
    public override int ConfigBytes => _config.Length;

    /// <summary>Requests that were no messages of the protocol.</summary>
    public long Malformed => Interlocked.Read(ref _malformed);

    /// <summary>Fids in use.</summary>
    public int Fids => _fids.Count;

    /// <inheritdoc/>
    public override void ReadConfig(uint offset, Span<byte> into) => CopyConfig(_config, offset, into);

    /// <inheritdoc/>
    public override void Reset() => Clear();

    /// <inheritdoc/>
    public override void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        writer.Write("9p.message-bytes", (ulong)_messageBytes);
        writer.Write("9p.fids", (ulong)_fids.Count);
        int index = 0;
        foreach ((uint number, Fid fid) in _fids)
        {
            string prefix = $"9p.fid{index++}.";
            writer.Write(prefix + "number", number);
            writer.Write(prefix + "open", fid.IsOpen);
            writer.Write(prefix + "access", (ulong)fid.Access);
            var names = new List<byte>();
            for (SharedPath at = fid.Path; at.Parent is not null; at = at.Parent)
            {
                names.InsertRange(0, [(byte)'/', .. at.Name]);
            }

            writer.WriteBytes(prefix + "path", names.ToArray());
        }
    }

    /// <inheritdoc/>
    public override void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        Clear();
        _messageBytes = (int)Math.Max(MinMessageBytes, reader.ReadBounded("9p.message-bytes", MaxMessageBytes));
        int count = (int)reader.ReadBounded("9p.fids", MaxFids);
        for (int i = 0; i < count; i++)
        {
            string prefix = $"9p.fid{i}.";
            SharedPath path = SharedPath.Root;
            ReadOnlySpan<byte> names = reader.ReadBytes(prefix + "path");
            foreach (Range part in names.Split((byte)'/'))
            {
                ReadOnlySpan<byte> name = names[part];
                if (name.Length > 0)
                {
                    path = SharedPath.IsName(name) && path.Depth < SharedPath.MaxDepth
                        ? path.Child(name)
                        : throw new StateException($"{reader.Section}.{prefix}path: not a path");
                }
            }

            var fid = new Fid(path) { Access = (SharedAccess)reader.ReadBounded(prefix + "access", 31) };
            if (reader.ReadBoolean(prefix + "open"))
            {
                fid.IsOpen = true;
                if (_share.Open(path, fid.Access & ~SharedAccess.Truncate, out ISharedHandle? handle) == 0)
                {
                    fid.Handle = handle;
                }
            }

            _fids[reader.ReadUInt32(prefix + "number")] = fid;
        }
    }

    /// <inheritdoc/>
    protected override void Process(int queue, Virtqueue ring, VirtqueueChain chain)
    {
        ArgumentNullException.ThrowIfNull(ring);
        ArgumentNullException.ThrowIfNull(chain);
        Span<byte> header = stackalloc byte[HeaderBytes];
        if (!chain.TryRead(0, header) || chain.WritableBytes < HeaderBytes)
        {
            ring.Break(VirtqueueFault.BadRequest);
            ring.Push(chain, 0);
            return;
        }

        uint size = BinaryPrimitives.ReadUInt32LittleEndian(header);
        ushort tag = BinaryPrimitives.ReadUInt16LittleEndian(header[5..]);
        int limit = (int)Math.Min(_messageBytes, chain.WritableBytes);
        Grow(ref _request, (int)Math.Min(size, (uint)_messageBytes));
        Grow(ref _reply, Math.Max(limit, 64));
        var reply = new Writer(_reply.AsSpan(HeaderBytes, Math.Max(0, limit - HeaderBytes)));
        int error = ErrorInvalid;
        if (size >= HeaderBytes && size <= _messageBytes && chain.TryRead(0, _request.AsSpan(0, (int)size)))
        {
            var request = new Reader(_request.AsSpan(HeaderBytes, (int)size - HeaderBytes));
            error = Serve((Message)header[4], ref request, ref reply);
            if (error == 0 && reply.IsOverrun)
            {
                error = ErrorIo; // the guest's buffer is too small for the answer
            }

            if (request.IsBroken)
            {
                Interlocked.Increment(ref _malformed);
                error = ErrorInvalid;
            }
        }
        else
        {
            Interlocked.Increment(ref _malformed);
        }

        byte type = (byte)(header[4] + 1);
        if (error != 0)
        {
            type = (byte)Message.Error;
            reply = new Writer(_reply.AsSpan(HeaderBytes));
            reply.UInt32((uint)error);
        }

        int length = HeaderBytes + reply.Length;
        BinaryPrimitives.WriteInt32LittleEndian(_reply, length);
        _reply[4] = type;
        BinaryPrimitives.WriteUInt16LittleEndian(_reply.AsSpan(5), tag);
        length = (int)Math.Min(length, chain.WritableBytes);
        if (!chain.TryWrite(0, _reply.AsSpan(0, length)))
        {
            ring.Break(VirtqueueFault.BadAddress);
        }

        ring.Push(chain, (uint)length);
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            Clear();
            _share.Dispose();
        }

        base.Dispose(disposing);
    }

    private static void Grow(ref byte[] buffer, int length)
    {
        if (buffer.Length < length)
        {
            buffer = new byte[length];
        }
    }

    private static SharedAccess AccessOf(uint flags) => ((flags & 3) switch
    {
        0 => SharedAccess.Read,
        1 => SharedAccess.Write,
        _ => SharedAccess.Read | SharedAccess.Write,
    })
        | ((flags & 0x200) != 0 ? SharedAccess.Truncate : 0)
        | ((flags & 0x400) != 0 ? SharedAccess.Append : 0)
        | ((flags & 0x10000) != 0 ? SharedAccess.Directory : 0);

    private void Clear()
    {
        foreach (Fid fid in _fids.Values)
        {
            fid.Handle?.Dispose();
        }

        _fids.Clear();
        _messageBytes = DefaultMessageBytes;
    }

    private int Serve(Message type, ref Reader request, ref Writer reply)
    {
        switch (type)
        {
            case Message.Version:
                return Version(ref request, ref reply);
            case Message.Attach:
                return Attach(ref request, ref reply);
            case Message.Flush:
                return 0; // requests are served in order: what it names is done
            case Message.Walk:
                return Walk(ref request, ref reply);
            case Message.Clunk:
                return Clunk(ref request, remove: false);
            case Message.Remove:
                return Clunk(ref request, remove: true);
            case Message.Open:
                return Open(ref request, ref reply);
            case Message.Create:
                return Create(ref request, ref reply);
            case Message.Read:
                return Read(ref request, ref reply);
            case Message.Write:
                return Write(ref request, ref reply);
            case Message.ReadDirectory:
                return ReadDirectory(ref request, ref reply);
            case Message.GetAttributes:
                return GetAttributes(ref request, ref reply);
            case Message.SetAttributes:
                return SetAttributes(ref request);
            case Message.MakeDirectory:
                return MakeDirectory(ref request, ref reply);
            case Message.Symlink:
                return Symlink(ref request, ref reply);
            case Message.ReadLink:
                return ReadLink(ref request, ref reply);
            case Message.Link:
                return Link(ref request);
            case Message.Rename:
                return Rename(ref request);
            case Message.RenameAt:
                return RenameAt(ref request);
            case Message.UnlinkAt:
                return UnlinkAt(ref request);
            case Message.Sync:
                return Sync(ref request);
            case Message.StatFs:
                return StatFs(ref request, ref reply);
            case Message.Lock:
                reply.Byte(0); // P9_LOCK_SUCCESS: nobody else is here
                return 0;
            case Message.GetLock:
                return GetLock(ref request, ref reply);
            case Message.MakeNode:
                return ErrorPermission; // no device files
            case Message.Authenticate:
            case Message.XattrWalk:
            case Message.XattrCreate:
            default:
                return ErrorNotSupported;
        }
    }

    private int Find(ref Reader request, out Fid fid)
    {
        if (_fids.TryGetValue(request.UInt32(), out Fid? found))
        {
            fid = found;
            return 0;
        }

        fid = null!;
        return ErrorBadFid;
    }

    private int FindOpen(ref Reader request, out ISharedHandle handle, out Fid fid)
    {
        handle = null!;
        int error = Find(ref request, out fid);
        if (error != 0)
        {
            return error;
        }

        handle = fid.Handle!;
        return fid.Handle is not null ? 0 : fid.IsOpen ? ErrorStale : ErrorBadFid;
    }

    // A name in the directory of a fid; the name must be read whatever the fid is.
    private static int Child(Fid parent, ReadOnlySpan<byte> name, out SharedPath path)
    {
        path = parent.Path;
        if (!SharedPath.IsName(name) || parent.Path.Depth >= SharedPath.MaxDepth)
        {
            return name.Length > SharedPath.MaxNameBytes ? ErrorNameTooLong : ErrorInvalid;
        }

        path = parent.Path.Child(name);
        return 0;
    }

    private static void PutQid(ref Writer reply, in SharedStat stat)
    {
        byte type = (stat.Mode & ModeTypeMask) switch
        {
            ModeDirectory => 0x80,
            ModeLink => 0x02,
            _ => 0,
        };
        reply.Byte(type);
        reply.UInt32((uint)(stat.Modified.Nanoseconds ^ (stat.Modified.Seconds << 20) ^ (long)stat.SizeBytes));

        // Files of several file systems under one share: their numbers must not meet.
        reply.UInt64(stat.Inode ^ (stat.FileSystem << 48));
    }

    private int Version(ref Reader request, ref Writer reply)
    {
        uint wanted = request.UInt32();
        ReadOnlySpan<byte> name = request.Bytes();
        if (request.IsBroken || wanted < MinMessageBytes)
        {
            return ErrorInvalid;
        }

        Clear(); // a new session
        bool known = name.SequenceEqual("9P2000.L"u8);
        _messageBytes = (int)Math.Min(wanted, MaxMessageBytes);
        reply.UInt32((uint)_messageBytes);
        reply.Bytes(known ? "9P2000.L"u8 : "unknown"u8);
        return 0;
    }

    private int Attach(ref Reader request, ref Writer reply)
    {
        uint number = request.UInt32();
        request.UInt32();
        request.Bytes();
        request.Bytes();
        if (request.IsBroken || _fids.ContainsKey(number) || number == NoFid || _fids.Count >= MaxFids)
        {
            return ErrorInvalid;
        }

        int error = _share.Stat(SharedPath.Root, out SharedStat stat);
        if (error == 0)
        {
            _fids.Add(number, new Fid(SharedPath.Root));
            PutQid(ref reply, stat);
        }

        return error;
    }

    private int Walk(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        uint number = request.UInt32();
        int names = request.UInt16();
        if (error != 0 || names > MaxWalk)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        bool replaces = _fids.TryGetValue(number, out Fid? old);
        if ((replaces && old != fid) || number == NoFid || (!replaces && _fids.Count >= MaxFids)
            || (replaces && fid.IsOpen))
        {
            return _fids.Count >= MaxFids ? ErrorTooManyFiles : ErrorInvalid;
        }

        SharedPath path = fid.Path;
        int at = reply.Length;
        reply.UInt16(0);
        int walked = 0;
        for (; walked < names && error == 0; walked++)
        {
            ReadOnlySpan<byte> name = request.Bytes();
            if (name.SequenceEqual(".."u8))
            {
                path = path.Parent ?? SharedPath.Root; // the root is its own parent
            }
            else if (!name.SequenceEqual("."u8))
            {
                if (!SharedPath.IsName(name) || path.Depth >= SharedPath.MaxDepth)
                {
                    error = name.Length > SharedPath.MaxNameBytes ? ErrorNameTooLong : ErrorInvalid;
                    break;
                }

                path = path.Child(name);
            }

            error = _share.Stat(path, out SharedStat stat);
            if (error != 0)
            {
                break;
            }

            PutQid(ref reply, stat);
        }

        if (request.IsBroken)
        {
            return ErrorInvalid;
        }

        // The first name decides about an error; later ones end the walk (walk(5)).
        if (walked == 0 && error != 0)
        {
            return error;
        }

        reply.SetUInt16(at, (ushort)walked);
        if (walked == names)
        {
            _fids[number] = new Fid(path);
        }

        return 0;
    }

    private int Clunk(ref Reader request, bool remove)
    {
        uint number = request.UInt32();
        if (!_fids.Remove(number, out Fid? fid))
        {
            return ErrorBadFid;
        }

        fid.Handle?.Dispose();
        if (!remove)
        {
            return 0;
        }

        int error = _share.Stat(fid.Path, out SharedStat stat);
        return error != 0 ? error : _share.Remove(fid.Path, (stat.Mode & ModeTypeMask) == ModeDirectory);
    }

    private int Open(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        SharedAccess access = AccessOf(request.UInt32());
        if (error != 0 || fid.IsOpen || request.IsBroken)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        error = _share.Open(fid.Path, access, out ISharedHandle? handle);
        return error != 0 ? error : Opened(fid, handle!, access, ref reply);
    }

    private static int Opened(Fid fid, ISharedHandle handle, SharedAccess access, ref Writer reply)
    {
        int error = handle.Stat(out SharedStat stat);
        if (error != 0)
        {
            handle.Dispose();
            return error;
        }

        fid.Handle = handle;
        fid.IsOpen = true;
        fid.Access = access;
        PutQid(ref reply, stat);
        reply.UInt32(0); // iounit: as large as a message
        return 0;
    }

    private int Create(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        ReadOnlySpan<byte> name = request.Bytes();
        uint flags = request.UInt32();
        uint mode = request.UInt32();
        request.UInt32();
        if (error != 0 || request.IsBroken || fid.IsOpen)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        error = Child(fid, name, out SharedPath path);
        if (error != 0)
        {
            return error;
        }

        SharedAccess access = AccessOf(flags);
        error = _share.Create(path, access, (flags & 0x80) != 0, mode, out ISharedHandle? handle);
        if (error != 0)
        {
            return error;
        }

        fid.Path = path; // the fid becomes the new file
        return Opened(fid, handle!, access, ref reply);
    }

    private int Read(ref Reader request, ref Writer reply)
    {
        int error = FindOpen(ref request, out ISharedHandle handle, out _);
        ulong offset = request.UInt64();
        uint count = request.UInt32();
        if (error != 0 || request.IsBroken || offset > long.MaxValue - MaxMessageBytes)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        Span<byte> room = reply.Reserve(4);
        Span<byte> data = reply.Rest((int)Math.Min(count, int.MaxValue));
        error = handle.Read((long)offset, data, out int read);
        if (error == 0 && room.Length == 4)
        {
            BinaryPrimitives.WriteInt32LittleEndian(room, read);
            reply.Skip(read);
        }

        return error;
    }

    private int Write(ref Reader request, ref Writer reply)
    {
        int error = FindOpen(ref request, out ISharedHandle handle, out _);
        ulong offset = request.UInt64();
        uint count = request.UInt32();
        ReadOnlySpan<byte> data = request.Rest(count);
        if (error != 0 || request.IsBroken || offset > long.MaxValue - MaxMessageBytes)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        error = handle.Write((long)offset, data, out int written);
        reply.UInt32((uint)written);
        return error;
    }

    private int ReadDirectory(ref Reader request, ref Writer reply)
    {
        int error = FindOpen(ref request, out ISharedHandle handle, out Fid fid);
        ulong offset = request.UInt64();
        int most = (int)Math.Min(request.UInt32(), int.MaxValue);
        if (error != 0 || request.IsBroken)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        // The listing is taken when reading starts, so that offsets stay true while files come and go.
        if (offset == 0 || fid.Entries is null)
        {
            error = handle.List(out IReadOnlyList<SharedEntry> entries);
            if (error != 0)
            {
                return error;
            }

            fid.Entries = entries;
        }

        int at = reply.Length;
        reply.UInt32(0);
        most = Math.Min(most, reply.Free);
        int start = reply.Length;
        for (ulong i = offset; i < (ulong)fid.Entries.Count + 2; i++)
        {
            (byte[] name, ulong inode, byte type) = i switch
            {
                0 => ("."u8.ToArray(), 0UL, (byte)4),
                1 => (".."u8.ToArray(), 0UL, (byte)4),
                _ => (fid.Entries[(int)i - 2].Name, fid.Entries[(int)i - 2].Inode, fid.Entries[(int)i - 2].Type),
            };
            if (reply.Length - start + 24 + name.Length > most)
            {
                break;
            }

            reply.Byte(type == 4 ? (byte)0x80 : type == 10 ? (byte)2 : (byte)0);
            reply.UInt32(0);
            reply.UInt64(inode);
            reply.UInt64(i + 1);
            reply.Byte(type);
            reply.Bytes(name);
        }

        reply.SetUInt32(at, (uint)(reply.Length - start));
        return 0;
    }

    private int GetAttributes(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        request.UInt64();
        if (error != 0)
        {
            return error;
        }

        error = fid.Handle is { } handle ? handle.Stat(out SharedStat stat) : _share.Stat(fid.Path, out stat);
        if (error != 0)
        {
            return error;
        }

        reply.UInt64(0x7FF); // P9_GETATTR_BASIC
        PutQid(ref reply, stat);
        reply.UInt32(stat.Mode);
        reply.UInt32(stat.Uid);
        reply.UInt32(stat.Gid);
        reply.UInt64(stat.Links);
        reply.UInt64(stat.Device);
        reply.UInt64(stat.SizeBytes);
        reply.UInt64(stat.BlockBytes);
        reply.UInt64(stat.Blocks);
        foreach ((long seconds, long nanoseconds) in (ReadOnlySpan<(long, long)>)[stat.Accessed, stat.Modified, stat.Changed])
        {
            reply.UInt64((ulong)seconds);
            reply.UInt64((ulong)nanoseconds);
        }

        reply.UInt64(0);
        reply.UInt64(0);
        reply.UInt64(0);
        reply.UInt64(0);
        return 0;
    }

    private int SetAttributes(ref Reader request)
    {
        int error = Find(ref request, out Fid fid);
        uint valid = request.UInt32();
        uint mode = request.UInt32();
        uint uid = request.UInt32();
        uint gid = request.UInt32();
        ulong size = request.UInt64();
        var accessed = ((long)request.UInt64(), (long)request.UInt64());
        var modified = ((long)request.UInt64(), (long)request.UInt64());
        if (error != 0 || request.IsBroken)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        bool Has(uint bit) => (valid & bit) != 0;
        var change = new SharedChange
        {
            Mode = Has(1) ? mode : null,
            Uid = Has(2) ? uid : null,
            Gid = Has(4) ? gid : null,
            SizeBytes = Has(8) ? size : null,
            Accessed = Has(0x10) ? (Has(0x80) ? accessed : (0, -1)) : null,
            Modified = Has(0x20) ? (Has(0x100) ? modified : (0, -1)) : null,
        };
        return _share.Change(fid.Path, change);
    }

    private int MakeDirectory(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        ReadOnlySpan<byte> name = request.Bytes();
        uint mode = request.UInt32();
        request.UInt32();
        if (error != 0 || request.IsBroken || (error = Child(fid, name, out SharedPath path)) != 0)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        error = _share.MakeDirectory(path, mode);
        return error != 0 ? error : PutMade(path, ref reply);
    }

    private int Symlink(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        ReadOnlySpan<byte> name = request.Bytes();
        ReadOnlySpan<byte> target = request.Bytes();
        request.UInt32();
        if (error != 0 || request.IsBroken || (error = Child(fid, name, out SharedPath path)) != 0)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        error = _share.MakeSymbolicLink(path, target);
        return error != 0 ? error : PutMade(path, ref reply);
    }

    private int PutMade(SharedPath path, ref Writer reply)
    {
        int error = _share.Stat(path, out SharedStat stat);
        if (error == 0)
        {
            PutQid(ref reply, stat);
        }

        return error;
    }

    private int ReadLink(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        if (error != 0)
        {
            return error;
        }

        Span<byte> target = stackalloc byte[4096];
        error = _share.ReadLink(fid.Path, target, out int length);
        if (error == 0)
        {
            reply.Bytes(target[..length]);
        }

        return error;
    }

    private int Link(ref Reader request)
    {
        int error = Find(ref request, out Fid directory);
        if (error != 0 || (error = Find(ref request, out Fid existing)) != 0)
        {
            return error;
        }

        ReadOnlySpan<byte> name = request.Bytes();
        error = request.IsBroken ? ErrorInvalid : Child(directory, name, out _);
        return error != 0 ? error : _share.MakeHardLink(existing.Path, directory.Path.Child(name));
    }

    private int Rename(ref Reader request)
    {
        int error = Find(ref request, out Fid fid);
        if (error != 0 || (error = Find(ref request, out Fid directory)) != 0)
        {
            return error;
        }

        ReadOnlySpan<byte> name = request.Bytes();
        error = request.IsBroken ? ErrorInvalid : Child(directory, name, out _);
        return error != 0 ? error : Move(fid.Path, directory.Path.Child(name));
    }

    private int RenameAt(ref Reader request)
    {
        int error = Find(ref request, out Fid oldDirectory);
        ReadOnlySpan<byte> oldName = request.Bytes();
        if (error != 0 || (error = Find(ref request, out Fid newDirectory)) != 0)
        {
            return error;
        }

        ReadOnlySpan<byte> newName = request.Bytes();
        if (request.IsBroken)
        {
            return ErrorInvalid;
        }

        error = Child(oldDirectory, oldName, out SharedPath from);
        if (error == 0)
        {
            error = Child(newDirectory, newName, out _);
        }

        return error != 0 ? error : Move(from, newDirectory.Path.Child(newName));
    }

    private int Move(SharedPath from, SharedPath to)
    {
        int error = _share.Rename(from, to);
        if (error == 0)
        {
            foreach (Fid fid in _fids.Values)
            {
                fid.Path = fid.Path.Moved(from, to);
            }
        }

        return error;
    }

    private int UnlinkAt(ref Reader request)
    {
        int error = Find(ref request, out Fid directory);
        ReadOnlySpan<byte> name = request.Bytes();
        uint flags = request.UInt32();
        if (error != 0 || request.IsBroken || (error = Child(directory, name, out SharedPath path)) != 0)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        return _share.Remove(path, (flags & 0x200) != 0);
    }

    private int Sync(ref Reader request)
    {
        int error = FindOpen(ref request, out ISharedHandle handle, out _);
        return error != 0 ? error : handle.Sync(request.UInt32() != 0);
    }

    private int StatFs(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out Fid fid);
        if (error != 0 || (error = _share.Space(fid.Path, out SharedSpace space)) != 0)
        {
            return error;
        }

        reply.UInt32(0x0102_1997); // V9FS_MAGIC
        reply.UInt32((uint)space.BlockBytes);
        reply.UInt64(space.Blocks);
        reply.UInt64(space.FreeBlocks);
        reply.UInt64(space.AvailableBlocks);
        reply.UInt64(space.Files);
        reply.UInt64(space.FreeFiles);
        reply.UInt64(0);
        reply.UInt32(SharedPath.MaxNameBytes);
        return 0;
    }

    private int GetLock(ref Reader request, ref Writer reply)
    {
        int error = Find(ref request, out _);
        request.Byte();
        ulong start = request.UInt64();
        ulong length = request.UInt64();
        uint process = request.UInt32();
        ReadOnlySpan<byte> client = request.Bytes();
        if (error != 0 || request.IsBroken)
        {
            return error != 0 ? error : ErrorInvalid;
        }

        reply.Byte(2); // P9_LOCK_TYPE_UNLCK
        reply.UInt64(start);
        reply.UInt64(length);
        reply.UInt32(process);
        reply.Bytes(client);
        return 0;
    }

    private sealed class Fid(SharedPath path)
    {
        public SharedPath Path { get; set; } = path;

        public bool IsOpen { get; set; }

        public SharedAccess Access { get; set; }

        public ISharedHandle? Handle { get; set; }

        public IReadOnlyList<SharedEntry>? Entries { get; set; }
    }

    /// <summary>Reads a message; beyond its end everything is 0 and <see cref="IsBroken"/>.</summary>
    private ref struct Reader
    {
        private ReadOnlySpan<byte> _rest;

        public Reader(ReadOnlySpan<byte> message)
        {
            _rest = message;
            IsBroken = false;
        }

        public bool IsBroken { get; private set; }

        public byte Byte() => Take(1) is [byte value] ? value : (byte)0;

        public ushort UInt16() => Take(2) is { Length: 2 } bytes ? BinaryPrimitives.ReadUInt16LittleEndian(bytes) : (ushort)0;

        public uint UInt32() => Take(4) is { Length: 4 } bytes ? BinaryPrimitives.ReadUInt32LittleEndian(bytes) : 0;

        public ulong UInt64() => Take(8) is { Length: 8 } bytes ? BinaryPrimitives.ReadUInt64LittleEndian(bytes) : 0;

        public ReadOnlySpan<byte> Bytes() => Take(UInt16());

        public ReadOnlySpan<byte> Rest(uint count) => Take(count);

        private ReadOnlySpan<byte> Take(uint count)
        {
            if (count > _rest.Length)
            {
                IsBroken = true;
                _rest = default;
                return default;
            }

            ReadOnlySpan<byte> taken = _rest[..(int)count];
            _rest = _rest[(int)count..];
            return taken;
        }
    }

    /// <summary>Writes a message; what does not fit is counted as overrun.</summary>
    private ref struct Writer
    {
        private readonly Span<byte> _into;

        public Writer(Span<byte> into)
        {
            _into = into;
            Length = 0;
            IsOverrun = false;
        }

        public int Length { get; private set; }

        public bool IsOverrun { get; private set; }

        public readonly int Free => _into.Length - Length;

        public void Byte(byte value)
        {
            if (Reserve(1) is { Length: 1 } at)
            {
                at[0] = value;
            }
        }

        public void UInt16(ushort value)
        {
            if (Reserve(2) is { Length: 2 } at)
            {
                BinaryPrimitives.WriteUInt16LittleEndian(at, value);
            }
        }

        public void UInt32(uint value)
        {
            if (Reserve(4) is { Length: 4 } at)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(at, value);
            }
        }

        public void UInt64(ulong value)
        {
            if (Reserve(8) is { Length: 8 } at)
            {
                BinaryPrimitives.WriteUInt64LittleEndian(at, value);
            }
        }

        public void Bytes(scoped ReadOnlySpan<byte> value)
        {
            UInt16((ushort)value.Length);
            Span<byte> at = Reserve(value.Length);
            if (at.Length == value.Length)
            {
                value.CopyTo(at);
            }
        }

        public readonly void SetUInt16(int at, ushort value)
        {
            if (at + 2 <= _into.Length)
            {
                BinaryPrimitives.WriteUInt16LittleEndian(_into[at..], value);
            }
        }

        public readonly void SetUInt32(int at, uint value)
        {
            if (at + 4 <= _into.Length)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(_into[at..], value);
            }
        }

        public Span<byte> Reserve(int count)
        {
            if (count > Free)
            {
                IsOverrun = true;
                return default;
            }

            Span<byte> at = _into.Slice(Length, count);
            Length += count;
            return at;
        }

        public readonly Span<byte> Rest(int most) => _into.Slice(Length, Math.Min(most, Free));

        public void Skip(int count) => Length += count;
    }
}
