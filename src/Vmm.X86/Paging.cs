// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;
using System.Threading;
using Vmm.Memory;

namespace Vmm.X86;

// Address translation: the page walker for 32-bit, PAE, 4-level and 5-level paging with PSE, NX, SMEP, SMAP, PKU and
// atomic accessed and dirty bits (SDM 3A chapter 4), the slow path of every memory access, and the flushes.
//
// The walker is the only source of translations. It reads entries from guest memory, checks, and sets accessed and dirty
// bits by compare-exchange on the entry that it read; when another processor changed the entry in between, the walk
// starts again. Non-leaf accessed bits are set as the walk passes; the leaf's only when the access is permitted.
//
// Every physical address leaves through VmShared.BusMask, the addresses of page-table entries too: the A20 gate masks the
// processor's bus, not a mode of it.

/// <summary>Outcome of a successful walk.</summary>
internal struct Translation
{
    /// <summary>Guest-physical address of the byte asked for.</summary>
    public ulong Physical;

    /// <summary>log2 of the page's size.</summary>
    public int PageShift;

    /// <summary>A read in this mode is permitted, too.</summary>
    public bool MayRead;

    /// <summary>A write in this mode is permitted and the dirty bit is set.</summary>
    public bool MayWrite;

    /// <summary>The same in every address space (G set, CR4.PGE set).</summary>
    public bool IsGlobal;
}

/// <summary>Translation and the slow paths of memory accesses.</summary>
internal static unsafe class Paging
{
    private const ulong Present = 1;
    private const ulong Writable = 2;
    private const ulong UserBit = 4;
    private const ulong Accessed = 0x20;
    private const ulong Dirty = 0x40;
    private const ulong LargePage = 0x80;
    private const ulong NoExecute = 1UL << 63;

    /// <summary>Words of CpuContext.LargePages: 4096 bits.</summary>
    public const int LargePageWords = 64;

    private const uint ErrorPresent = 1;
    private const uint ErrorWrite = 2;
    private const uint ErrorUser = 4;
    private const uint ErrorReserved = 8;
    private const uint ErrorFetch = 16;
    private const uint ErrorKey = 32;

    /// <summary>The privilege mode of explicit data accesses.</summary>
    public static MmuMode DataMode(CpuContext* cpu)
    {
        if (cpu->Cpl == 3)
        {
            return MmuMode.User;
        }

        return (cpu->RflagsSystem & Rflags.Ac) != 0 ? MmuMode.SupervisorAc : MmuMode.Supervisor;
    }

    /// <summary>True when <paramref name="linear"/> is canonical for the present paging mode, or outside long mode.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool IsCanonical(CpuContext* cpu, ulong linear)
    {
        int shift = (cpu->Cr4 & Cr4.La57) != 0 ? 7 : 16;
        return (ulong)((long)(linear << shift) >> shift) == linear;
    }

    /// <summary>
    /// True when an address may be loaded into a register that holds addresses (bases of segments and tables, MSRs,
    /// INVPCID's operand). These checks take the width that the processor has, not the one that CR4.LA57 chooses now
    /// (Intel 335252, 5-level paging, section 2.2.2).
    /// </summary>
    public static bool IsCanonicalRegister(CpuContext* cpu, ulong linear)
    {
        int shift = (cpu->Features & CpuFeature.La57) != 0 ? 7 : 16;
        return (ulong)((long)(linear << shift) >> shift) == linear;
    }

    /// <summary>Translates one byte's address; false after raising #PF or #GP for a non-canonical address.</summary>
    public static bool Translate(
        CpuContext* cpu, ulong linear, Access access, MmuMode mode, out Translation translation)
    {
        if ((cpu->Cr0 & Cr0.Pg) == 0)
        {
            translation = new Translation
            {
                Physical = linear & 0xFFFFFFFF & cpu->Shared->BusMask,
                PageShift = 12,
                MayRead = true,
                MayWrite = true,
            };
            return true;
        }

        if ((cpu->Efer & Efer.Lma) != 0)
        {
            if (!IsCanonical(cpu, linear))
            {
                Faults.Gp(cpu);
                cpu->Fault.NonCanonical = true;
                translation = default;
                return false;
            }
        }
        else
        {
            linear &= 0xFFFFFFFF;
        }

        uint error;
        while (true)
        {
            bool again = false;
            error = (cpu->Cr4 & Cr4.Pae) != 0
                ? WalkWide(cpu, linear, access, mode, out translation, ref again)
                : Walk32(cpu, linear, access, mode, out translation, ref again);
            if (!again)
            {
                break;
            }
        }

        if (error == 0)
        {
            translation.Physical &= cpu->Shared->BusMask;
            return true;
        }

        error &= ~0x80000000;
        error |= access == Access.Write ? ErrorWrite : 0;
        error |= mode == MmuMode.User ? ErrorUser : 0;
        bool fetchBit = (cpu->Cr4 & Cr4.Smep) != 0 ||
            ((cpu->Cr4 & Cr4.Pae) != 0 && (cpu->Efer & Efer.Nxe) != 0);
        error |= access == Access.Execute && fetchBit ? ErrorFetch : 0;
        Faults.Pf(cpu, linear, error);
        return false;
    }

