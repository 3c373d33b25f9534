// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using Iced.Intel;
using Vmm.Core;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests.Hostile;

/// <summary>What a hostile guest runs in.</summary>
public enum HostileMode
{
    Real,
    Virtual8086,
    Protected16,
    Protected32,
    Paged32,
    Pae,
    LongKernel,
    LongUser,
    Compatibility,
    FiveLevel,
}

// Theory. Random bytes fault after a few instructions. So that a guest made of them runs on without leaving Run, its ROM
// holds a supervisor that the guest cannot damage: every vector's gate leads to one routine, which takes the next of 512
// prepared frames (where to go on, at which level, with which flags and stack), loads the registers from a pool and
// returns to the frame by IRET. ROM also holds the GDT, the page tables and the task segments; what the guest can do is
// load other ones, or switch off what the routine rests on, and then it shuts down or stands still and is started again.
// Frames, pool, descriptors behind the first sixteen, gates from 32 on and half of the page tables are random, too, with
// values that are nearly right.
//
// The TSC counts instructions (HostileGuest), so that the routine can leave a note of when it last ran.

/// <summary>Builds the ROM of a hostile guest and the state to enter it with.</summary>
internal sealed class HostileRom
{
    public const int Bytes = 0x20000;
    public const int Frames = 512;

    /// <summary>RAM up to here is the supervisor's; random code lies between this and the ROM.</summary>
    public const uint CodeStart = 0x10000;

    private const uint Idt = 0;
    private const uint Gdt = 0x1000;
    private const uint Tss = 0x1800;
    private const uint FaultTss = 0x1900;
    private const uint Routine = 0x2000;
    private const uint Pool = 0x3000;
    private const uint PoolMask = 0x1FF8;
    private const uint FrameAt = 0x8000;
    private const int FrameShift = 6;
    private const uint Tables = 0x12000;
    private const uint Ldt = 0x9000;
    private const uint LooseTss = 0xA000;

    // Selectors.
    private const ushort Code64 = 0x08;
    private const ushort Data = 0x10;
    private const ushort Code32 = 0x18;
    private const ushort UserData = 0x23;
    private const ushort UserCode64 = 0x2B;
    private const ushort UserCode32 = 0x33;
    private const ushort Code16 = 0x38;
    private const ushort TaskSelector = 0x40;
    private const ushort UserCode16 = 0x53;
    private const ushort UserData16 = 0x5B;
    private const ushort FaultTask = 0x60;
    private const ushort LdtSelector = 0x68;

    private readonly HostileMode _mode;
    private readonly uint _base;
    private readonly uint _notes;
    private readonly uint _stack;
    private readonly Random _random;
    private readonly byte[] _rom = new byte[Bytes];

    /// <param name="mode">What the guest runs in.</param>
    /// <param name="index">Which vCPU it is for: each has its ROM, notes and stack.</param>
    /// <param name="random">Where everything random comes from.</param>
    public HostileRom(HostileMode mode, int index, Random random)
    {
        _mode = mode;
        _random = random;
        _base = 0xE0000 - ((uint)index * Bytes);
        _notes = 0x500 + ((uint)index * 0x100);
        _stack = 0x8000 - ((uint)index * 0x1000);
    }

    /// <summary>Guest-physical address of the ROM.</summary>
    public uint Base => _base;

    /// <summary>Where the routine counts its calls (8 bytes), and behind it the TSC of the last.</summary>
    public uint Notes => _notes;

    /// <summary>Where frames lead to: linear addresses in RAM.</summary>
    public List<uint> Targets { get; } = [];

    /// <summary>Instructions of the longest way through the routine.</summary>
    public int RoutineLength { get; private set; }

    private bool IsLong => _mode >= HostileMode.LongKernel;

    private bool IsReal => _mode == HostileMode.Real;

