// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using Vmm.Core;
using Vmm.Host;
using Vmm.Kvm.Abi;

namespace Vmm.Kvm;

/// <summary>The variable-length tables of the device: CPUID leaves and the list of saved MSRs.</summary>
internal static unsafe class KvmTables
{
    // Both lists have tens to a few hundred entries; a kernel that wants more than this is broken.
    private const int MostEntries = 4096;

    internal static List<CpuidEntry> ReadSupportedCpuid(SafeHandle device)
    {
        for (int room = 256; room <= MostEntries; room *= 2)
        {
            var buffer = new byte[sizeof(kvm_cpuid2) + (room * sizeof(kvm_cpuid_entry2))];

            // SAFETY: the buffer is pinned and has room for `nent` entries; the kernel lowers nent to what it wrote.
            fixed (byte* start = buffer)
            {
                var header = (kvm_cpuid2*)start;
                header->nent = (uint)room;
                if (KvmCall.Try(device, KvmAbi.KVM_GET_SUPPORTED_CPUID, (nint)start) >= 0)
                {
                    return Convert((kvm_cpuid_entry2*)(start + sizeof(kvm_cpuid2)), Math.Min((int)header->nent, room));
                }

                if (Ioctl.LastError != Errno.E2BIG)
                {
                    throw KvmCall.Failure("KVM_GET_SUPPORTED_CPUID");
                }
            }
        }

        throw new HypervisorException("kvm: the list of CPUID leaves does not end");
    }

    /// <summary>MSRs to save, without those that <see cref="CpuState"/> has a field for and Hyper-V's.</summary>
    internal static List<uint> ReadSavedMsrs(SafeHandle device)
    {
        for (int room = 256; room <= MostEntries; room *= 2)
        {
            var buffer = new uint[room + 1];

            // SAFETY: the buffer is pinned and has room for `nmsrs` indices behind the count.
            fixed (uint* start = buffer)
            {
                start[0] = (uint)room;
                if (KvmCall.Try(device, KvmAbi.KVM_GET_MSR_INDEX_LIST, (nint)start) >= 0)
                {
                    var list = new List<uint>();
                    for (int i = 1; i <= Math.Min((int)start[0], room); i++)
                    {
                        if (IsSaved(start[i]))
                        {
                            list.Add(start[i]);
                        }
                    }

                    list.Sort();
                    return list;
                }

                if (Ioctl.LastError != Errno.E2BIG)
                {
                    throw KvmCall.Failure("KVM_GET_MSR_INDEX_LIST");
                }
            }
        }

        throw new HypervisorException("kvm: the list of MSRs does not end");
    }

    private static bool IsSaved(uint msr) => msr switch
    {
        Msr.ApicBase or Msr.Efer or Msr.FsBase or Msr.GsBase => false,

        // SMBASE takes only writes of the host; Hyper-V's synthetic MSRs are not offered to guests.
        0x9E => false,
        >= 0x40000000 and <= 0x400001FF => false,
        _ => true,
    };

    private static List<CpuidEntry> Convert(kvm_cpuid_entry2* entries, int count)
    {
        var list = new List<CpuidEntry>(count);
        for (int i = 0; i < count; i++)
        {
            kvm_cpuid_entry2* e = entries + i;
            bool hasIndex = (e->flags & KvmAbi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX) != 0;
            list.Add(new CpuidEntry(e->function, e->index, hasIndex, e->eax, e->ebx, e->ecx, e->edx));
        }

        return list;
    }
}

/// <summary>MSR numbers that this assembly names (SDM 4, 2.1).</summary>
internal static class Msr
{
    internal const uint Tsc = 0x10;
    internal const uint ApicBase = 0x1B;
    internal const uint TscAdjust = 0x3B;
    internal const uint TscDeadline = 0x6E0;
    internal const uint Efer = 0xC0000080;
    internal const uint FsBase = 0xC0000100;
    internal const uint GsBase = 0xC0000101;
}
