// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.CompilerServices;
using System.Threading;
using Iced.Intel;
using Vmm.Memory;

namespace Vmm.X86;

// Fetching and decoding: from RIP to a block.
public sealed unsafe partial class SoftVcpu
{
    private const int MaxInsns = 32;
    private const int MaxInsnBytes = 15;
    private const int WindowBytes = 512;

    private readonly PointerReader _reader = new();
    private readonly Decoder[] _decoders = new Decoder[3];
    private readonly byte[] _window = GC.AllocateArray<byte>(WindowBytes + MaxInsnBytes + 1, pinned: true);
    private readonly byte[] _scratch = GC.AllocateArray<byte>(64 * (MaxInsns + 3), pinned: true);
    private bool _softwareInterrupt;
    private int _youngTries;

    /// <summary>False: every instruction is fetched and decoded anew.</summary>
    internal bool CachesCode { get; set; } = true;

    /// <summary>INT n and SYSCALL were executed: no single-step trap follows.</summary>
    internal void SuppressTrap() => _softwareInterrupt = true;

    /// <summary>The block at RIP; null after raising a fault (with RIP at the fetch).</summary>
    internal Block* FindBlock(CpuContext* cpu, uint key)
    {
        Interlocked.Exchange(ref cpu->SeenEpoch, Volatile.Read(ref cpu->Shared->Epoch));
        if ((Volatile.Read(ref cpu->Request) & RequestBits.Stores) != 0)
        {
            // Before the code runs for which this vCPU counts as having passed.
            Interlocked.And(ref cpu->Request, ~RequestBits.Stores);
            Sites.DropStores(cpu);
        }

        SegmentRegister* cs = CpuContext.Segment(cpu, Seg.Cs);
        ulong linear = cpu->Rip + cs->EffectiveBase;
        uint room = uint.MaxValue;
        if (cpu->Mode != ProcessorMode.Long)
        {
            linear &= 0xFFFFFFFF;
            if (cpu->Rip > cs->Limit)
            {
                Faults.Gp(cpu);
                return null;
            }

            ulong left = cs->Limit - cpu->Rip + 1;
            room = left > 0xFFFF ? 0xFFFF : (uint)left;
        }

        ulong context = (cpu->SpaceAsid << 32) | key;
        ulong shared = (cpu->GlobalAsid << 32) | key;
        JumpEntry* entry = cpu->Blocks.JumpSlot(linear);
        if (entry->Linear == linear && (entry->Context == context || entry->Context == shared))
        {
            if (Usable(cpu, entry->Target))
            {
                return entry->Target;
            }

            entry->Context = 0;
        }

        MmuMode mode = cpu->Cpl == 3 ? MmuMode.User : MmuMode.Supervisor;
        if (!Paging.Translate(cpu, linear, Access.Execute, mode, out Translation translation))
        {
            return null;
        }

        ulong physical = translation.Physical;
        Block* block = cpu->Blocks.Lookup(physical, key);
        if (block != null && block->Crosses != 0)
        {
            // The tail's page may be mapped elsewhere by now.
            if (!Paging.Translate(cpu, Tail(cpu, linear), Access.Execute, mode, out Translation tail))
            {
                return null;
            }

            if (tail.Physical != block->Physical2)
            {
                block = null;
            }
        }

        // Segment limits are not part of a block's name: near the limit it is decoded again.
        if (block != null && ((uint)block->Bytes > room || !Usable(cpu, block)))
        {
            block = null;
        }

        block = block != null ? block : DecodeBlock(cpu, linear, physical, key, mode, room);
        if (block != null && block->PageGeneration != null)
        {
            entry = cpu->Blocks.JumpSlot(linear);
            entry->Linear = linear;
            entry->Context =
                translation.IsGlobal && mode == MmuMode.Supervisor && block->Crosses == 0 ? shared : context;
            entry->Target = block;
        }

        return block;
    }