    /// <summary>A new ROM image.</summary>
    public ReadOnlySpan<byte> Build()
    {
        Array.Clear(_rom);
        Targets.Clear();
        BuildPool();
        if (IsReal)
        {
            for (uint i = 0; i < 256; i++)
            {
                Put32(Idt + (i * 4), (_base >> 4 << 16) | Routine);
            }
        }
        else
        {
            BuildDescriptors();
            BuildGates();
            BuildTasks();
        }

        BuildTables();
        BuildRoutine();
        for (uint i = 0; i < Frames; i++)
        {
            BuildFrame(FrameAt + (i << FrameShift));
        }

        return _rom;
    }

    /// <summary>State that starts at the routine.</summary>
    public void Enter(CpuState state)
    {
        state.Reset(false, 0xA00F11);
        state.ApicBase = 0xFEE00900;
        state.Activity = ActivityState.Running;
        state.IdtBase = _base + Idt;
        state.IdtLimit = 0xFFF;
        state.Rip = Routine;
        state.Gpr[4] = _stack;
        state.Xcr0 = Pick<ulong>(1, 3, 7, 0x207);
        BitConverter.TryWriteBytes(state.Xsave, (ushort)(Likely(2) ? 0x37F : _random.Next(0x10000)));
        BitConverter.TryWriteBytes(state.Xsave.AsSpan(24), Likely(2) ? 0x1F80 : _random.Next(0x10000) & 0xFFBF);
        state.Xsave[512] = 3;
        if (_random.Next(4) == 0)
        {
            for (int i = 0; i < 4; i++)
            {
                state.Debug[i] = Address();
            }

            state.Debug[5] = 0x400 | ((uint)_random.Next() & 0xFFFF00FF);
        }

        uint cr0 = 0x10 | (Likely(8) ? 0 : 4U) | (Likely(8) ? 0 : 8U) | (Likely(2) ? 2U : 0) | (Likely(2) ? 0x20U : 0);
        uint cr4 = (uint)(Likely(8) ? 0x600 : 0) | (Likely(4) ? 0x40000U : 0) | (Likely(2) ? 0x3U : 0) |
            (Likely(2) ? 0 : 8U) | (Likely(2) ? 0 : 0x100U) | (Likely(2) ? 0 : 0x800U) | (Likely(2) ? 0x80U : 0);
        if (IsReal)
        {
            state.IdtLimit = 0x3FF;
            state.Segments[1] = new SegmentState
            {
                Selector = (ushort)(_base >> 4),
                Base = _base,
                Limit = 0xFFFF,
                Rights = 0x9B,
            };
            state.Cr0 = cr0;
            state.Cr4 = cr4;
            return;
        }

        state.Rip = _base + Routine;
        state.GdtBase = _base + Gdt;
        state.GdtLimit = 0x3FF;
        for (int i = 0; i < 6; i++)
        {
            state.Segments[i] = new SegmentState { Selector = Data, Limit = uint.MaxValue, Rights = 0xC093 };
        }

        state.Segments[1] = new SegmentState
        {
            Selector = IsLong ? Code64 : Code32,
            Limit = uint.MaxValue,
            Rights = IsLong ? 0xA09B : 0xC09BU,
        };
        state.Tr = new SegmentState { Selector = TaskSelector, Base = _base + Tss, Limit = 0xE7, Rights = 0x8B };
        state.Ldtr = new SegmentState { Selector = LdtSelector, Base = Ldt, Limit = 0xFFF, Rights = 0x82 };
        cr0 |= 1 | (Likely(2) ? 0x10000U : 0) | (Likely(2) ? 0x40000U : 0);
        bool isPaged = _mode >= HostileMode.Paged32;
        if (isPaged)
        {
            cr0 |= 0x80000000;
            cr4 |= 0x10;
            cr4 |= Likely(8) ? 0 : 0x200000U;
            state.Cr3 = _base + Tables + (_mode == HostileMode.FiveLevel ? 0 : _mode is HostileMode.Pae ? 0x2000U : 0x1000);
        }

        cr4 |= _mode >= HostileMode.Pae ? 0x20U : 0;
        if (IsLong)
        {
            state.Efer = 0xD01;
            cr4 |= (Likely(2) ? 0x10000U : 0) | (Likely(4) ? 0 : 0x400000U) | (Likely(2) ? 0 : 0x20000U);
            cr4 |= _mode == HostileMode.LongUser ? (Likely(2) ? 0 : 0x100000U) : 0;
            cr4 |= _mode == HostileMode.FiveLevel ? 0x1000U : 0;
        }
        else if (_mode == HostileMode.Pae)
        {
            state.Efer = Likely(2) ? 0x801UL : 1;
        }

        state.Cr0 = cr0;
        state.Cr4 = cr4;
    }

