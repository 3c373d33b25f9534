// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using Vmm.Memory;

namespace Vmm.X86;

// The software TLB. One direct-mapped table per privilege mode (supervisor, user, supervisor with EFLAGS.AC set, and one
// that stays empty and so sends every access down the slow path, for alignment checks and the like). A tag is the
// linear page with the address space's number (1 to 4095) in its low bits; an entry is valid for reading or writing when
// its tag equals the page of the access' last byte plus the number, so that an access which crosses a page never hits.
//
// Entries exist only for RAM and ROM. A write entry exists only when the guest's D bit is set, the slot is writable and
// the page holds no enabled data breakpoint. Entries may vanish at any time; every use looks them up anew, and no
// pointer obtained from one survives a call into a device (see SoftVm.SetMemorySlot).

/// <summary>Privilege modes with a TLB of their own.</summary>
internal enum MmuMode
{
    /// <summary>CPL 0 to 2, or an implicit access to a system structure.</summary>
    Supervisor = 0,

    /// <summary>CPL 3.</summary>
    User = 1,

    /// <summary>CPL 0 to 2 with EFLAGS.AC set: SMAP does not apply.</summary>
    SupervisorAc = 2,

    /// <summary>Never holds entries.</summary>
    Empty = 3,
}

/// <summary>What an access does.</summary>
internal enum Access
{
    Read = 0,
    Write = 1,
    Execute = 2,
}

/// <summary>A translation to host memory; 32 bytes.</summary>
[StructLayout(LayoutKind.Explicit, Size = SizeBytes)]
internal unsafe struct TlbEntry
{
    /// <summary>Reaches 64 MiB of small pages: guests with large pages have all of them cut into small ones here.</summary>
    public const int Count = 16384;
    public const int Tables = 4;
    public const int SizeBytes = 32;

    public const int ReadTagOffset = 0;
    public const int WriteTagOffset = 8;
    public const int AddendOffset = 16;
    public const int PageFlagsOffset = 24;

    [FieldOffset(ReadTagOffset)]
    public ulong ReadTag;

    [FieldOffset(WriteTagOffset)]
    public ulong WriteTag;

    /// <summary>Host address minus linear address.</summary>
    [FieldOffset(AddendOffset)]
    public ulong Addend;

    /// <summary>The page's PageFlags byte.</summary>
    [FieldOffset(PageFlagsOffset)]
    public byte* PageFlags;
}

/// <summary>Code bookkeeping of the host pages that hash to it; collisions only cause needless invalidation.</summary>
internal struct CodeInfo
{
    /// <summary>Bit n: the 64-byte granule n holds decoded code.</summary>
    public long Granules;

    /// <summary>Blocks decoded under another value are stale.</summary>
    public int Generation;

    /// <summary>How often it was invalidated.</summary>
    public int Hits;
}

/// <summary>A piece of guest-physical memory backed by the host.</summary>
internal unsafe struct SlotInfo
{
    public ulong Start;
    public ulong Length;
    public byte* Host;
    public byte* PageFlags;
    public bool ReadOnly;

    /// <summary>Somebody takes dirty flags away while the guest runs.</summary>
    public bool LogDirty;
}

/// <summary>Immutable; replaced as a whole.</summary>
internal unsafe struct SlotTable
{
    public const int MaxSlots = 512;
    public int Count;
    public SlotInfo First;

    public static SlotInfo* At(SlotTable* table, int index) => &table->First + index;
}

/// <summary>What the vCPUs of a VM share, in unmanaged memory.</summary>
internal unsafe struct VmShared
{
    /// <summary>Entries of <see cref="Code"/>.</summary>
    public const int CodeEntries = 1 << 16;

    public SlotTable* Slots;
    public CodeInfo* Code;

    /// <summary>Address lines that are driven: all, or all but line 20 while the A20 gate is closed.</summary>
    public ulong BusMask;

    /// <summary>Taken by locked accesses that no host atomic covers.</summary>
    public int SplitLock;

    /// <summary>vCPUs made.</summary>
    public int Vcpus;

    /// <summary>Wide.Routine in executable memory.</summary>
    public nint CompareExchange16;

    /// <summary>Invalidations of code so far: the next slot of <see cref="CodeWriteRing"/>.</summary>
    public long CodeWrites;