    /// <summary>Drops every translation of this vCPU (all address spaces, global pages included).</summary>
    public static void FlushAll(CpuContext* cpu)
    {
        cpu->FlushesOfAll++;
        Asids.Reset(cpu);
        Sites.Drop(cpu);
        Sites.FindMainMemory(cpu);
        cpu->GiantPages = 0;
        Unsafe.InitBlock(cpu->LargePages, 0, LargePageWords * sizeof(ulong));
    }

    /// <summary>INVLPG: drops the page's translations in every address space.</summary>
    public static void FlushPage(CpuContext* cpu, ulong linear)
    {
        int large = LargeBit(linear);
        if (((cpu->LargePages[large >> 6] >> (large & 63)) & 1) != 0 ||
            ((cpu->GiantPages >> GiantBit(linear)) & 1) != 0)
        {
            // Part of a large page may be cached under other pages' entries.
            FlushAll(cpu);
            return;
        }

        cpu->FlushesOfPages++;
        Sites.DropPage(cpu, linear);
        ulong slot = (linear >> 12) & (TlbEntry.Count - 1);
        for (int table = 0; table < TlbEntry.Tables - 1; table++)
        {
            TlbEntry* entry = cpu->Tlbs + ((ulong)table * TlbEntry.Count) + slot;
            entry->ReadTag = 0;
            entry->WriteTag = 0;
        }

        cpu->Blocks.ForgetPage(linear);
    }

    /// <summary>The slow path of loads: crossing, missing, MMIO, watched.</summary>
    public static bool ReadSlow(CpuContext* cpu, ulong linear, byte* into, int length, MmuMode mode)
    {
        if (!TranslateBoth(cpu, linear, length, Access.Read, mode, out int first, out Translation one, out Translation two))
        {
            return false;
        }

        ReadPart(cpu, linear, one, into, first, mode);
        if (first < length)
        {
            ReadPart(cpu, Next(cpu, linear, first), two, into + first, length - first, mode);
        }

        return true;
    }

    /// <summary>The slow path of stores.</summary>
    public static bool WriteSlow(CpuContext* cpu, ulong linear, byte* from, int length, MmuMode mode)
    {
        if (!TranslateBoth(cpu, linear, length, Access.Write, mode, out int first, out Translation one, out Translation two))
        {
            return false;
        }

        WritePart(cpu, linear, one, from, first, mode);
        if (first < length)
        {
            WritePart(cpu, Next(cpu, linear, first), two, from + first, length - first, mode);
        }

        return true;
    }

    /// <summary>
    /// Raises what a store would raise. Fills the TLB and invalidates code in the bytes, so that a following
    /// WritePointer succeeds where that is possible.
    /// </summary>
    public static bool ProbeWrite(CpuContext* cpu, ulong linear, int length, MmuMode mode)
    {
        if (!TranslateBoth(cpu, linear, length, Access.Write, mode, out int first, out Translation one, out Translation two))
        {
            return false;
        }

        byte* host = HostForWrite(cpu, one.Physical, first, out byte* flags);
        Fill(cpu, linear, one, mode, host, flags);
        if (first < length)
        {
            host = HostForWrite(cpu, two.Physical, length - first, out flags);
            Fill(cpu, Next(cpu, linear, first), two, mode, host, flags);
        }

        return true;
    }

