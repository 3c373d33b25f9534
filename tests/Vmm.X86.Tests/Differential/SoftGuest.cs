// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using Vmm.Core;
using Vmm.Host;
using Vmm.TestKit;

namespace Vmm.X86.Tests.Differential;

// Theory. The guest is a processor in long mode with the native harness's user address space: code and data at the same
// linear addresses, everything else not present. A small supervisor (its own pages) enters programs with IRETQ and gets
// them back by exceptions: the page where the native harness has its exit code holds INT 80h here, and the handler of
// vector n is "hlt; iretq" at KernelCode + 16 * n. After HLT the vector is known from RIP, and the rest from the
// interrupt frame. A run thus goes through the processor's own privilege changes and exception delivery.

/// <summary>Runs test programs on the software processor.</summary>
internal sealed unsafe class SoftGuest : IDisposable
{
    /// <summary>Supervisor pages; nothing is there on the host.</summary>
    public const ulong KernelBase = 0x3000_0000;

    /// <summary>Their size.</summary>
    public const ulong KernelBytes = 0x4000;

    private const ulong KernelCode = KernelBase;
    private const ulong KernelIdt = KernelBase + 0x1000;
    private const ulong KernelGdt = KernelBase + 0x2000;
    private const ulong KernelTss = KernelBase + 0x2800;
    private const ulong StackTop = KernelBase + 0x4000;
    private const uint ExitVector = 0x80;

    private const ulong TablesAt = 0x1000;
    private const ulong ExitAt = 0xF000;
    private const ulong KernelAt = 0x10000;
    private const ulong DataAt = 0x20000;
    private const ulong CodeAt = 0x40000;
    private const ulong RamBytes = 0x80000;

    private readonly CodeMemory _codeMemory;
    private readonly SoftHypervisor _hypervisor;
    private readonly IVm _vm;
    private readonly SoftVcpu _vcpu;
    private readonly byte* _ram;
    private VcpuExit _exit;

    public SoftGuest(ulong exit64, ulong exit32, bool translate)
    {
        _codeMemory = CodeMemory.TryCreate(SoftHypervisor.CodeMemoryBytes, out string? reason)
            ?? throw new InvalidOperationException(reason);
        _hypervisor = new SoftHypervisor(_codeMemory) { Translate = translate };
        _ram = (byte*)NativeMemory.AlignedAlloc((nuint)RamBytes, 4096);
        NativeMemory.Clear(_ram, (nuint)RamBytes);
        _vm = _hypervisor.CreateVm(new VmOptions
        {
            Ports = new AddressMap("io", 0x10000),
            Mmio = new AddressMap("mmio", 0),
            Clock = new ManualClock(),
        });
        _vm.SetMemorySlot(0, new MemorySlot(0, RamBytes, (nint)_ram, false, false, 0));
        _vcpu = (SoftVcpu)_vm.CreateVcpu(0, new QuietInterruptPort());
        _vcpu.TranslateAfter = 1;
        BuildTables(exit64);
        BuildKernel();
        WriteExit(exit64);
        WriteExit(exit32);
        _vcpu.WriteState(InitialState());

        // Up to the first HLT: the handler of vector 0 is as good as any.
        if (_vcpu.Run(ref _exit) != ExitKind.Halted)
        {
            throw new InvalidOperationException($"the guest's supervisor did not start: {_exit.Detail}");
        }
    }

    /// <summary>What the processor said when it failed.</summary>
    public string? Detail => _exit.Detail;

    /// <summary>The guest's copy of the arena.</summary>
    public Span<byte> Data => new(_ram + DataAt, (int)NativeCpu.DataBytes);

    /// <summary>Forgets decoded code; call after programs were written.</summary>
    public void CodeChanged() => ((SoftVm)_vm).NotifyCodeWritten(CodeAt, NativeCpu.CodeBytes);

