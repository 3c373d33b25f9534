// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Runtime.InteropServices;
using Iced.Intel;
using Vmm.Core;

namespace Vmm.X86.Tests;

/// <summary>An interrupt port that tests drive by hand.</summary>
internal sealed class FakePort : ICpuInterruptPort, IRegisterWindow
{
    public Queue<int> Vectors { get; } = new();

    public bool Nmi { get; set; }

    public bool HasInterrupt => Vectors.Count != 0;

    public bool HasNmi => Nmi;

    public bool HasInit => false;

    public bool HasStartup => false;

    public byte Cr8 { get; set; }

    public ulong ApicBase { get; set; } = 0xFEE00900;

    public bool IsMemoryMapped { get; set; }

    public IRegisterWindow Registers => this;

    public uint Length => 4096;

    public uint LastRegister { get; private set; }

    public int Acknowledge() => Vectors.TryDequeue(out int vector) ? vector : -1;

    public bool TakeNmi()
    {
        bool had = Nmi;
        Nmi = false;
        return had;
    }

    public bool TakeInit() => false;

    public bool TakeStartup(out byte vector)
    {
        vector = 0;
        return false;
    }

    public bool TryReadMsr(uint msr, out ulong value)
    {
        value = ApicBase;
        return msr == 0x1B;
    }

    public bool TryWriteMsr(uint msr, ulong value) => msr == 0x1B;

    public ICpuWaker? Waker { get; private set; }

    public ulong TscOffset { get; private set; }

    public void SetTscOffset(ulong ticks) => TscOffset = ticks;

    public void Attach(ICpuWaker waker) => Waker = waker;

    public ulong Read(uint offset, AccessWidth width)
    {
        LastRegister = offset;
        return 0x12345678;
    }

    public void Write(uint offset, AccessWidth width, ulong value) => LastRegister = offset;
}

/// <summary>Executable memory for the vector thunks.</summary>
internal static class TestCode
{
    public static ICodeMemory? Create() =>
        Vmm.Host.CodeMemory.TryCreate(SoftHypervisor.CodeMemoryBytes, out _);
}

/// <summary>A clock that stands still until told otherwise, or that runs as the host's does.</summary>
internal sealed class FakeClock : IClock
{
    private readonly long _start = Stopwatch.GetTimestamp();
    private long _nowNs = 1000;

    public bool FollowsHost { get; init; }

    public long NowNs
    {
        get => FollowsHost ? _nowNs + (long)Stopwatch.GetElapsedTime(_start).TotalNanoseconds : _nowNs;
        set => _nowNs = value;
    }

    public long UnixTimeNs => 0;

    public IGuestTimer CreateTimer(string name, Action onExpire) => throw new NotSupportedException();
}

/// <summary>A window that records.</summary>
internal sealed class RecordingWindow : IRegisterWindow
{
    public List<(uint Offset, AccessWidth Width, ulong Value)> Writes { get; } = [];

    public uint Length { get; init; } = 0x1000;

    public ulong Value { get; set; } = 0xA5;

    public ulong Read(uint offset, AccessWidth width) => Value;

    public void Write(uint offset, AccessWidth width, ulong value) => Writes.Add((offset, width, value));
}

/// <summary>A VM with one vCPU, RAM from 0, and helpers to put it into a mode.</summary>
internal sealed unsafe class TestVm : IDisposable
{
    public const ulong CodeAt = 0x10000;
    public const ulong PageTables = 0x80000;
    public const ulong GdtAt = 0x90000;
    public const ulong IdtAt = 0x91000;
    public const ulong StackTop = 0xA0000;
    public const ulong TssAt = 0x93000;

    private const int MarginBytes = 64 << 10;
    private const byte Poison = 0xA7;
    private readonly byte* _block;
    private readonly byte* _memory;
    private readonly byte* _flags;