    private void BuildPool()
    {
        for (uint i = 0; i <= PoolMask + 0x80; i += 8)
        {
            ulong value = _random.Next(8) switch
            {
                0 => (ulong)_random.NextInt64(),
                1 => (ulong)_random.Next(64),
                2 => 1UL << _random.Next(64),
                3 => ulong.MaxValue - (ulong)_random.Next(64),
                4 => 0x80000000_00000000 | (uint)_random.Next(),
                _ => Address(),
            };
            Put64(Pool + i, value);
        }
    }

    private void BuildDescriptors()
    {
        Put64(Gdt + Code64, 0x00AF9B000000FFFF);
        Put64(Gdt + Data, 0x00CF93000000FFFF);
        Put64(Gdt + Code32, 0x00CF9B000000FFFF);
        Put64(Gdt + (UserData & ~7U), 0x00CFF3000000FFFF);
        Put64(Gdt + (UserCode64 & ~7U), 0x00AFFB000000FFFF);
        Put64(Gdt + (UserCode32 & ~7U), 0x00CFFB000000FFFF);
        Put64(Gdt + Code16, 0x00009B020000FFFF);
        Put64(Gdt + TaskSelector, Descriptor(_base + Tss, 0xE7, 0x89));
        Put64(Gdt + (UserCode16 & ~7U), 0x0000FB030000FFFF);
        Put64(Gdt + (UserData16 & ~7U), 0x0000F3040000FFFF);
        Put64(Gdt + FaultTask, Descriptor(_base + FaultTss, 0x67, 0x89));
        Put64(Gdt + LdtSelector, Descriptor(Ldt, 0xFFF, 0x82));
        Put64(Gdt + 0x70, 0x00CFFF000000FFFF);
        Put64(Gdt + 0x78, 0x00CFF700000000FF);
        for (uint at = 0x80; at < 0x400; at += 8)
        {
            Put64(Gdt + at, RandomDescriptor());
        }
    }

    // Of any type: segments over RAM, gates to the routine, to the code or to anything, task segments in RAM.
    private ulong RandomDescriptor()
    {
        uint type = (uint)_random.Next(32);
        uint rights = type | ((uint)_random.Next(4) << 5) | (Likely(8) ? 0x80U : 0);
        return type switch
        {
            1 or 2 or 3 or 9 or 11 when Likely(4) => Descriptor(LooseTss + ((uint)_random.Next(16) * 0x80), 0x67, rights),
            4 or 5 or 6 or 7 or 12 or 14 or 15 when Likely(4) => Gate(
                Likely(2) ? Target() : _base + Routine,
                (uint)_random.Next(0x80) << 3 | (uint)_random.Next(8),
                rights,
                (uint)_random.Next(4)),
            < 16 when Likely(2) => (ulong)_random.NextInt64(),
            _ => Descriptor((uint)_random.Next(0xE0000), (uint)_random.Next(0x100000), rights) |
                ((ulong)_random.Next(16) << 52),
        };
    }