    /// <summary>1 while somebody appends to <see cref="CodeWriteRing"/>.</summary>
    public int CodeWriteGate;

    /// <summary>Indices into <see cref="Code"/> of what was invalidated last.</summary>
    public fixed int CodeWriteRing[RingEntries];

    /// <summary>Contexts of all vCPUs, so that they can be asked to look.</summary>
    public fixed ulong Contexts[MaxVcpus];

    /// <summary>Entries of <see cref="CodeWriteRing"/>.</summary>
    public const int RingEntries = 256;

    /// <summary>Entries of <see cref="Contexts"/>.</summary>
    public const int MaxVcpus = 64;

    /// <summary>Counts decodings on behalf of cross-modification checks (BlockCache.cs).</summary>
    public long Epoch;
}

/// <summary>
/// Guest memory by linear address. All of these answer false after storing a fault in the context
/// (then the handler returns Status.Fault), and have changed nothing in that case.
/// </summary>
internal static unsafe class Mem
{
    public const ulong PageOffset = 0xFFF;

    /// <summary>Linear address of the record's memory operand, without any check (flat or 64-bit).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Offset(CpuContext* cpu, Insn* insn)
    {
        // SAFETY: Base and Index are offsets in the context, which the binder made from register numbers or set to
        // its zero word.
        byte* registers = (byte*)cpu;
        ulong offset = *(ulong*)(registers + insn->Base) + insn->Displacement;
        offset += *(ulong*)(registers + insn->Index) << insn->Scale;
        return offset & insn->AddressMask;
    }

    /// <summary>
    /// Linear address of the record's memory operand of <paramref name="size"/> bytes, with the segment's limit and
    /// type checks where the mode has them. Canonicality is checked by the access itself.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Address(CpuContext* cpu, Insn* insn, uint size, bool write, out ulong linear)
    {
        ulong offset = Offset(cpu, insn);
        if ((insn->Flags & InsnFlags.SegmentCheck) == 0)
        {
            // SAFETY: the binder sets SegmentBase to a base of the context's segment registers or to its zero word.
            linear = offset + *(ulong*)((byte*)cpu + insn->SegmentBase);
            return true;
        }

        return Segmentation.Linear(cpu, insn->Segment, offset, size, write, out linear);
    }

    /// <summary>Loads 1, 2, 4 or 8 bytes.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Read<T>(CpuContext* cpu, ulong linear, out T value)
        where T : unmanaged
    {
        TlbEntry* entry = cpu->Tlb + ((linear >> 12) & (TlbEntry.Count - 1));
        if (entry->ReadTag == (((linear + (uint)sizeof(T) - 1) & ~PageOffset) | cpu->TlbAsid))
        {
            // SAFETY: the tag matched for the first and the last byte, so the value lies in the one page of guest RAM
            // that Addend maps; a slot goes away only after this vCPU has flushed (SoftVm.Quiesce).
            value = *(T*)(entry->Addend + linear);
            return true;
        }

        return ReadSlow(cpu, linear, out value);
    }

    /// <summary>Stores 1, 2, 4 or 8 bytes.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Write<T>(CpuContext* cpu, ulong linear, T value)
        where T : unmanaged
    {
        byte* pointer = WritePointer(cpu, linear, (uint)sizeof(T));
        if (pointer != null)
        {
            // SAFETY: WritePointer vouches for sizeof(T) bytes.
            *(T*)pointer = value;
            return true;
        }

        return WriteBytes(cpu, linear, (byte*)&value, sizeof(T));
    }

    /// <summary>
    /// Host address for a store (or a read-modify-write) that needs no further check; null when the access crosses a
    /// page, is not in the TLB, is MMIO or hits code: use the slow path then. Never raises.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static byte* WritePointer(CpuContext* cpu, ulong linear, uint size)
    {
        TlbEntry* entry = cpu->Tlb + ((linear >> 12) & (TlbEntry.Count - 1));
        if (entry->WriteTag == (((linear + size - 1) & ~PageOffset) | cpu->TlbAsid) &&
            *entry->PageFlags == (byte)PageFlags.Written)
        {
            // SAFETY: the tag matched for the first and the last of the size bytes, as in Read.
            return (byte*)(entry->Addend + linear);
        }

        return null;
    }