    /// <summary>Reads 1 to 8 bytes of a system structure (descriptor, TSS, IDT): supervisor whatever the CPL is.</summary>
    public static bool ReadSystem<T>(CpuContext* cpu, ulong linear, out T value)
        where T : unmanaged
    {
        T buffer = default;
        TlbEntry* entry = cpu->Tlbs + ((linear >> 12) & (TlbEntry.Count - 1));
        if (entry->ReadTag == (((linear + (uint)sizeof(T) - 1) & ~Mem.PageOffset) | cpu->GlobalAsid))
        {
            // SAFETY: the tag matched for the first and the last byte, so the value lies in the one page of guest RAM
            // that Addend maps until this vCPU flushes.
            value = *(T*)(entry->Addend + linear);
            return true;
        }

        bool done = ReadSlow(cpu, linear, (byte*)&buffer, sizeof(T), MmuMode.Supervisor);
        value = buffer;
        return done;
    }

    /// <summary>Writes a system structure.</summary>
    public static bool WriteSystem<T>(CpuContext* cpu, ulong linear, T value)
        where T : unmanaged =>
        WriteSlow(cpu, linear, (byte*)&value, sizeof(T), MmuMode.Supervisor);

    /// <summary>The slot that holds a physical address, or null.</summary>
    public static SlotInfo* FindSlot(CpuContext* cpu, ulong physical)
    {
        SlotTable* table = cpu->Shared->Slots;
        int low = 0;
        int high = table->Count - 1;
        while (low <= high)
        {
            int middle = (low + high) >> 1;
            SlotInfo* slot = SlotTable.At(table, middle);
            if (physical < slot->Start)
            {
                high = middle - 1;
            }
            else if (physical - slot->Start >= slot->Length)
            {
                low = middle + 1;
            }
            else
            {
                return slot;
            }
        }

        return null;
    }

    /// <summary>
    /// Host address of physical memory for reading; null when it is not RAM or ROM. The page holds it.
    /// </summary>
    public static byte* HostForRead(CpuContext* cpu, ulong physical)
    {
        if ((physical & ~Mem.PageOffset) == cpu->ApicPage)
        {
            return null;
        }

        SlotInfo* slot = FindSlot(cpu, physical);
        return slot == null ? null : slot->Host + (physical - slot->Start);
    }

    /// <summary>
    /// Host address of physical memory that is about to be written; null when it is not RAM. Marks the page written
    /// and invalidates decoded code in the bytes.
    /// </summary>
    public static byte* HostForWrite(CpuContext* cpu, ulong physical, int length, out byte* flags)
    {
        flags = null;
        if ((physical & ~Mem.PageOffset) == cpu->ApicPage)
        {
            return null;
        }

        SlotInfo* slot = FindSlot(cpu, physical);
        if (slot == null || slot->ReadOnly)
        {
            return null;
        }

        byte* host = slot->Host + (physical - slot->Start);
        flags = slot->PageFlags + ((physical - slot->Start) >> 12);
        byte present = Volatile.Read(ref *flags);
        if (present != (byte)PageFlags.Written)
        {
            if ((present & (byte)PageFlags.Written) != (byte)PageFlags.Written)
            {
                AtomicByte.Or(flags, (byte)PageFlags.Written);
            }

            if ((present & (byte)PageFlags.Code) != 0)
            {
                CodePages.Invalidate(cpu, host, flags, length);
            }
        }

        return host;
    }

    /// <summary>Reads guest-physical bytes within one page: RAM, ROM, APIC or MMIO.</summary>
    public static void ReadPhysical(CpuContext* cpu, ulong physical, byte* into, int length)
    {
        byte* host = HostForRead(cpu, physical);
        if (host != null)
        {
            Unsafe.CopyBlockUnaligned(into, host, (uint)length);
            return;
        }

        DevicePort.ReadMmio(cpu, physical, into, length);
    }

    /// <summary>Writes guest-physical bytes within one page.</summary>
    public static void WritePhysical(CpuContext* cpu, ulong physical, byte* from, int length)
    {
        byte* host = HostForWrite(cpu, physical, length, out _);
        if (host != null)
        {
            Unsafe.CopyBlockUnaligned(host, from, (uint)length);
            return;
        }

        DevicePort.WriteMmio(cpu, physical, from, length);
    }