    /// <param name="bytes">RAM.</param>
    /// <param name="vcpus">How many.</param>
    /// <param name="translateAfter">Executions of a block before it is translated; 0 for never.</param>
    /// <param name="countInstructions">Translated code counts what it executes.</param>
    /// <param name="perfMap">Gets a line for each translated block.</param>
    /// <param name="hostClock">Guest time runs.</param>
    /// <param name="deterministic">The vCPU stops at SoftVcpu.StopAt.</param>
    /// <param name="countAccesses">Translated code counts its checks of memory operands.</param>
    /// <param name="logDirty">The memory has a dirty log; stores then look at its flags each time.</param>
    public TestVm(
        ulong bytes = 4 << 20,
        int vcpus = 1,
        int translateAfter = 1,
        bool countInstructions = false,
        TextWriter? perfMap = null,
        bool logDirty = false,
        bool hostClock = false,
        bool deterministic = false,
        bool countAccesses = false)
    {
        Clock = new FakeClock { FollowsHost = hostClock };
        _block = (byte*)NativeMemory.AlignedAlloc((nuint)bytes + (2 * MarginBytes), 4096);
        new Span<byte>(_block, (int)bytes + (2 * MarginBytes)).Fill(Poison);
        _memory = _block + MarginBytes;
        NativeMemory.Clear(_memory, (nuint)bytes);
        _flags = (byte*)NativeMemory.AllocZeroed((nuint)(bytes >> 12) + 8);
        Bytes = bytes;
        var hypervisor = new SoftHypervisor(TestCode.Create())
        {
            Translate = translateAfter != 0,
            CountInstructions = countInstructions,
            Deterministic = deterministic,
            CountAccesses = countAccesses,
            PerfMap = perfMap,
        };
        Vm = (SoftVm)hypervisor.CreateVm(new VmOptions { Ports = Ports, Mmio = Mmio, Clock = Clock });
        Vm.SetMemorySlot(0, new MemorySlot(0, bytes, (nint)_memory, false, logDirty, (nint)_flags));
        for (int i = 0; i < vcpus; i++)
        {
            var port = new FakePort();
            var vcpu = (SoftVcpu)Vm.CreateVcpu(i, port);
            vcpu.SetCpuid([.. hypervisor.SupportedCpuid]);
            vcpu.TranslateAfter = translateAfter;
            AllPorts.Add(port);
            Vcpus.Add(vcpu);
        }
    }

    public ulong Bytes { get; }

    public AddressMap Ports { get; } = new("io", 0x10000);

    public AddressMap Mmio { get; } = new("mmio", 0);

    public FakeClock Clock { get; }

    public SoftVm Vm { get; }

    public List<SoftVcpu> Vcpus { get; } = [];

    public List<FakePort> AllPorts { get; } = [];

    public SoftVcpu Cpu => Vcpus[0];

    public FakePort Port => AllPorts[0];

    public CpuState State { get; } = new();

    public Span<byte> Memory => new(_memory, (int)Bytes);

    public Span<byte> Flags => new(_flags, (int)(Bytes >> 12));

    public nint Host => (nint)_memory;

    /// <summary>False when something wrote beside guest memory.</summary>
    public bool MarginsAreIntact =>
        new ReadOnlySpan<byte>(_block, MarginBytes).IndexOfAnyExcept(Poison) < 0 &&
        new ReadOnlySpan<byte>(_memory + Bytes, MarginBytes).IndexOfAnyExcept(Poison) < 0;

    public ulong Read64(ulong address) => MemoryMarshal.Read<ulong>(Memory[(int)address..]);

    public uint Read32(ulong address) => MemoryMarshal.Read<uint>(Memory[(int)address..]);

    public void Write64(ulong address, ulong value) => MemoryMarshal.Write(Memory[(int)address..], value);

    public void Write32(ulong address, uint value) => MemoryMarshal.Write(Memory[(int)address..], value);

    public void Write16(ulong address, ushort value) => MemoryMarshal.Write(Memory[(int)address..], value);

