// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.IO;
using System.Threading;
using Microsoft.Win32.SafeHandles;

namespace Vmm.Backends.Char;

/// <summary>
/// The last bytes that a guest wrote, in memory and in a file that outlives the process. The file is a ring: 16 bytes of
/// header ("VMMLOG1\n" and the count of all bytes ever written, little-endian), then the ring itself, in which byte n of
/// the stream stands at n modulo its size. The count is written after the data, so that a reader of a log whose writer
/// was killed sees at most a stale end.
/// </summary>
public sealed class CharLog : IDisposable
{
    /// <summary>Bytes kept.</summary>
    public const int DefaultBytes = 1 << 20;

    private const int HeaderBytes = 16;
    private readonly Lock _gate = new();
    private readonly byte[] _ring;
    private readonly SafeFileHandle? _file;
    private readonly CharOutput? _output;
    private long _total;
    private long _filed;

    /// <summary>Opens a log; an existing one is continued.</summary>
    /// <param name="path">The file, or null for memory only.</param>
    /// <param name="sizeBytes">Bytes kept; an existing file of another size is started anew.</param>
    /// <exception cref="IOException">The file cannot be opened.</exception>
    public CharLog(string? path, int sizeBytes = DefaultBytes)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(sizeBytes, 16);
        _ring = new byte[sizeBytes];
        if (path is null)
        {
            return;
        }

        _file = File.OpenHandle(path, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.ReadWrite | FileShare.Delete);
        if (RandomAccess.GetLength(_file) == HeaderBytes + sizeBytes && TryReadTotal(_file, out _total))
        {
            _ = RandomAccess.Read(_file, _ring, HeaderBytes);
        }
        else
        {
            RandomAccess.SetLength(_file, 0);
            RandomAccess.SetLength(_file, HeaderBytes + sizeBytes);
            WriteTotal(0);
        }

        _filed = _total;
        _output = new CharOutput("log", 1 << 18, Put);
    }

    /// <summary>Count of all bytes ever written.</summary>
    public long TotalBytes
    {
        get
        {
            lock (_gate)
            {
                return _total;
            }
        }
    }

    /// <summary>Appends. Never blocks.</summary>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        lock (_gate)
        {
            Place(_ring, _total, bytes);
            _total += bytes.Length;
        }

        _output?.Write(bytes);
    }

    /// <summary>The newest bytes.</summary>
    /// <param name="maximumBytes">At most so many.</param>
    public byte[] Tail(int maximumBytes = int.MaxValue)
    {
        lock (_gate)
        {
            return Take(_ring, _total, maximumBytes);
        }
    }

    /// <summary>Reads a log file of a machine that may be running or gone.</summary>
    /// <exception cref="IOException">There is none, or it is no log.</exception>
    public static byte[] Read(string path, int maximumBytes = int.MaxValue)
    {
        using SafeFileHandle file = File.OpenHandle(
            path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete);
        long length = RandomAccess.GetLength(file);
        if (length is < HeaderBytes + 16 or > HeaderBytes + (64 << 20) || !TryReadTotal(file, out long total))
        {
            throw new IOException($"{path}: is not a console log");
        }

        byte[] ring = new byte[length - HeaderBytes];
        int got = RandomAccess.Read(file, ring, HeaderBytes);
        ring.AsSpan(got).Clear();
        return Take(ring, total, maximumBytes);
    }

    /// <summary>Writes what is queued and closes the file.</summary>
    public void Dispose()
    {
        _output?.Dispose();
        _file?.Dispose();
    }

    private static void Place(byte[] ring, long at, ReadOnlySpan<byte> bytes)
    {
        if (bytes.Length > ring.Length)
        {
            at += bytes.Length - ring.Length;
            bytes = bytes[^ring.Length..];
        }

        int start = (int)(at % ring.Length);
        int first = Math.Min(bytes.Length, ring.Length - start);
        bytes[..first].CopyTo(ring.AsSpan(start));
        bytes[first..].CopyTo(ring);
    }

    private static byte[] Take(byte[] ring, long total, int maximumBytes)
    {
        int length = (int)Math.Min(Math.Min(total, ring.Length), maximumBytes);
        byte[] result = new byte[length];
        int start = (int)((total - length) % ring.Length);
        int first = Math.Min(length, ring.Length - start);
        ring.AsSpan(start, first).CopyTo(result);
        ring.AsSpan(0, length - first).CopyTo(result.AsSpan(first));
        return result;
    }

    private static bool TryReadTotal(SafeFileHandle file, out long total)
    {
        byte[] header = new byte[HeaderBytes];
        total = 0;
        if (RandomAccess.Read(file, header, 0) != HeaderBytes || !header.AsSpan(0, 8).SequenceEqual("VMMLOG1\n"u8))
        {
            return false;
        }

        total = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(8));
        return total >= 0;
    }

    private void WriteTotal(long total)
    {
        byte[] header = new byte[HeaderBytes];
        "VMMLOG1\n"u8.CopyTo(header);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(8), total);
        RandomAccess.Write(_file!, header, 0);
    }

    // On the writer's thread. Bytes that the queue dropped make the file's count fall behind; both are whole streams.
    private void Put(ReadOnlySpan<byte> bytes)
    {
        try
        {
            for (ReadOnlySpan<byte> left = bytes; !left.IsEmpty;)
            {
                int start = (int)(_filed % _ring.Length);
                int part = Math.Min(left.Length, _ring.Length - start);
                RandomAccess.Write(_file!, left[..part], HeaderBytes + start);
                _filed += part;
                left = left[part..];
            }

            WriteTotal(_filed);
        }
        catch (IOException)
        {
            // A full disk costs the log, not the machine; the ring in memory stays.
        }
    }
}
