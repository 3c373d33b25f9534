// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using Vmm.Memory;

namespace Vmm.Machine.Boot;

/// <summary>
/// A kernel or initrd on the host, opened once. Every read is bounded; a file that shrinks while it is read ends in a
/// <see cref="BootException"/>. Nothing is kept in memory but what a caller asks for.
/// </summary>
internal sealed class BootFile : IDisposable
{
    private readonly FileStream _stream;

    private BootFile(string path, FileStream stream)
    {
        Path = path;
        _stream = stream;
        LengthBytes = stream.Length;
    }

    /// <summary>As the user named it.</summary>
    public string Path { get; }

    /// <summary>Size when opened.</summary>
    public long LengthBytes { get; }

    /// <summary>Opens a regular file.</summary>
    /// <exception cref="BootException">Missing, unreadable, empty, or not a regular file.</exception>
    public static BootFile Open(string path, string what)
    {
        try
        {
            if (Directory.Exists(path))
            {
                throw new BootException($"{what} {path}: is a directory, not a file", isMissingInput: true);
            }

            var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1);
            if (!stream.CanSeek || stream.Length == 0)
            {
                stream.Dispose();
                throw new BootException($"{what} {path}: is empty or not a regular file");
            }

            return new BootFile(path, stream);
        }
        catch (FileNotFoundException)
        {
            throw new BootException($"{what} {path}: no such file", isMissingInput: true);
        }
        catch (DirectoryNotFoundException)
        {
            throw new BootException($"{what} {path}: no such file", isMissingInput: true);
        }
        catch (UnauthorizedAccessException)
        {
            throw new BootException($"{what} {path}: permission denied", isMissingInput: true);
        }
        catch (IOException e)
        {
            throw new BootException($"{what} {path}: {e.Message}", isMissingInput: true);
        }
    }

    /// <summary>Reads up to <paramref name="maxBytes"/> from the start.</summary>
    public byte[] ReadHead(int maxBytes)
    {
        var head = new byte[(int)Math.Min(maxBytes, LengthBytes)];
        Read(0, head);
        return head;
    }

    /// <summary>Reads exactly the span.</summary>
    /// <exception cref="BootException">The file ends before.</exception>
    public void Read(long offset, Span<byte> into)
    {
        try
        {
            _stream.Position = offset;
            _stream.ReadExactly(into);
        }
        catch (EndOfStreamException)
        {
            throw Truncated();
        }
        catch (IOException e)
        {
            throw new BootException($"{Path}: {e.Message}", isMissingInput: true);
        }
    }

    /// <summary>Copies a part of the file into guest memory.</summary>
    /// <exception cref="BootException">The part lies outside the file or the memory.</exception>
    public void CopyTo(GuestMemory memory, long offset, long lengthBytes, ulong guestAddress)
    {
        if (offset < 0 || lengthBytes < 0 || offset > LengthBytes || lengthBytes > LengthBytes - offset)
        {
            throw Truncated();
        }

        var buffer = new byte[1 << 20];
        while (lengthBytes > 0)
        {
            Span<byte> part = buffer.AsSpan(0, (int)Math.Min(buffer.Length, lengthBytes));
            Read(offset, part);
            if (!memory.TryWrite(guestAddress, part))
            {
                throw new BootException($"{Path}: does not fit into the guest's memory; give the VM more with memory:");
            }

            offset += part.Length;
            lengthBytes -= part.Length;
            guestAddress += (uint)part.Length;
        }
    }

    /// <summary>The file ends before its own header says.</summary>
    public BootException Truncated() => new($"{Path}: is truncated");

    /// <inheritdoc/>
    public void Dispose() => _stream.Dispose();
}