    /// <summary>Loads the four PDPTE registers from CR3; false when a reserved bit is set in a present one.</summary>
    public static bool LoadPdptes(CpuContext* cpu, ulong cr3, ulong cr4, ulong cr0)
    {
        if ((cr0 & Cr0.Pg) == 0 || (cr4 & Cr4.Pae) == 0 || (cpu->Efer & Efer.Lma) != 0)
        {
            return true;
        }

        ulong* loaded = stackalloc ulong[4];
        // SAFETY: four words on the stack are the 32 bytes asked for.
        ReadPhysical(cpu, cr3 & 0xFFFFFFE0 & cpu->Shared->BusMask, (byte*)loaded, 32);
        ulong reserved = ~cpu->PhysicalMask & ~0xFFFUL;
        reserved |= 0x1E6;
        for (int i = 0; i < 4; i++)
        {
            if ((loaded[i] & Present) != 0 && (loaded[i] & reserved) != 0)
            {
                return false;
            }
        }

        for (int i = 0; i < 4; i++)
        {
            cpu->Pdpte[i] = loaded[i];
        }

        return true;
    }

    // What every access does first, whether it crosses a page or not. Both halves are translated before either is touched: a
    // register whose read has effects must not be read by an access that then faults.
    private static bool TranslateBoth(
        CpuContext* cpu, ulong linear, int length, Access access, MmuMode mode, out int first, out Translation one,
        out Translation two)
    {
        first = FirstPart(linear, length);
        two = default;
        if (!CheckAlignment(cpu, linear, length, mode))
        {
            one = default;
            return false;
        }

        if (!Translate(cpu, linear, access, mode, out one) ||
            (first < length && !Translate(cpu, Next(cpu, linear, first), access, mode, out two)))
        {
            return false;
        }

        Watch(cpu, linear, length, access == Access.Write);
        return true;
    }

    private static int FirstPart(ulong linear, int length)
    {
        int left = 4096 - (int)(linear & Mem.PageOffset);
        return length <= left ? length : left;
    }

    // Linear addresses wrap at 4 GiB outside 64-bit mode.
    private static ulong Next(CpuContext* cpu, ulong linear, int distance)
    {
        ulong next = linear + (uint)distance;
        return cpu->Mode == ProcessorMode.Long ? next : next & 0xFFFFFFFF;
    }

    private static void ReadPart(
        CpuContext* cpu, ulong linear, in Translation translation, byte* into, int length, MmuMode mode)
    {
        byte* host = HostForRead(cpu, translation.Physical);
        if (host == null)
        {
            DevicePort.ReadMmio(cpu, translation.Physical, into, length);
            return;
        }

        // Copy before the fill: an aligned operand stays one host access, so that it is single-copy atomic.
        CopyOnce(into, host, length);
        byte* flags = null;
        SlotInfo* slot = FindSlot(cpu, translation.Physical);
        if (slot != null && !slot->ReadOnly)
        {
            flags = slot->PageFlags + ((translation.Physical - slot->Start) >> 12);
        }

        Fill(cpu, linear, translation, mode, host, flags);
    }

