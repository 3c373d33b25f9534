// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.InteropServices;
using Vmm.Memory;

namespace Vmm.TestKit;

/// <summary>Zeroed memory of this process for a <see cref="RamBlock"/>.</summary>
public sealed class HeapBuffer : SafeBuffer
{
    public HeapBuffer(int lengthBytes)
        : base(ownsHandle: true)
    {
        SetHandle(Marshal.AllocHGlobal(lengthBytes));
        Initialize((ulong)lengthBytes);
        var zeroes = new byte[4096];
        for (int at = 0; at < lengthBytes; at += zeroes.Length)
        {
            Marshal.Copy(zeroes, 0, handle + at, int.Min(zeroes.Length, lengthBytes - at));
        }
    }

    /// <summary>Makes a block of RAM.</summary>
    public static RamBlock MakeBlock(string name, int lengthBytes) => new(name, new HeapBuffer(lengthBytes), (ulong)lengthBytes);

    protected override bool ReleaseHandle()
    {
        Marshal.FreeHGlobal(handle);
        return true;
    }
}
