// SPDX-License-Identifier: BSD-2-Clause
using System.Threading;
using Vmm.Core;

namespace Vmm.X86;

/// <summary>
/// The way out to devices. While a device runs, the vCPU counts as holding no pointer into guest memory
/// (CpuContext.Safe), so that a device may change memory slots.
/// </summary>
internal static unsafe class DevicePort
{
    /// <summary>Reads up to 4096 bytes of device memory in naturally aligned pieces of at most 8.</summary>
    public static void ReadMmio(CpuContext* cpu, ulong physical, byte* into, int length)
    {
        SoftVcpu vcpu = SoftVcpu.From(cpu);
        Enter(cpu);
        while (length > 0)
        {
            int piece = Piece(physical, length);
            ulong value = vcpu.MmioRead(physical, (AccessWidth)piece);
            Store(into, value, piece);
            physical += (uint)piece;
            into += piece;
            length -= piece;
        }

        Leave(cpu);
    }

    /// <summary>Writes device memory.</summary>
    public static void WriteMmio(CpuContext* cpu, ulong physical, byte* from, int length)
    {
        SoftVcpu vcpu = SoftVcpu.From(cpu);
        Enter(cpu);
        while (length > 0)
        {
            int piece = Piece(physical, length);
            vcpu.MmioWrite(physical, (AccessWidth)piece, Load(from, piece));
            physical += (uint)piece;
            from += piece;
            length -= piece;
        }

        Leave(cpu);
    }

    /// <summary>IN.</summary>
    public static uint ReadPort(CpuContext* cpu, uint port, int width)
    {
        SoftVcpu vcpu = SoftVcpu.From(cpu);
        Enter(cpu);
        uint value = (uint)vcpu.Vm.Ports.Read(port, (AccessWidth)width);
        Leave(cpu);
        return value;
    }

    /// <summary>OUT.</summary>
    public static void WritePort(CpuContext* cpu, uint port, int width, uint value)
    {
        SoftVcpu vcpu = SoftVcpu.From(cpu);
        Enter(cpu);
        vcpu.Vm.Ports.Write(port, (AccessWidth)width, value);
        Leave(cpu);
    }

    /// <summary>From here on the thread holds no pointer into guest memory.</summary>
    public static void Enter(CpuContext* cpu) => Volatile.Write(ref cpu->Safe, 1);

    /// <summary>Back to guest code; a change of slots that happened meanwhile takes effect now.</summary>
    public static void Leave(CpuContext* cpu)
    {
        // A full fence: the slot changer sets Request and then reads Safe, we do it the other way round.
        Interlocked.Exchange(ref cpu->Safe, 0);
        if ((Volatile.Read(ref cpu->Request) & RequestBits.FlushAll) != 0)
        {
            SoftVcpu.From(cpu).FlushRequested();
        }
    }

    private static int Piece(ulong address, int length)
    {
        if (length >= 8 && (address & 7) == 0)
        {
            return 8;
        }

        // Unaligned accesses that fit one width reach the device as one, as on the bus of a PC.
        if (length is 1 or 2 or 4 or 8)
        {
            return length;
        }

        if (length >= 4 && (address & 3) == 0)
        {
            return 4;
        }

        return length >= 2 && (address & 1) == 0 ? 2 : 1;
    }

    private static void Store(byte* into, ulong value, int length)
    {
        for (int i = 0; i < length; i++)
        {
            into[i] = (byte)(value >> (8 * i));
        }
    }

    private static ulong Load(byte* from, int length)
    {
        ulong value = 0;
        for (int i = 0; i < length; i++)
        {
            value |= (ulong)from[i] << (8 * i);
        }

        return value;
    }
}
