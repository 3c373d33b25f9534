// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

/// <summary>
/// Debug registers (SDM 3B 17.2). While DR7 enables any breakpoint, code runs one instruction per block; pages with
/// an enabled data breakpoint have no TLB entries, so that their accesses come through the slow path, which asks here.
/// </summary>
internal static unsafe class Breakpoints
{
    /// <summary>Some breakpoint is enabled.</summary>
    public static bool Any(CpuContext* cpu) => (cpu->Dr7 & 0xFF) != 0;

    /// <summary>True when a page must not get a TLB entry.</summary>
    public static bool PageIsWatched(CpuContext* cpu, ulong linear)
    {
        if ((cpu->Dr7 & 0xFF) == 0)
        {
            return false;
        }

        for (int i = 0; i < 4; i++)
        {
            if (IsEnabled(cpu, i) && Type(cpu, i) is 1 or 3 && ((cpu->Dr[i] ^ linear) & ~Mem.PageOffset) == 0)
            {
                return true;
            }
        }

        return false;
    }

    /// <summary>Records the data breakpoints that an access hits; the trap follows the instruction.</summary>
    public static void Data(CpuContext* cpu, ulong linear, int length, bool write)
    {
        for (int i = 0; i < 4; i++)
        {
            int type = Type(cpu, i);
            if (!IsEnabled(cpu, i) || type is 0 or 2 || (type == 1 && !write))
            {
                continue;
            }

            ulong size = Length(cpu, i);
            ulong start = cpu->Dr[i] & ~(size - 1);
            if (linear < start + size && start < linear + (uint)length)
            {
                cpu->PendingDebug |= 1U << i;
            }
        }
    }

    /// <summary>Records the I/O breakpoints that a port access hits (CR4.DE).</summary>
    public static void Io(CpuContext* cpu, uint port, int length)
    {
        if ((cpu->Dr7 & 0xFF) == 0 || (cpu->Cr4 & Cr4.De) == 0)
        {
            return;
        }

        for (int i = 0; i < 4; i++)
        {
            if (!IsEnabled(cpu, i) || Type(cpu, i) != 2)
            {
                continue;
            }

            ulong size = Length(cpu, i);
            ulong start = cpu->Dr[i] & ~(size - 1);
            if (port < start + size && start < port + (uint)length)
            {
                cpu->PendingDebug |= 1U << i;
            }
        }
    }

    /// <summary>DR6 bits of the instruction breakpoints at a linear address.</summary>
    public static uint Instruction(CpuContext* cpu, ulong linear)
    {
        uint hit = 0;
        for (int i = 0; i < 4; i++)
        {
            if (IsEnabled(cpu, i) && Type(cpu, i) == 0 && cpu->Dr[i] == linear)
            {
                hit |= 1U << i;
            }
        }

        return hit;
    }

    private static bool IsEnabled(CpuContext* cpu, int index) => ((cpu->Dr7 >> (index * 2)) & 3) != 0;

    private static int Type(CpuContext* cpu, int index) => (int)(cpu->Dr7 >> (16 + (index * 4))) & 3;

    // LEN encodes 1, 2, 8, 4 bytes.
    private static ulong Length(CpuContext* cpu, int index) => ((cpu->Dr7 >> (18 + (index * 4))) & 3) switch
    {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    };
}
