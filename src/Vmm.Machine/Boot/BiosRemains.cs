// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Machine.Boot;

/// <summary>
/// What a PC's BIOS leaves behind and a multiboot kernel may still use when it enters real mode (Multiboot 0.6.96 §3.2,
/// "the OS image must leave interrupts disabled until it sets up its own"; vectors by IBM's PC/AT Technical Reference): an
/// interrupt vector table whose entries return, the 8259 pair at vectors 0x08 and 0x70 with only the timer and the cascade
/// unmasked, and the 8254's channel 0 at 18.2 Hz. Linux and PVH kernels bring their own and do not ask for it.
/// </summary>
internal static class BiosRemains
{
    private const ushort StubSegment = 0x50;
    private const int MasterStub = 1;
    private const int SlaveStub = 9;
    private const int MasterVector = 0x08;
    private const int SlaveVector = 0x70;

    // 0: iret; 1: end of interrupt to the master, iret; 9: to both, iret.
    private static readonly byte[] s_stubs =
    [
        0xCF, // iret
        0x50, 0xB0, 0x20, 0xE6, 0x20, 0x58, 0xCF, 0x90, // push ax; mov al, 20h; out 20h, al; pop ax; iret; nop
        0x50, 0xB0, 0x20, 0xE6, 0xA0, 0xE6, 0x20, 0x58, 0xCF, // and out A0h, al
    ];

    private static readonly (ushort Port, byte Value)[] s_writes =
    [
        (0x20, 0x11), (0x21, MasterVector), (0x21, 0x04), (0x21, 0x01), (0x21, 0xFA),
        (0xA0, 0x11), (0xA1, SlaveVector), (0xA1, 0x02), (0xA1, 0x01), (0xA1, 0xFF),
        (0x43, 0x36), (0x40, 0x00), (0x40, 0x00),
    ];

    /// <summary>Writes the table and programs the chips that are models; controllers inside a driver stay as they are.</summary>
    public static void Leave(GuestMemory memory, AddressMap ports)
    {
        var table = new byte[256 * 4];
        for (int vector = 0; vector < 256; vector++)
        {
            int stub = (vector & ~7) switch
            {
                MasterVector => MasterStub,
                SlaveVector => SlaveStub,
                _ => 0,
            };
            BinaryPrimitives.WriteUInt16LittleEndian(table.AsSpan(vector * 4), (ushort)stub);
            BinaryPrimitives.WriteUInt16LittleEndian(table.AsSpan((vector * 4) + 2), StubSegment);
        }

        _ = memory.TryWrite(0, table);
        _ = memory.TryWrite((ulong)StubSegment << 4, s_stubs);
        foreach ((ushort port, byte value) in s_writes)
        {
            if (ports.TryFind(port, out IRegisterWindow window, out uint offset))
            {
                window.Write(offset, AccessWidth.Byte, value);
            }
        }
    }
}