    private static ulong Tail(CpuContext* cpu, ulong linear)
    {
        ulong tail = (linear & ~Mem.PageOffset) + 4096;
        return cpu->Mode == ProcessorMode.Long ? tail : tail & 0xFFFFFFFF;
    }

    // True when a block still is what memory holds. Settles young blocks.
    private bool Usable(CpuContext* cpu, Block* block)
    {
        if (block->Crosses != 0 && block->Generation2 != *block->PageGeneration2)
        {
            return false;
        }

        if (block->Generation == *block->PageGeneration)
        {
            return true;
        }

        if (block->Generation != Block.Young || block->DecodedGeneration != *block->PageGeneration)
        {
            return false;
        }

        bool settled = OthersHavePassed(cpu, block->Epoch);
        byte* host = Paging.HostForRead(cpu, block->Physical);
        if (host == null)
        {
            return false;
        }

        int first = Math.Min(block->Bytes, 4096 - (int)(block->Physical & Mem.PageOffset));
        if (!new ReadOnlySpan<byte>(host, first).SequenceEqual(new ReadOnlySpan<byte>(block->Source, first)))
        {
            block->Generation = Block.Dead;
            return false;
        }

        if (first < block->Bytes)
        {
            host = Paging.HostForRead(cpu, block->Physical2);
            int rest = block->Bytes - first;
            if (host == null ||
                !new ReadOnlySpan<byte>(host, rest).SequenceEqual(new ReadOnlySpan<byte>(block->Source + first, rest)))
            {
                block->Generation = Block.Dead;
                return false;
            }
        }

        if (settled)
        {
            block->Generation = block->DecodedGeneration;
        }

        return true;
    }

    private bool OthersHavePassed(CpuContext* cpu, long epoch)
    {
        bool all = true;
        foreach (SoftVcpu other in Vm.Vcpus)
        {
            CpuContext* context = other._cpu;
            if (context == cpu || Volatile.Read(ref context->SeenEpoch) >= epoch || Volatile.Read(ref context->Safe) != 0)
            {
                continue;
            }

            all = false;
            if ((++_youngTries & 63) == 0)
            {
                Interlocked.Or(ref context->Request, RequestBits.Look);
            }
        }

        return all;
    }

    private Block* DecodeBlock(CpuContext* cpu, ulong linear, ulong physical, uint key, MmuMode mode, uint room)
    {
        for (int attempt = 0; ; attempt++)
        {
            Block* block = TryDecode(cpu, linear, physical, key, mode, room, out bool again);
            if (!again || attempt > 100)
            {
                return block;
            }
        }
    }