    private void BuildGates()
    {
        for (uint i = 0; i < 256; i++)
        {
            uint rights = 0x8EU | (uint)(_random.Next(2)) | (Likely(2) ? 0x60U : 0);
            bool isOdd = i >= 32 && _random.Next(6) == 0;
            ulong gate = isOdd ? RandomDescriptor() : Gate(_base + Routine, IsLong ? Code64 : Code32, rights, IsLong ? 1U : 0);
            if (IsLong)
            {
                Put64(Idt + (i * 16), gate);
                Put64(Idt + (i * 16) + 8, isOdd && Likely(4) ? (ulong)_random.Next() : 0);
            }
            else
            {
                Put64(Idt + (i * 8), i == 8 ? Gate(0, FaultTask, 0x85, 0) : gate);
            }
        }
    }

    private void BuildTasks()
    {
        if (IsLong)
        {
            Put64(Tss + 4, _stack - 0x400);
            Put64(Tss + 12, _stack - 0x400);
            Put64(Tss + 20, _stack - 0x400);
            for (uint i = 0; i < 7; i++)
            {
                Put64(Tss + 36 + (i * 8), _stack);
            }
        }
        else
        {
            foreach (uint at in (ReadOnlySpan<uint>)[Tss, FaultTss])
            {
                for (uint i = 0; i < 3; i++)
                {
                    Put32(at + 4 + (i * 8), _stack);
                    Put32(at + 8 + (i * 8), Data | i);
                }

                Put32(at + 0x1C, _base + Tables + (_mode is HostileMode.Pae ? 0x2000U : 0x1000));
                Put32(at + 0x20, _base + Routine);
                Put32(at + 0x24, 2);
                Put32(at + 0x38, _stack);
                for (uint i = 0; i < 6; i++)
                {
                    Put32(at + 0x48 + (i * 4), i == 1 ? Code32 : Data);
                }
            }
        }

        // Ports: some allowed, some not. In a 32-bit TSS the redirection bitmap of virtual-8086 mode lies before them.
        Put16(Tss + 102, 0x88);
        for (uint i = 0x68; i < 0xE8; i++)
        {
            _rom[Tss + i] = (byte)_random.Next(256);
        }
    }

    // The first 2 MiB identically, the supervisor's part for supervisors only. The same again at most other addresses of
    // 32 bits, sign-extended ones too, so that what random displacements lead to is there; between them anything.
    private void BuildTables()
    {
        uint at = Tables;
        ulong self = _base + Tables;
        if (_mode == HostileMode.Paged32)
        {
            for (uint i = 0; i < 1024; i++)
            {
                ulong entry = IsAlias(i) ? (self + 0x4000) | 7 : RandomEntry(22);
                Put32(at + 0x1000 + (i * 4), (uint)entry);
                Put32(at + 0x4000 + (i * 4), (uint)Page(i));
            }

            return;
        }

        for (uint i = 0; i < 512; i++)
        {
            bool isNear = i is < 4 or >= 508;
            Put64(at + (i * 8), i is 0 or 511 ? (self + 0x1000) | 7 : RandomEntry(48));
            Put64(at + 0x1000 + (i * 8), i is 0 or 511 ? (self + 0x2000) | 7 : RandomEntry(39));
            Put64(at + 0x2000 + (i * 8), isNear ? (self + 0x3000) | (IsLong ? 7UL : 1) : RandomEntry(30));
            Put64(at + 0x3000 + (i * 8), IsAlias(i) ? (self + 0x4000) | 7 : RandomEntry(21));
            Put64(at + 0x4000 + (i * 8), Page(i));
        }

        if (_mode == HostileMode.Pae)
        {
            // Bits of the three other pointers that are reserved would refuse CR3.
            for (uint i = 1; i < 4; i++)
            {
                Put64(at + 0x2000 + (i * 8), (self + 0x3000) | (_random.Next(4) == 0 ? 0U : 1));
            }
        }
    }

    private bool IsAlias(uint index) => index == 0 || Likely(8);

    private ulong Page(uint index) => index < 0x100 ? Identity(index)
        : Likely(16) ? Identity((uint)_random.Next(0x10, 0xC0)) : RandomEntry(12);