    private static void WritePart(
        CpuContext* cpu, ulong linear, in Translation translation, byte* from, int length, MmuMode mode)
    {
        byte* host = HostForWrite(cpu, translation.Physical, length, out byte* flags);
        if (host == null)
        {
            DevicePort.WriteMmio(cpu, translation.Physical, from, length);
            return;
        }

        CopyOnce(host, from, length);
        Fill(cpu, linear, translation, mode, host, flags);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void CopyOnce(byte* into, byte* from, int length)
    {
        // SAFETY: callers bound both sides: host memory to the end of its page, the other to its buffer. x86 takes
        // any alignment, and a load or store of 2, 4 or 8 bytes inside a cache line is one access, which other vCPUs
        // may rely on.
        switch (length)
        {
            case 1:
                *into = *from;
                break;
            case 2:
                *(ushort*)into = *(ushort*)from;
                break;
            case 4:
                *(uint*)into = *(uint*)from;
                break;
            case 8:
                *(ulong*)into = *(ulong*)from;
                break;
            default:
                Unsafe.CopyBlockUnaligned(into, from, (uint)length);
                break;
        }
    }

    private static void Fill(
        CpuContext* cpu, ulong linear, in Translation translation, MmuMode mode, byte* host, byte* flags)
    {
        if (host == null || Breakpoints.PageIsWatched(cpu, linear))
        {
            return;
        }

        if (cpu->Mode != ProcessorMode.Long)
        {
            linear &= 0xFFFFFFFF;
        }

        ulong page = linear & ~Mem.PageOffset;
        ulong slot = (linear >> 12) & (TlbEntry.Count - 1);
        TlbEntry* entry = cpu->Tlbs + ((ulong)mode * TlbEntry.Count) + slot;
        ulong tag = page | Asids.Of(cpu, mode);
        if (mode == MmuMode.Supervisor && !translation.IsGlobal)
        {
            Asids.AddPrivate(cpu, (uint)slot);
        }

        entry->ReadTag = translation.MayRead ? tag : 0;
        entry->WriteTag = translation.MayWrite && flags != null ? tag : 0;
        entry->Addend = (ulong)host - linear;
        entry->PageFlags = flags;
        cpu->TlbFills++;
        if (translation.PageShift > 12)
        {
            if (translation.PageShift > 22)
            {
                cpu->GiantPages |= 1UL << GiantBit(linear);
                return;
            }

            AddLarge(cpu, linear);
            if (translation.PageShift == 22)
            {
                AddLarge(cpu, linear ^ (1UL << 21));
            }
        }
    }

    private static void AddLarge(CpuContext* cpu, ulong linear)
    {
        int large = LargeBit(linear);
        cpu->LargePages[large >> 6] |= 1UL << (large & 63);
    }

    // Hashes of the regions that a large page covers: 0 to 64 * LargePageWords - 1, and 0 to 63.
    private static int LargeBit(ulong linear) => (int)(((linear >> 21) * 0x9E3779B97F4A7C15) >> 52);

    private static int GiantBit(ulong linear) => (int)(((linear >> 30) * 0x9E3779B97F4A7C15) >> 58);

    // #AC is for explicit data accesses at CPL 3 only (SDM 3A 6.15); the TLB is the empty one while it is enabled.
    private static bool CheckAlignment(CpuContext* cpu, ulong linear, int length, MmuMode mode)
    {
        if (cpu->Tlb != cpu->Tlbs + ((int)MmuMode.Empty * TlbEntry.Count) || mode != MmuMode.User)
        {
            return true;
        }

        // SDM 3A table 6-7; x87 environments and states by their width, 80-bit operands by their significand, 32-byte
        // operands by their halves.
        int mask = length switch
        {
            2 or 4 or 8 or 16 => length - 1,
            32 => 15,
            10 => 7,
            14 or 94 => 1,
            28 or 108 => 3,
            _ => 0,
        };
        if (((int)linear & mask) != 0 && AlignmentChecked(cpu) && IsCanonical(cpu, linear))
        {
            Faults.Ac(cpu);
            return false;
        }

        return true;
    }

    /// <summary>True when #AC is enabled.</summary>
    public static bool AlignmentChecked(CpuContext* cpu) =>
        cpu->Cpl == 3 && (cpu->Cr0 & Cr0.Am) != 0 && (cpu->RflagsSystem & Rflags.Ac) != 0;

    private static void Watch(CpuContext* cpu, ulong linear, int length, bool write)
    {
        if ((cpu->Dr7 & 0xFF) != 0)
        {
            Breakpoints.Data(cpu, linear, length, write);
        }
    }

    private static ulong ReadEntry(CpuContext* cpu, ulong physical, out byte* host)
    {
        host = HostForRead(cpu, physical);
        if (host != null)
        {
            // SAFETY: HostForRead gives an address in guest RAM; entries are aligned to 8 bytes by the walk and so do
            // not leave their page.
            return Volatile.Read(ref *(ulong*)host);
        }

        // A page table in a device's registers: whatever it reads as, without accessed bits.
        ulong value = 0;
        DevicePort.ReadMmio(cpu, physical, (byte*)&value, 8);
        return value;
    }

    // False when the entry is not what it was.
    private static bool SetBits(CpuContext* cpu, ulong physical, byte* host, ulong old, ulong bits)
    {
        if (host == null || (old & bits) == bits)
        {
            return true;
        }

        byte* writable = HostForWrite(cpu, physical, 8, out _);
        return writable == null ||
            // SAFETY: as in ReadEntry; HostForWrite has looked at the whole entry.
            Interlocked.CompareExchange(ref *(ulong*)writable, old | bits, old) == old;
    }

    private static uint WalkWide(
        CpuContext* cpu, ulong linear, Access access, MmuMode mode, out Translation translation, ref bool again)
    {
        translation = default;
        bool isLong = (cpu->Efer & Efer.Lma) != 0;
        ulong reserved = ~cpu->PhysicalMask & 0x000FFFFF_FFFFF000;
        if ((cpu->Efer & Efer.Nxe) == 0)
        {
            reserved |= NoExecute;
        }

        if (!isLong)
        {
            reserved |= 0x7FF00000_00000000;
        }

        ulong combined = Writable | UserBit;
        ulong noExecute = 0;
        ulong table;
        int shift;
        if (isLong)
        {
            table = cpu->Cr3 & cpu->PhysicalMask & ~0xFFFUL;
            shift = (cpu->Cr4 & Cr4.La57) != 0 ? 48 : 39;
        }
        else
        {
            ulong pdpte = cpu->Pdpte[(linear >> 30) & 3];
            if ((pdpte & Present) == 0)
            {
                return NotPresent;
            }

            table = pdpte & cpu->PhysicalMask & ~0xFFFUL;
            shift = 21;
        }

        while (true)
        {
            ulong at = (table + (((linear >> shift) & 0x1FF) * 8)) & cpu->Shared->BusMask;
            ulong entry = ReadEntry(cpu, at, out byte* host);
            if ((entry & Present) == 0)
            {
                return NotPresent;
            }

            bool leaf = shift == 12 || ((entry & LargePage) != 0 && (shift == 21 || shift == 30));
            ulong bad = reserved;
            if (shift >= 39)
            {
                bad |= LargePage;
            }
            else if (leaf && shift > 12)
            {
                bad |= ((1UL << shift) - 1) & ~0x1FFFUL;
            }

            if ((entry & bad) != 0)
            {
                return ErrorPresent | ErrorReserved;
            }

            combined &= entry;
            noExecute |= entry & NoExecute;
            if (leaf)
            {
                ulong offsetMask = (1UL << shift) - 1;
                translation.Physical = (entry & cpu->PhysicalMask & ~offsetMask & ~0xFFFUL) | (linear & offsetMask);
                translation.PageShift = shift;
                return Finish(
                    cpu, access, mode, combined, noExecute, isLong ? (int)(entry >> 59) & 15 : -1, at, host, entry,
                    ref translation, ref again);
            }

            if (!SetBits(cpu, at, host, entry, Accessed))
            {
                again = true;
                return NotPresent;
            }

            table = entry & cpu->PhysicalMask & ~0xFFFUL;
            shift -= 9;
        }
    }

    private static uint Walk32(
        CpuContext* cpu, ulong linear, Access access, MmuMode mode, out Translation translation, ref bool again)
    {
        translation = default;
        ulong at = ((cpu->Cr3 & 0xFFFFF000) + (((linear >> 22) & 0x3FF) * 4)) & cpu->Shared->BusMask;
        uint entry = ReadEntry32(cpu, at, out byte* host);
        if ((entry & Present) == 0)
        {
            return NotPresent;
        }

        ulong combined = (Writable | UserBit) & entry;
        if ((entry & LargePage) != 0 && (cpu->Cr4 & Cr4.Pse) != 0)
        {
            // PSE-36: bits 20:13 are address bits 39:32; bit 21 is reserved.
            ulong high = (ulong)((entry >> 13) & 0xFF) << 32;
            if ((entry & (1 << 21)) != 0 || (high & ~cpu->PhysicalMask) != 0)
            {
                return ErrorPresent | ErrorReserved;
            }

            translation.Physical = high | (entry & 0xFFC00000) | (linear & 0x3FFFFF);
            translation.PageShift = 22;
            return Finish(
                cpu, access, mode, combined, 0, -1, at, host, entry, ref translation, ref again, true);
        }

        if (!SetBits32(cpu, at, host, entry, (uint)Accessed))
        {
            again = true;
            return NotPresent;
        }

        at = ((entry & 0xFFFFF000) + (((linear >> 12) & 0x3FF) * 4)) & cpu->Shared->BusMask;
        entry = ReadEntry32(cpu, at, out host);
        if ((entry & Present) == 0)
        {
            return NotPresent;
        }

        combined &= entry;
        translation.Physical = (entry & 0xFFFFF000) | (linear & 0xFFF);
        translation.PageShift = 12;
        return Finish(cpu, access, mode, combined, 0, -1, at, host, entry, ref translation, ref again, true);
    }

    // A fault whose error code has no bit of its own must still differ from success.
    private const uint NotPresent = 0x80000000;

    private static uint Finish(
        CpuContext* cpu,
        Access access,
        MmuMode mode,
        ulong combined,
        ulong noExecute,
        int key,
        ulong at,
        byte* host,
        ulong entry,
        ref Translation translation,
        ref bool again,
        bool narrow = false)
    {
        bool userPage = (combined & UserBit) != 0;
        bool mayRead;
        bool mayWrite;
        bool mayExecute = noExecute == 0;
        bool writeProtect = mode == MmuMode.User || (cpu->Cr0 & Cr0.Wp) != 0;
        if (mode == MmuMode.User)
        {
            mayRead = userPage;
            mayExecute &= userPage;
        }
        else
        {
            mayRead = !userPage || mode == MmuMode.SupervisorAc || (cpu->Cr4 & Cr4.Smap) == 0;
            mayExecute &= !userPage || (cpu->Cr4 & Cr4.Smep) == 0;
        }

        mayWrite = mayRead && (!writeProtect || (combined & Writable) != 0);
        uint keyError = 0;
        if (userPage && key >= 0 && (cpu->Cr4 & Cr4.Pke) != 0)
        {
            uint rights = cpu->Pkru >> (key * 2);
            bool keyReads = (rights & 1) == 0;
            bool keyWrites = keyReads && ((rights & 2) == 0 || !writeProtect);
            if ((access == Access.Read && !keyReads) || (access == Access.Write && !keyWrites))
            {
                keyError = ErrorKey;
            }

            mayRead &= keyReads;
            mayWrite &= keyWrites;
        }

        bool permitted = access switch
        {
            Access.Read => mayRead,
            Access.Write => mayWrite,
            _ => mayExecute,
        };
        if (!permitted)
        {
            return ErrorPresent | keyError;
        }

        ulong bits = access == Access.Write ? Accessed | Dirty : Accessed;
        bool set = narrow
            ? SetBits32(cpu, at, host, (uint)entry, (uint)bits)
            : SetBits(cpu, at, host, entry, bits);
        if (!set)
        {
            again = true;
            return NotPresent;
        }

        translation.MayRead = mayRead;
        translation.IsGlobal = (entry & 0x100) != 0 && (cpu->Cr4 & Cr4.Pge) != 0;
        translation.MayWrite = mayWrite && ((entry | bits) & Dirty) != 0;
        return 0;
    }

    private static uint ReadEntry32(CpuContext* cpu, ulong physical, out byte* host)
    {
        host = HostForRead(cpu, physical);
        if (host != null)
        {
            // SAFETY: as in ReadEntry, with entries of 4 bytes.
            return Volatile.Read(ref *(uint*)host);
        }

        uint value = 0;
        DevicePort.ReadMmio(cpu, physical, (byte*)&value, 4);
        return value;
    }

    private static bool SetBits32(CpuContext* cpu, ulong physical, byte* host, uint old, uint bits)
    {
        if (host == null || (old & bits) == bits)
        {
            return true;
        }

        byte* writable = HostForWrite(cpu, physical, 4, out _);
        return writable == null ||
            // SAFETY: as in SetBits.
            Interlocked.CompareExchange(ref *(uint*)writable, old | bits, old) == old;
    }
}

/// <summary>Atomic operations on a byte, which Interlocked lacks for OR and AND: through the aligned word.</summary>
internal static unsafe class AtomicByte
{
    public static void Or(byte* at, byte bits)
    {
        // SAFETY: page flags are allocated in multiples of 8 bytes (RamBlock, SoftVm), so the aligned word is inside;
        // the other three bytes are written back as they are, atomically.
        int shift = ((int)(ulong)at & 3) * 8;
        Interlocked.Or(ref *(int*)((ulong)at & ~3UL), bits << shift);
    }

    public static void And(byte* at, byte bits)
    {
        // SAFETY: page flags are allocated in multiples of 8 bytes (RamBlock, SoftVm), so the aligned word is inside;
        // the other three bytes are written back as they are, atomically.
        int shift = ((int)(ulong)at & 3) * 8;
        Interlocked.And(ref *(int*)((ulong)at & ~3UL), (bits << shift) | ~(0xFF << shift));
    }
}