    /// <summary>Host address for a load that needs no further check, or null. Never raises.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static byte* ReadPointer(CpuContext* cpu, ulong linear, uint size)
    {
        TlbEntry* entry = cpu->Tlb + ((linear >> 12) & (TlbEntry.Count - 1));
        return entry->ReadTag == (((linear + size - 1) & ~PageOffset) | cpu->TlbAsid)
            // SAFETY: as in WritePointer.
            ? (byte*)(entry->Addend + linear)
            : null;
    }

    /// <summary>Reads 1 to 4096 bytes; may cross pages.</summary>
    public static bool ReadBytes(CpuContext* cpu, ulong linear, byte* into, int length)
    {
        byte* pointer = ReadPointer(cpu, linear, (uint)length);
        if (pointer != null)
        {
            Unsafe.CopyBlockUnaligned(into, pointer, (uint)length);
            return true;
        }

        return Paging.ReadSlow(cpu, linear, into, length, Paging.DataMode(cpu));
    }

    /// <summary>
    /// Writes 1 to 4096 bytes; may cross pages. All pages are checked for writing before the first byte is stored.
    /// </summary>
    public static bool WriteBytes(CpuContext* cpu, ulong linear, byte* from, int length)
    {
        byte* pointer = WritePointer(cpu, linear, (uint)length);
        if (pointer != null)
        {
            Unsafe.CopyBlockUnaligned(pointer, from, (uint)length);
            return true;
        }

        return Paging.WriteSlow(cpu, linear, from, length, Paging.DataMode(cpu));
    }

    /// <summary>
    /// First half of a read-modify-write: checks that the bytes can be written (raising a write fault if not), and
    /// reads them. The second half is <see cref="WriteBytes"/> or <see cref="Write"/>.
    /// </summary>
    public static bool ReadForWrite(CpuContext* cpu, ulong linear, byte* into, int length)
    {
        byte* pointer = WritePointer(cpu, linear, (uint)length);
        if (pointer != null)
        {
            Unsafe.CopyBlockUnaligned(into, pointer, (uint)length);
            return true;
        }

        return Paging.ProbeWrite(cpu, linear, length, Paging.DataMode(cpu)) &&
            Paging.ReadSlow(cpu, linear, into, length, Paging.DataMode(cpu));
    }

    /// <summary>Raises what a store of these bytes would raise; stores nothing.</summary>
    public static bool ProbeWrite(CpuContext* cpu, ulong linear, int length) =>
        WritePointer(cpu, linear, (uint)length) != null ||
        Paging.ProbeWrite(cpu, linear, length, Paging.DataMode(cpu));

    /// <summary>
    /// Host address of an operand for a locked access: the bytes lie in one page of writable RAM, dirty flags are set
    /// and code in them is invalidated. Null with <paramref name="fault"/> false means that no host atomic can be used
    /// (MMIO, ROM, page-crossing): take <see cref="LockSplit"/> and use ReadForWrite and Write.
    /// </summary>
    public static byte* AtomicPointer(CpuContext* cpu, ulong linear, uint size, out bool fault)
    {
        fault = false;
        byte* pointer = WritePointer(cpu, linear, size);
        if (pointer == null)
        {
            fault = !Paging.ProbeWrite(cpu, linear, (int)size, Paging.DataMode(cpu));
            pointer = fault ? null : WritePointer(cpu, linear, size);
        }

        // A host atomic that crosses a cache line is a split lock, which the host may punish or forbid.
        return pointer != null && ((ulong)pointer & 63) + size <= 64 ? pointer : null;
    }

    /// <summary>Taken around locked accesses that AtomicPointer refused; excludes other such accesses only.</summary>
    public static void LockSplit(CpuContext* cpu)
    {
        ref int gate = ref cpu->Shared->SplitLock;
        var spin = default(SpinWait);
        while (Interlocked.CompareExchange(ref gate, 1, 0) != 0)
        {
            spin.SpinOnce();
        }
    }

    /// <summary>Ends <see cref="LockSplit"/>.</summary>
    public static void UnlockSplit(CpuContext* cpu) => Volatile.Write(ref cpu->Shared->SplitLock, 0);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool ReadSlow<T>(CpuContext* cpu, ulong linear, out T value)
        where T : unmanaged
    {
        T buffer = default;
        bool done = Paging.ReadSlow(cpu, linear, (byte*)&buffer, sizeof(T), Paging.DataMode(cpu));
        value = buffer;
        return done;
    }
}