    private Block* TryDecode(
        CpuContext* cpu, ulong linear, ulong physical, uint key, MmuMode mode, uint room, out bool again)
    {
        again = false;
        byte* host = Paging.HostForRead(cpu, physical);
        int inPage = 4096 - (int)(physical & Mem.PageOffset);
        int window = Math.Min(inPage, WindowBytes);
        byte* bytes = (byte*)Unsafe.AsPointer(ref _window[0]);
        bool cached = host != null && CachesCode;
        if (host != null)
        {
            Unsafe.CopyBlockUnaligned(bytes, host, (uint)window);
        }
        else
        {
            // Code in a device's registers: fetched anew every time, one instruction at a time.
            window = Math.Min(window, MaxInsnBytes);
            Paging.ReadPhysical(cpu, physical, bytes, window);
            key |= BlockKey.Single;
        }

        int limit = (int)Math.Min((uint)window, room);
        int size = (int)(key & BlockKey.SizeMask);
        // SAFETY: _scratch is pinned for the life of the vCPU and has room for MaxInsns records, the terminator and
        // the alignment; maximum bounds what is decoded.
        Insn* records = (Insn*)(((ulong)Unsafe.AsPointer(ref _scratch[0]) + 63) & ~63UL);
        int maximum = (key & BlockKey.Single) != 0 ? 1 : MaxInsns;
        int count = 0;
        int at = 0;
        int crossing = 0;
        ulong physical2 = 0;
        byte* host2 = null;
        bool end = false;
        while (!end && count < maximum && at < limit)
        {
            int available = Math.Min(limit - at, MaxInsnBytes);
            DecodeOne(size, bytes + at, available, at, out Instruction instruction);
            Insn* record = records + count;
            if (instruction.IsInvalid && _reader.Exhausted && available < MaxInsnBytes)
            {
                if (count != 0)
                {
                    break;
                }

                // The first instruction goes beyond the page or the segment limit.
                if ((uint)limit == room)
                {
                    Faults.Gp(cpu);
                    return null;
                }

                if (!Paging.Translate(cpu, Tail(cpu, linear), Access.Execute, mode, out Translation tail))
                {
                    return null;
                }

                physical2 = tail.Physical;
                host2 = Paging.HostForRead(cpu, physical2);
                int more = Math.Min(MaxInsnBytes - available, (int)Math.Min(room - (uint)available, MaxInsnBytes));
                if (host2 != null)
                {
                    Unsafe.CopyBlockUnaligned(bytes + available, host2, (uint)more);
                }
                else
                {
                    Paging.ReadPhysical(cpu, physical2, bytes + available, more);
                    cached = false;
                }

                crossing = available;
                DecodeOne(size, bytes, available + more, 0, out instruction);
                if (instruction.IsInvalid && _reader.Exhausted && available + more < MaxInsnBytes)
                {
                    Faults.Gp(cpu);
                    return null;
                }

                end = true;
            }

            if (instruction.IsInvalid)
            {
                *record = default;
                record->Offset = (ushort)at;
                record->Length = (byte)Math.Max(1, Math.Min(instruction.Length, MaxInsnBytes));
                record->Handler = _reader.Consumed >= MaxInsnBytes ? &Misc.GpFault : &Misc.Ud;
                count++;
                at += record->Length;
                break;
            }

            end |= Binder.Bind(this, instruction, new ReadOnlySpan<byte>(bytes + at, instruction.Length), record, key);
            record->Offset = (ushort)at;
            record->Length = (byte)instruction.Length;
            at += instruction.Length;
            count++;
            if (crossing != 0)
            {
                break;
            }
        }

        Insn* terminator = records + count;
        *terminator = default;
        terminator->Handler = &ControlTransfer.EndOfBlock;
        terminator->Offset = (ushort)at;
        return Publish(cpu, physical, key, records, count, bytes, at, host, crossing, physical2, host2, cached, out again);
    }

    private Block* Publish(
        CpuContext* cpu, ulong physical, uint key, Insn* records, int count, byte* bytes, int length, byte* host,
        int crossing, ulong physical2, byte* host2, bool cached, out bool again)
    {
        again = false;
        int crosses = crossing != 0 && length > crossing ? 1 : 0;
        long total = sizeof(Block) + 63 + ((long)sizeof(Insn) * (count + 1)) + length;
        byte* memory = cpu->Blocks.Allocate(total);
        if (memory == null)
        {
            cpu->Blocks.Clear();
            cpu->Blocks.Overflows++;
            memory = cpu->Blocks.Allocate(total);
        }

        // SAFETY: Allocate gave "total" bytes, which count the header, 63 bytes of alignment, count + 1 records and
        // the source; an empty arena always has room for the largest block, and it lives as long as the vCPU.
        var block = (Block*)memory;
        *block = default;
        block->First = (Insn*)(((ulong)memory + (ulong)sizeof(Block) + 63) & ~63UL);
        block->Count = count;
        block->Physical = physical;
        block->Key = key;
        block->Bytes = length;
        block->Crosses = crosses;
        block->Physical2 = physical2;
        block->Source = (byte*)(block->First + count + 1);
        Unsafe.CopyBlockUnaligned(block->First, records, (uint)((count + 1) * sizeof(Insn)));
        Unsafe.CopyBlockUnaligned(block->Source, bytes, (uint)length);
        cpu->Blocks.Decoded++;
        if (!cached)
        {
            block->Generation = Block.Dead;
            block->PageGeneration = null;
            block->Key |= BlockKey.Single;
            return block;
        }

        int first = crosses != 0 ? crossing : length;
        block->PageGeneration = Mark(cpu, physical, host, first, out int generation);
        block->DecodedGeneration = generation;
        block->Generation = generation;
        if (crosses != 0)
        {
            block->PageGeneration2 = Mark(cpu, physical2, host2, length - crossing, out block->Generation2);
        }

        // Only now do the bytes count: whoever changed them before saw no mark.
        bool same = new ReadOnlySpan<byte>(host, first).SequenceEqual(new ReadOnlySpan<byte>(bytes, first)) &&
            IsMarked(cpu, physical, host, first);
        if (crosses != 0)
        {
            same = same && IsMarked(cpu, physical2, host2, length - crossing) &&
                new ReadOnlySpan<byte>(host2, length - crossing).SequenceEqual(
                    new ReadOnlySpan<byte>(bytes + crossing, length - crossing));
        }

        if (!same)
        {
            again = true;
            return block;
        }

        if (cpu->Shared->Vcpus > 1)
        {
            block->Generation = Block.Young;
            block->Epoch = Interlocked.Increment(ref cpu->Shared->Epoch);
        }

        cpu->Blocks.Insert(block);
        return block;
    }