    /// <summary>Copies a program and its ending from the host's code arena.</summary>
    public void CopyCode() =>
        new Span<byte>((void*)NativeCpu.CodeBase, (int)NativeCpu.CodeBytes).CopyTo(
            new Span<byte>(_ram + CodeAt, (int)NativeCpu.CodeBytes));

    /// <summary>Runs a program from one image to another.</summary>
    /// <returns>False when the processor did not come back with an exception.</returns>
    public bool Run(NativeImage* input, NativeImage* output, bool is32Bit)
    {
        CpuContext* cpu = _vcpu.Context;
        for (int i = 0; i < 16; i++)
        {
            cpu->Gpr[i] = input->Gpr[i];
        }

        new ReadOnlySpan<byte>(input->Xsave, NativeImage.XsaveBytes).CopyTo(
            new Span<byte>(cpu->Xsave, NativeImage.XsaveBytes));
        ulong* frame = (ulong*)(_ram + KernelAt + (StackTop - KernelBase) - 40);
        frame[0] = input->Rip;
        frame[1] = is32Bit ? 0x23UL : 0x33;
        frame[2] = input->Rflags;
        frame[3] = input->Gpr[4];
        frame[4] = 0x2B;
        cpu->Rsp = StackTop - 40;
        cpu->Activity = (int)ActivityState.Running;
        ExitKind kind = _vcpu.Run(ref _exit);
        while (kind == ExitKind.Interrupted)
        {
            kind = _vcpu.Run(ref _exit);
        }

        if (kind != ExitKind.Halted)
        {
            return false;
        }

        Collect(cpu, output);
        return true;
    }

    public void Dispose()
    {
        _vcpu.Dispose();
        _vm.Dispose();
        _hypervisor.Dispose();
        _codeMemory.Dispose();
        NativeMemory.AlignedFree(_ram);
    }

    private void Collect(CpuContext* cpu, NativeImage* output)
    {
        ulong vector = (cpu->Rip - 1 - KernelCode) / 16;
        bool hasError = vector is 8 or 10 or 11 or 12 or 13 or 14 or 17;
        ulong* frame = (ulong*)(_ram + KernelAt + (StackTop - KernelBase) - 40);
        for (int i = 0; i < 16; i++)
        {
            output->Gpr[i] = cpu->Gpr[i];
        }

        output->Rip = frame[0];
        output->Rflags = frame[2];
        output->Gpr[4] = frame[3];
        output->Vector = vector == ExitVector ? NativeImage.NoFault : vector;
        output->ErrorCode = hasError ? frame[-1] : 0;
        output->Cr2 = cpu->Cr2;
        new ReadOnlySpan<byte>(cpu->Xsave, NativeImage.XsaveBytes).CopyTo(
            new Span<byte>(output->Xsave, NativeImage.XsaveBytes));
    }

    private void BuildTables(ulong exit)
    {
        const ulong Leaf = 0x63; // P, RW, A, D
        const ulong User = 4;
        const ulong NoExecute = 1UL << 63;
        ulong next = TablesAt + 0x2000;
        var pml4 = (ulong*)(_ram + TablesAt);
        var pdpt = (ulong*)(_ram + TablesAt + 0x1000);
        var pd = (ulong*)(_ram + next);
        pml4[0] = (TablesAt + 0x1000) | 0x27;
        pdpt[0] = next | 0x27;
        next += 0x1000;
        MapRange(pd, ref next, NativeCpu.CodeBase, NativeCpu.CodeBytes, CodeAt, Leaf | User);
        MapRange(pd, ref next, exit & ~0xFFFUL, 0x1000, ExitAt, Leaf | User);
        MapRange(pd, ref next, NativeCpu.DataBase, NativeCpu.DataBytes, DataAt, Leaf | User | NoExecute);
        MapRange(pd, ref next, KernelBase, 0x4000, KernelAt, Leaf);
    }

