// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Core;

namespace Vmm.TestKit;

/// <summary>Records what a chip drives.</summary>
public sealed class FakeIrqLine : IIrqLine
{
    /// <summary>The present level.</summary>
    public bool Level { get; private set; }

    /// <summary>How often it went from low to high.</summary>
    public int Rises { get; private set; }

    public void Set(bool asserted)
    {
        if (asserted && !Level)
        {
            Rises++;
        }

        Level = asserted;
    }

    /// <summary>Makes a set of lines.</summary>
    public static FakeIrqLine[] Many(int count)
    {
        var lines = new FakeIrqLine[count];
        for (int i = 0; i < count; i++)
        {
            lines[i] = new FakeIrqLine();
        }

        return lines;
    }
}

/// <summary>Records messages.</summary>
public sealed class FakeMsiSink : IMsiSink
{
    private readonly Lock _gate = new();
    private readonly List<(ulong Address, uint Data)> _messages = [];

    /// <summary>All messages so far (a copy).</summary>
    public IReadOnlyList<(ulong Address, uint Data)> Messages
    {
        get
        {
            lock (_gate)
            {
                return _messages.ToArray();
            }
        }
    }

    public void Send(ulong address, uint data)
    {
        lock (_gate)
        {
            _messages.Add((address, data));
        }
    }

    public void Clear()
    {
        lock (_gate)
        {
            _messages.Clear();
        }
    }
}

/// <summary>RAM from guest address 0 on, pinned so that slices have an address.</summary>
public sealed class TestRam : IDmaPort
{
    private readonly byte[] _bytes;
    private readonly nint _base;

    public TestRam(int lengthBytes)
    {
        _bytes = GC.AllocateArray<byte>(lengthBytes, pinned: true);
        _base = Marshal.UnsafeAddrOfPinnedArrayElement(_bytes, 0);
    }

    /// <summary>Everything.</summary>
    public Span<byte> Bytes => _bytes;

    /// <summary>Ranges reported by <see cref="MarkWritten"/>.</summary>
    public List<(ulong Address, int LengthBytes)> Marked { get; } = [];

    public bool TryRead(ulong address, Span<byte> into)
    {
        if (!Contains(address, into.Length))
        {
            return false;
        }

        _bytes.AsSpan((int)address, into.Length).CopyTo(into);
        return true;
    }

    public bool TryWrite(ulong address, ReadOnlySpan<byte> from)
    {
        if (!Contains(address, from.Length))
        {
            return false;
        }

        from.CopyTo(_bytes.AsSpan((int)address));
        return true;
    }

    public bool TryGetSlice(ulong address, int lengthBytes, bool forWrite, out GuestSlice slice)
    {
        slice = default;
        if (address >= (ulong)_bytes.Length || lengthBytes <= 0)
        {
            return false;
        }

        int length = (int)Math.Min((ulong)lengthBytes, (ulong)_bytes.Length - address);
        slice = new GuestSlice(_base + (nint)address, length);
        return true;
    }

    public void MarkWritten(ulong address, int lengthBytes)
    {
        lock (Marked)
        {
            Marked.Add((address, lengthBytes));
        }
    }

    /// <summary>Reads a little-endian number.</summary>
    public ulong ReadNumber(ulong address, int lengthBytes)
    {
        ulong value = 0;
        for (int i = lengthBytes - 1; i >= 0; i--)
        {
            value = (value << 8) | _bytes[(int)address + i];
        }

        return value;
    }

    /// <summary>Writes a little-endian number.</summary>
    public void WriteNumber(ulong address, int lengthBytes, ulong value)
    {
        for (int i = 0; i < lengthBytes; i++)
        {
            _bytes[(int)address + i] = (byte)(value >> (8 * i));
        }
    }

    private bool Contains(ulong address, int length) =>
        address <= (ulong)_bytes.Length && (ulong)length <= (ulong)_bytes.Length - address;
}

/// <summary>Collects output and lets a test type input.</summary>
public sealed class FakeCharBackend : ICharBackend
{
    private readonly List<byte> _output = [];
    private ICharReceiver? _receiver;

    /// <summary>Bytes that the guest sent.</summary>
    public byte[] Output
    {
        get
        {
            lock (_output)
            {
                return _output.ToArray();
            }
        }
    }

    /// <summary>How often the receiver said that it has room again.</summary>
    public int Resumed { get; private set; }

    public void Write(ReadOnlySpan<byte> bytes)
    {
        lock (_output)
        {
            foreach (byte b in bytes)
            {
                _output.Add(b);
            }
        }
    }

    public void Attach(ICharReceiver receiver) => _receiver = receiver;

    public void ResumeInput() => Resumed++;

    /// <summary>Gives input to the device, as much as it takes.</summary>
    /// <returns>How many bytes it took.</returns>
    public int Type(params byte[] bytes)
    {
        int take = Math.Min(bytes.Length, _receiver?.RoomBytes ?? 0);
        _receiver?.Receive(bytes.AsSpan(0, take));
        return take;
    }

    public void Dispose()
    {
    }
}

/// <summary>Checks that belong to every device.</summary>
public static class DeviceCheck
{
    /// <summary>Saves one device and loads the state into another of the same make.</summary>
    public static void Copy(IDevice from, IDevice to)
    {
        var writer = new StateWriter(from.Id);
        from.Save(writer);
        to.Load(new StateReader(to.Id, writer.ToArray()), from.StateVersion);
    }

    /// <summary>The state as bytes, for comparing.</summary>
    public static byte[] StateOf(IDevice device)
    {
        var writer = new StateWriter(device.Id);
        device.Save(writer);
        return writer.ToArray();
    }

    /// <summary>Random reads and writes of all widths over a window; returns when it has survived them.</summary>
    public static void Fuzz(IRegisterWindow window, int seed, int count, Action<Random>? between = null)
    {
        var random = new Random(seed);
        AccessWidth[] widths = [AccessWidth.Byte, AccessWidth.Word, AccessWidth.Dword, AccessWidth.Qword];
        for (int i = 0; i < count; i++)
        {
            AccessWidth width = widths[random.Next(4)];
            if ((uint)width > window.Length)
            {
                continue;
            }

            uint offset = (uint)random.NextInt64(window.Length - (uint)width + 1);
            ulong value = (ulong)random.NextInt64() & (width == AccessWidth.Qword ? ~0UL : (1UL << (8 * (int)width)) - 1);
            if (random.Next(2) == 0)
            {
                window.Write(offset, width, value);
            }
            else
            {
                ulong read = window.Read(offset, width);
                if (width != AccessWidth.Qword && read >> (8 * (int)width) != 0)
                {
                    throw new InvalidOperationException($"read of {width} at {offset:x} gave {read:x}");
                }
            }

            between?.Invoke(random);
        }
    }
}