    /// <summary>Assembles at an address.</summary>
    public int Assemble(ulong at, int bitness, Action<Assembler> program)
    {
        var assembler = new Assembler(bitness);
        program(assembler);
        using var stream = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(stream), at);
        stream.ToArray().CopyTo(Memory[(int)at..]);
        return (int)stream.Length;
    }

    /// <summary>64-bit mode, identity-mapped by 2 MiB pages, flat GDT, IDT whose gates HLT.</summary>
    /// <param name="cpl">Privilege level.</param>
    /// <param name="fiveLevel">With CR4.LA57: the first entry of a fifth table at <see cref="PageTables"/> + 3000h.</param>
    public void EnterLong(int cpl = 0, bool fiveLevel = false)
    {
        BuildLongTables(cpl == 3);
        CpuState state = State;
        state.Reset(false, 0xA00F11);
        state.ApicBase = 0xFEE00900;
        state.Cr0 = 0x80010033;
        state.Cr3 = PageTables;
        state.Cr4 = 0x6A0 | (1 << 9) | (1 << 18) | (1 << 16);
        if (fiveLevel)
        {
            Write64(PageTables + 0x3000, PageTables | 7);
            state.Cr3 = PageTables + 0x3000;
            state.Cr4 |= Cr4.La57;
        }

        state.Xcr0 = 7;
        state.Efer = 0xD01;
        uint dpl = (uint)cpl << 5;
        state.Segments[1] = new SegmentState
        {
            Selector = (ushort)(cpl == 3 ? 0x2B : 8),
            Limit = uint.MaxValue,
            Rights = 0xA09B | dpl,
        };
        for (int i = 0; i < 6; i++)
        {
            if (i != 1)
            {
                state.Segments[i] = new SegmentState
                {
                    Selector = (ushort)(cpl == 3 ? 0x23 : 0x10),
                    Limit = uint.MaxValue,
                    Rights = 0xC093 | dpl,
                };
            }
        }

        state.GdtBase = GdtAt;
        state.GdtLimit = 0x7F;
        state.IdtBase = IdtAt;
        state.IdtLimit = 0xFFF;
        state.Tr = new SegmentState { Selector = 0x40, Base = TssAt, Limit = 0x67, Rights = 0x8B };
        state.Gpr[4] = StackTop;
        state.Rip = CodeAt;
    }

    /// <summary>Flat 32-bit protected mode without paging.</summary>
    public void EnterProtected()
    {
        BuildGdt();
        CpuState state = State;
        state.Reset(false, 0xA00F11);
        state.ApicBase = 0xFEE00900;
        state.Cr0 = 0x33;
        state.Cr4 = 0x600;
        state.Segments[1] = new SegmentState { Selector = 0x18, Limit = uint.MaxValue, Rights = 0xC09B };
        for (int i = 0; i < 6; i++)
        {
            if (i != 1)
            {
                state.Segments[i] = new SegmentState { Selector = 0x10, Limit = uint.MaxValue, Rights = 0xC093 };
            }
        }

        state.GdtBase = GdtAt;
        state.GdtLimit = 0x7F;
        state.IdtBase = IdtAt;
        state.IdtLimit = 0x7FF;
        state.Gpr[4] = StackTop;
        state.Rip = CodeAt;
        for (uint i = 0; i < 256; i++)
        {
            ulong handler = 0x92000 + i;
            Write64(IdtAt + (i * 8), (handler & 0xFFFF) | (0x18UL << 16) | (0x8EUL << 40) | ((handler >> 16) << 48));
        }

        Memory.Slice(0x92000, 256).Fill(0xF4);
    }

    /// <summary>Real mode at 0:CodeAt's segment.</summary>
    public void EnterReal()
    {
        State.Reset(false, 0xA00F11);
        State.ApicBase = 0xFEE00900;
        State.Segments[1] = new SegmentState { Selector = 0x1000, Base = CodeAt, Limit = 0xFFFF, Rights = 0x9B };
        State.Rip = 0;
        State.Gpr[4] = 0x8000;
    }

    public void BuildGdt()
    {
        Write64(GdtAt + 0x00, 0);
        Write64(GdtAt + 0x08, 0x00AF9B000000FFFF);
        Write64(GdtAt + 0x10, 0x00CF93000000FFFF);
        Write64(GdtAt + 0x18, 0x00CF9B000000FFFF);
        Write64(GdtAt + 0x20, 0x00CFF3000000FFFF);
        Write64(GdtAt + 0x28, 0x00AFFB000000FFFF);
        Write64(GdtAt + 0x30, 0x00CFFB000000FFFF);
        Write64(GdtAt + 0x38, 0x00009B000000FFFF);
        Write64(GdtAt + 0x40, 0x0000890000000067 | ((TssAt & 0xFFFFFF) << 16));
        Write64(GdtAt + 0x48, 0);
    }

    /// <summary>Puts the state into the vCPU and runs until HLT (or another exit).</summary>
    public ExitKind Run(int index = 0)
    {
        Vcpus[index].WriteState(State);
        return Continue(index);
    }

    public ExitKind Continue(int index = 0)
    {
        var exit = default(VcpuExit);
        ExitKind kind = Vcpus[index].Run(ref exit);
        Vcpus[index].ReadState(State);
        if (kind == ExitKind.Failed)
        {
            throw new InvalidOperationException(exit.Detail);
        }

        return kind;
    }

    public void Dispose()
    {
        Vm.Dispose();
        NativeMemory.AlignedFree(_block);
        NativeMemory.Free(_flags);
    }

    private void BuildLongTables(bool user)
    {
        BuildGdt();
        ulong bits = user ? 7UL : 3;
        Write64(PageTables, (PageTables + 0x1000) | 7);
        Write64(PageTables + 0x1000, (PageTables + 0x2000) | 7);
        for (uint i = 0; i < 512; i++)
        {
            Write64(PageTables + 0x2000 + (i * 8), ((ulong)i << 21) | 0x80 | bits);
        }

        for (uint i = 0; i < 256; i++)
        {
            ulong handler = 0x92000 + i;
            Write64(IdtAt + (i * 16), (handler & 0xFFFF) | (8UL << 16) | (0x8EUL << 40) | ((handler >> 16) << 48));
            Write64(IdtAt + (i * 16) + 8, 0);
        }

        Memory.Slice(0x92000, 256).Fill(0xF4);
        Write64(TssAt + 4, 0x9F000);
    }
}