    private void MapRange(ulong* pd, ref ulong next, ulong linear, ulong length, ulong physical, ulong bits)
    {
        for (ulong at = 0; at < length; at += 0x1000)
        {
            ulong* entry = pd + (((linear + at) >> 21) & 511);
            if (*entry == 0)
            {
                *entry = next | 0x27;
                next += 0x1000;
            }

            var table = (ulong*)(_ram + (*entry & ~0xFFFUL));
            table[((linear + at) >> 12) & 511] = (physical + at) | bits;
        }
    }

    private void BuildKernel()
    {
        byte* kernel = _ram + KernelAt;
        for (uint vector = 0; vector < 256; vector++)
        {
            // hlt; iretq
            byte* code = kernel + (16 * vector);
            code[0] = 0xF4;
            code[1] = 0x48;
            code[2] = 0xCF;
            ulong target = KernelCode + (16 * vector);
            ulong* gate = (ulong*)(kernel + 0x1000 + (16 * vector));
            uint rights = vector == ExitVector ? 0xEE00u : 0x8E00;
            gate[0] = (target & 0xFFFF) | (8UL << 16) | ((ulong)rights << 32) | (((target >> 16) & 0xFFFF) << 48);
            gate[1] = target >> 32;
        }

        // As Linux lays it out: 0x08 kernel code, 0x10 kernel data, 0x23 user 32-bit code, 0x2B data, 0x33 64-bit code.
        var gdt = (ulong*)(kernel + 0x2000);
        gdt[1] = 0x00AF9B000000FFFF;
        gdt[2] = 0x00CF93000000FFFF;
        gdt[4] = 0x00CFFB000000FFFF;
        gdt[5] = 0x00CFF3000000FFFF;
        gdt[6] = 0x00AFFB000000FFFF;
        *(ulong*)(kernel + 0x2800 + 4) = StackTop;

        // No I/O permission bitmap: its base lies behind the limit.
        *(ushort*)(kernel + 0x2800 + 102) = 0x100;
    }

    private void WriteExit(ulong at)
    {
        byte* code = _ram + ExitAt + (at & 0xFFF);
        code[0] = 0xCD;
        code[1] = (byte)ExitVector;
    }

    private static CpuState InitialState()
    {
        var state = new CpuState
        {
            Rip = KernelCode,
            Rflags = 2,
            Cr0 = 0x80050033,
            Cr3 = TablesAt,
            Cr4 = 0x506A0,
            Efer = 0xD01,
            Xcr0 = 7,
            GdtBase = KernelGdt,
            GdtLimit = 0x7F,
            IdtBase = KernelIdt,
            IdtLimit = 0xFFF,
            ApicBase = 0xFEE00900,
            Activity = ActivityState.Running,
        };
        for (int i = 0; i < 6; i++)
        {
            state.Segments[i] = new SegmentState { Selector = 0x2B, Limit = uint.MaxValue, Rights = 0xC0F3 };
        }

        state.Segments[1] = new SegmentState { Selector = 8, Limit = uint.MaxValue, Rights = 0xA09B };
        state.Segments[2] = new SegmentState { Selector = 0x10, Limit = uint.MaxValue, Rights = 0xC093 };
        state.Segments[4] = new SegmentState { Limit = uint.MaxValue, Rights = 0xC0F3 };
        state.Segments[5] = new SegmentState
        {
            Base = NativeCpu.GsBase,
            Limit = uint.MaxValue,
            Rights = 0xC0F3,
        };
        state.Tr = new SegmentState { Selector = 0x40, Base = KernelTss, Limit = 0x67, Rights = 0x8B };
        state.Ldtr = new SegmentState { Rights = 0x10000 };
        state.Gpr[4] = StackTop;
        state.Xsave[0] = 0x7F;
        state.Xsave[1] = 3;
        state.Xsave[24] = 0x80;
        state.Xsave[25] = 0x1F;
        state.Xsave[512] = 7;
        return state;
    }
}