    private ulong Identity(uint page)
    {
        ulong entry = ((ulong)page << 12) | 0x63;
        bool isUser = page >= CodeStart >> 12 && page < 0xC0 && _random.Next(64) != 0;
        entry |= isUser ? 4UL : 0;
        entry &= isUser && _random.Next(16) == 0 ? ~2UL : ulong.MaxValue;
        entry |= isUser && IsLong && _random.Next(4) == 0 ? (ulong)_random.Next(16) << 59 : 0;
        return entry;
    }

    private ulong RandomEntry(int shift)
    {
        if (_random.Next(32) == 0)
        {
            return (ulong)_random.NextInt64();
        }

        ulong entry = (uint)_random.Next(0x200) | (_random.Next(4) == 0 ? 0UL : 1);
        entry |= Likely(2) ? 6UL : 0;
        if (shift > 12 && (entry & 0x80) == 0)
        {
            return entry | ((Likely(2) ? _base + Tables + ((uint)_random.Next(5) << 12) : Address()) & ~0xFFFUL);
        }

        entry |= Likely(2) ? 0 : (ulong)_random.Next(16) << 59;
        entry |= Likely(8) ? 0 : 1UL << 63;
        return entry | (Likely(8) ? (ulong)_random.Next(0x200) << 12 : (ulong)_random.NextInt64() & 0x3FFF_FFFFF000);
    }

    private void BuildFrame(uint at)
    {
        uint target = Target();
        ulong flags = 2 | ((uint)_random.Next() & 0xCD5) | (Likely(8) ? 0 : 0x100U) | (Likely(4) ? 0x200U : 0) |
            (Likely(2) ? 0x3000U : 0) | (Likely(16) ? 0 : 0x4000U) | (Likely(8) ? 0 : 0x10000U) | (Likely(8) ? 0 : 0x40000U);
        ulong stack = Likely(4) ? ((ulong)_random.Next((int)CodeStart, 0xB0000) & ~7UL) : Address();
        uint segment = 0;
        switch (_mode)
        {
            case HostileMode.Real:
            case HostileMode.Virtual8086:
                segment = (uint)_random.Next((int)target >> 4 > 0xFFF ? ((int)target >> 4) - 0xFFF : 0, ((int)target >> 4) + 1);
                target -= segment << 4;
                stack &= 0xFFFF;
                flags |= _mode == HostileMode.Virtual8086 ? 0x20000UL : 0;
                break;
            case HostileMode.Protected16:
                segment = Pick<uint>(Code16, UserCode16);
                target &= 0xFFFF;
                stack &= 0xFFFF;
                break;
            case HostileMode.Protected32:
            case HostileMode.Paged32:
            case HostileMode.Pae:
                segment = Pick<uint>(Code32, UserCode32, UserCode32);
                break;
            case HostileMode.LongKernel:
            case HostileMode.FiveLevel:
                segment = Likely(8) ? Code64 : UserCode64;
                break;
            case HostileMode.LongUser:
                segment = UserCode64;
                break;
            default:
                segment = Pick<uint>(Code32, UserCode32, UserCode32, UserCode16, Code16);
                target = segment is UserCode16 or Code16 ? target & 0xFFFF : target;
                break;
        }

        Targets.Add(segment switch
        {
            _ when IsReal || _mode == HostileMode.Virtual8086 => (segment << 4) + target,
            Code16 => 0x20000 + target,
            UserCode16 => 0x30000 + target,
            _ => target,
        });
        uint stackSegment = IsReal || _mode == HostileMode.Virtual8086 ? (uint)_random.Next(0x1000, 0xB000)
            : segment == UserCode16 ? UserData16 : (segment & 3) == 3 ? UserData : Data;
        int word = IsLong ? 8 : 4;
        ReadOnlySpan<ulong> frame = [target, segment, flags, stack, stackSegment, Paragraph(), Paragraph(), 0x40, Paragraph()];
        for (int i = 0; i < Math.Min(frame.Length, 64 / word); i++)
        {
            if (IsLong)
            {
                Put64(at + (uint)(i * 8), frame[i]);
            }
            else
            {
                Put32(at + (uint)(i * 4), (uint)frame[i]);
            }
        }
    }