    private static byte* PageFlagsOf(CpuContext* cpu, ulong physical)
    {
        SlotInfo* slot = Paging.FindSlot(cpu, physical);
        return slot == null || slot->PageFlags == null ? null : slot->PageFlags + ((physical - slot->Start) >> 12);
    }

    private static int* Mark(CpuContext* cpu, ulong physical, byte* host, int length, out int generation)
    {
        CodeInfo* info = CodePages.Info(cpu->Shared, host);
        byte* flags = PageFlagsOf(cpu, physical);
        if (flags != null && (Volatile.Read(ref *flags) & (byte)PageFlags.Code) == 0)
        {
            AtomicByte.Or(flags, (byte)PageFlags.Code);
            Sites.DropStores(cpu);
            for (int i = 0; i < VmShared.MaxVcpus && cpu->Shared->Vcpus > 1; i++)
            {
                var other = (CpuContext*)Volatile.Read(ref cpu->Shared->Contexts[i]);
                if (other != null && other != cpu)
                {
                    Interlocked.Or(ref other->Request, RequestBits.Stores);
                }
            }
        }

        long mask = CodePages.Mask(host, length);
        if ((Volatile.Read(ref info->Granules) & mask) != mask)
        {
            Interlocked.Or(ref info->Granules, mask);
        }

        Interlocked.MemoryBarrier();
        generation = Volatile.Read(ref info->Generation);
        return &info->Generation;
    }

    private static bool IsMarked(CpuContext* cpu, ulong physical, byte* host, int length)
    {
        byte* flags = PageFlagsOf(cpu, physical);
        long mask = CodePages.Mask(host, length);
        return (flags == null || (Volatile.Read(ref *flags) & (byte)PageFlags.Code) != 0) &&
            (Volatile.Read(ref CodePages.Info(cpu->Shared, host)->Granules) & mask) == mask;
    }

    private void DecodeOne(int size, byte* bytes, int available, int offset, out Instruction instruction)
    {
        Decoder decoder = _decoders[size] ??= Decoder.Create(16 << size, _reader, DecoderOptions.Pcommit);
        _reader.Set(bytes, available);
        decoder.IP = (ulong)offset;
        decoder.Decode(out instruction);
    }

    private sealed class PointerReader : CodeReader
    {
        private byte* _start;
        private byte* _at;
        private byte* _end;

        /// <summary>The decoder asked for more than there was.</summary>
        public bool Exhausted { get; private set; }

        public int Consumed => (int)(_at - _start);

        public void Set(byte* bytes, int length)
        {
            _start = bytes;
            _at = bytes;
            _end = bytes + length;
            Exhausted = false;
        }

        public override int ReadByte()
        {
            if (_at < _end)
            {
                return *_at++;
            }

            Exhausted = true;
            return -1;
        }
    }
}