    private void BuildRoutine()
    {
        var assembler = new Assembler(IsReal ? 16 : IsLong ? 64 : 32);
        switch (_mode)
        {
            case HostileMode.Real:
                AssembleReal(assembler);
                break;
            case >= HostileMode.LongKernel:
                AssembleLong(assembler);
                break;
            default:
                AssembleProtected(assembler);
                break;
        }

        RoutineLength = assembler.Instructions.Count;
        using var stream = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(stream), IsReal ? Routine : _base + Routine);
        stream.ToArray().CopyTo(_rom.AsSpan((int)Routine));
    }

    private void AssembleReal(Assembler a)
    {
        a.cli();
        a.cld();
        a.xor(ax, ax);
        a.mov(ds, ax);
        TakeNoteAndDraw(a);
        a.mov(si, bx);
        a.and(bx, (Frames - 1) << FrameShift);
        a.and(si, (int)PoolMask);
        a.mov(ss, __.cs[bx + (int)FrameAt + 16]);
        a.mov(esp, __dword_ptr.cs[bx + (int)FrameAt + 12]);
        a.mov(es, __.cs[bx + (int)FrameAt + 20]);
        a.mov(fs, __.cs[bx + (int)FrameAt + 24]);
        a.push(__word_ptr.cs[bx + (int)FrameAt + 8]);
        a.push(__word_ptr.cs[bx + (int)FrameAt + 4]);
        a.push(__word_ptr.cs[bx + (int)FrameAt]);
        a.mov(eax, __dword_ptr.cs[si + (int)Pool]);
        a.mov(ecx, __dword_ptr.cs[si + (int)Pool + 8]);
        a.mov(edx, __dword_ptr.cs[si + (int)Pool + 16]);
        a.mov(ebp, __dword_ptr.cs[si + (int)Pool + 24]);
        a.mov(edi, __dword_ptr.cs[si + (int)Pool + 32]);
        a.mov(ds, __.cs[bx + (int)FrameAt + 32]);
        a.mov(ebx, __dword_ptr.cs[si + (int)Pool + 40]);
        a.mov(esi, __dword_ptr.cs[si + (int)Pool + 48]);
        a.iret();
    }

    private void AssembleProtected(Assembler a)
    {
        Label go = a.CreateLabel();
        a.mov(eax, UserData);
        a.mov(ds, ax);
        a.mov(es, ax);
        a.mov(eax, Data);
        a.mov(ss, ax);
        a.mov(esp, _stack);
        a.push(2);
        a.popfd();
        TakeNoteAndDraw(a);
        a.mov(esi, ebx);
        a.and(ebx, (Frames - 1) << FrameShift);
        a.and(esi, (int)PoolMask);
        a.lea(esp, __[ebx + (_base + FrameAt)]);
        a.test(__dword_ptr[esp + 8], 0x20000);
        a.jne(go);
        a.test(__byte_ptr[esp + 4], 3);
        a.jne(go);

        // To the same level: IRET takes no stack from the frame.
        a.mov(ebx, esp);
        a.mov(esp, __dword_ptr[ebx + 12]);
        a.push(__dword_ptr[ebx + 8]);
        a.push(__dword_ptr[ebx + 4]);
        a.push(__dword_ptr[ebx]);
        a.Label(ref go);
        a.mov(eax, __dword_ptr[esi + (_base + Pool)]);
        a.mov(ecx, __dword_ptr[esi + (_base + Pool + 8)]);
        a.mov(edx, __dword_ptr[esi + (_base + Pool + 16)]);
        a.mov(ebx, __dword_ptr[esi + (_base + Pool + 24)]);
        a.mov(ebp, __dword_ptr[esi + (_base + Pool + 32)]);
        a.mov(edi, __dword_ptr[esi + (_base + Pool + 40)]);
        a.mov(esi, __dword_ptr[esi + (_base + Pool + 48)]);
        a.iretd();
    }

    private void AssembleLong(Assembler a)
    {
        a.mov(eax, UserData);
        a.mov(ds, eax);
        a.mov(es, eax);
        a.rdtsc();
        a.shl(rdx, 32);
        a.or(rax, rdx);
        a.mov(__qword_ptr[_notes + 8], rax);
        a.imul(rbx, __qword_ptr[_notes + 16], 0x41C64E6D);
        a.lea(rbx, __[rbx + rax + 12345]);
        a.mov(__qword_ptr[_notes + 16], rbx);
        a.inc(__qword_ptr[_notes]);
        a.shr(rbx, 12);
        a.mov(rsi, rbx);
        a.and(ebx, (Frames - 1) << FrameShift);
        a.and(esi, (int)PoolMask);
        a.lea(rsp, __[rbx + (_base + FrameAt)]);
        a.lea(rsi, __[rsi + (_base + Pool)]);
        AssemblerRegister64[] registers = [rax, rcx, rdx, rbx, rbp, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        for (int i = 0; i < registers.Length; i++)
        {
            a.mov(registers[i], __qword_ptr[rsi + (i * 8)]);
        }

        a.mov(rsi, __qword_ptr[rsi + (registers.Length * 8)]);
        a.iretq();
    }

    // Notes when the routine ran and how often, and leaves in EBX a random number that chooses frame and registers. The
    // generator is congruential with the TSC mixed in, its state behind the notes; its low bits are poor and shifted out.
    private void TakeNoteAndDraw(Assembler a)
    {
        a.rdtsc();
        a.mov(__dword_ptr[_notes + 8], eax);
        a.mov(__dword_ptr[_notes + 12], edx);
        a.imul(ebx, __dword_ptr[_notes + 16], 0x41C64E6D);
        a.lea(ebx, __[ebx + eax + 12345]);
        a.mov(__dword_ptr[_notes + 16], ebx);
        a.inc(__dword_ptr[_notes]);
        a.shr(ebx, 12);
    }

    private uint Target() => (uint)_random.Next((int)CodeStart, 0xB0000);

    private uint Paragraph() => (uint)_random.Next(0x1000, 0xC000);

    private ulong Address() => _random.Next(16) switch
    {
        0 => (ulong)_random.Next(0x1000) + 0xFFFF_F000,
        1 => (ulong)_random.Next(0x40000000),
        2 => 0xFFFF8000_00000000UL | (uint)_random.Next(),
        3 => 0x00007FFF_FFFFFF00UL + (ulong)_random.Next(0x200),
        4 => (ulong)_random.Next(0xE0000, 0x100000),
        5 => (ulong)_random.Next((int)CodeStart),
        6 => 0xFEE00000UL + (ulong)_random.Next(0x1000),
        7 => (ulong)_random.Next(0x100000, 0x400000),
        _ => (ulong)_random.Next((int)CodeStart, 0xC0000),
    };

    private bool Likely(int of) => _random.Next(of) != 0;

    private T Pick<T>(params ReadOnlySpan<T> values) => values[_random.Next(values.Length)];

    private static ulong Descriptor(uint at, uint limit, uint rights) =>
        (limit & 0xFFFF) | ((ulong)(at & 0xFFFFFF) << 16) | ((ulong)rights << 40) | ((ulong)(limit >> 16 & 15) << 48) |
        ((ulong)(at >> 24) << 56);

    private static ulong Gate(uint offset, uint selector, uint rights, uint count) =>
        (offset & 0xFFFF) | ((ulong)selector << 16) | ((ulong)count << 32) | ((ulong)rights << 40) |
        ((ulong)(offset >> 16) << 48);

    private void Put16(uint at, ushort value) => MemoryMarshal.Write(_rom.AsSpan((int)at), value);

    private void Put32(uint at, uint value) => MemoryMarshal.Write(_rom.AsSpan((int)at), value);

    private void Put64(uint at, ulong value) => MemoryMarshal.Write(_rom.AsSpan((int)at), value);
}
