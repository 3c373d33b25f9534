// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Runtime.InteropServices;
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests.Differential;

// Theory. The oracle of the differential tests is the processor that the tests run on. A test program is copied to
// executable memory, entered with every register loaded from an image, and left with every register stored to another.
// Whatever the program does at user level is allowed to happen, faults included: handlers written in machine code
// catch the five signals that exceptions turn into, when they come from a thread inside a program, and copy the kernel's
// record of the interrupted state. All other signals go to the handlers that were there before (the runtime's).
//
// Everything lies at fixed addresses below 2 GiB so that the guest can have the same address space as the host's test
// process (RIP, pointers and page faults then need no translation before they are compared), and so that 32-bit
// programs, entered by a far jump to the compatibility-mode code segment that every Linux has, reach it too.
//
// It does not keep a program from writing to the test process's own memory: the generator does, by choosing addresses.

/// <summary>Registers before or after a test program.</summary>
[StructLayout(LayoutKind.Sequential, Pack = 1)]
internal unsafe struct NativeImage
{
    /// <summary>RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.</summary>
    public fixed ulong Gpr[16];

    public ulong Rip;

    public ulong Rflags;

    /// <summary>Exception vector, or <see cref="NoFault"/>.</summary>
    public ulong Vector;

    public ulong ErrorCode;

    public ulong Cr2;

    private fixed ulong _pad[3];

    /// <summary>Standard-format XSAVE area: legacy region, header, upper halves of YMM.</summary>
    public fixed byte Xsave[XsaveBytes];

    public const int XsaveBytes = 832;
    public const int XsaveOffset = 192;
    public const ulong NoFault = ulong.MaxValue;
}

/// <summary>Runs test programs on the host processor. One thread at a time; Linux only.</summary>
internal sealed unsafe partial class NativeCpu : IDisposable
{
    public const uint CodeBase = 0x1000_0000;
    public const uint CodeBytes = 0x4_0000;
    public const uint DataBase = 0x2000_0000;
    public const uint DataBytes = 0x2000;

    private const uint SystemBase = 0x1080_0000;
    private const uint StubBytes = 0x1000;
    private const uint InputAt = SystemBase + 0x1000;
    private const uint OutputAt = SystemBase + 0x2000;
    private const uint HostAt = SystemBase + 0x3000;

    // FS:[0] of the thread that runs a program, 0 while none does: what makes a signal ours.
    private const uint ThreadAt = HostAt + 24;
    private const uint RecordAt = SystemBase + 0x4000;
    private const uint SystemBytes = 0x8000;

    private const int GregBytes = 23 * 8;
    private static readonly int[] s_signals = [4, 5, 7, 8, 11];
    private static readonly int[] s_gregOrder = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];
    private readonly byte[][] _oldActions = new byte[5][];
    private readonly delegate* unmanaged<void> _enter64;
    private readonly delegate* unmanaged<void> _enter32;

    public NativeCpu()
    {
        MapFixed(CodeBase, CodeBytes, 7);
        MapFixed(SystemBase, SystemBytes, 7);
        MapFixed(DataBase, DataBytes, 3);
        new Span<byte>((void*)CodeBase, (int)CodeBytes).Fill(0xCC);

        ulong enter64 = SystemBase;
        int at = Emit(SystemBase, EmitEnter64);
        ulong enter32 = SystemBase + (uint)at;
        at += Emit(enter32, EmitEnter32);
        Exit64 = SystemBase + (uint)at;
        at += Emit(Exit64, EmitExit64);
        Exit32 = SystemBase + (uint)at;
        at += Emit(Exit32, EmitExit32);
        Landing = SystemBase + (uint)at;
        at += Emit(Landing, EmitLanding);
        _enter64 = (delegate* unmanaged<void>)enter64;
        _enter32 = (delegate* unmanaged<void>)enter32;
        for (int i = 0; i < s_signals.Length; i++)
        {
            at = (at + 15) & ~15;
            ulong handler = SystemBase + (uint)at;
            at += InstallHandler(i, handler);
        }

        if (at > StubBytes)
        {
            throw new InvalidOperationException("the harness's own code overlaps its data");
        }
    }

    /// <summary>Where a 64-bit program goes when it is done.</summary>
    public ulong Exit64 { get; }

    /// <summary>Where a 32-bit program goes when it is done.</summary>
    public ulong Exit32 { get; }

    /// <summary>GS base while a program runs.</summary>
    public static ulong GsBase => DataBase + 0x400;

    /// <summary>Loaded before a program starts.</summary>
    public NativeImage* Input { get; } = (NativeImage*)InputAt;

    /// <summary>What the last program left.</summary>
    public NativeImage* Output { get; } = (NativeImage*)OutputAt;

    /// <summary>Memory that programs may use.</summary>
    public static Span<byte> Data => new((void*)DataBase, (int)DataBytes);

    private ulong Landing { get; }

    /// <summary>Writes a program and, behind it, the jump that ends it.</summary>
    public void WriteProgram(ulong at, ReadOnlySpan<byte> code, bool is32Bit)
    {
        code.CopyTo(new Span<byte>((void*)at, code.Length));
        byte* end = (byte*)at + code.Length;
        end[0] = 0xE9;
        *(int*)(end + 1) = (int)((is32Bit ? Exit32 : Exit64) - ((ulong)end + 5));
    }

    /// <summary>Runs the program at <see cref="Input"/>'s RIP up to its end or its first exception.</summary>
    public void Run(bool is32Bit)
    {
        Output->Vector = 0;
        Output->ErrorCode = 0;
        Output->Cr2 = 0;
        *(ulong*)RecordAt = 0;

        // GS is free on Linux; the guest gets the same base, and the software processor uses it, too. FS belongs to the C
        // library.
        _ = ArchPrctl(0x1001, GsBase);
        if (is32Bit)
        {
            _enter32();
        }
        else
        {
            _enter64();
        }

        if (Output->Vector != NativeImage.NoFault)
        {
            TakeRecord();
        }
    }

    public void Dispose()
    {
        for (int i = 0; i < s_signals.Length; i++)
        {
            fixed (byte* old = _oldActions[i])
            {
                _ = Sigaction(s_signals[i], old, null);
            }
        }

        _ = Unmap((nint)CodeBase, (nint)CodeBytes);
        _ = Unmap((nint)SystemBase, (nint)SystemBytes);
        _ = Unmap((nint)DataBase, (nint)DataBytes);
    }

    private static void MapFixed(uint address, uint length, int protection)
    {
        const int PrivateAnonymousFixedNoReplace = 0x100022;
        nint at = Map((nint)address, (nint)length, protection, PrivateAnonymousFixedNoReplace, -1, 0);
        if (at != (nint)address)
        {
            throw new InvalidOperationException($"cannot map test memory at {address:x}");
        }
    }

    private static int Emit(ulong at, Action<Assembler> body)
    {
        var assembler = new Assembler(64);
        body(assembler);
        var stream = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(stream), at);
        byte[] bytes = stream.ToArray();
        bytes.CopyTo(new Span<byte>((void*)at, bytes.Length));
        return bytes.Length;
    }

    private static AssemblerRegister64[] Registers() =>
        [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

    // 32-bit absolute addresses work in both modes because everything lies below 2 GiB.
    private static AssemblerMemoryOperand At64(uint address) => __qword_ptr[address];

    private static void EmitSaveHost(Assembler a)
    {
        a.push(rbx);
        a.push(rbp);
        a.push(r12);
        a.push(r13);
        a.push(r14);
        a.push(r15);
        a.mov(rax, __qword_ptr.fs[0]);
        a.mov(At64(ThreadAt), rax);
        a.mov(At64(HostAt), rsp);
        a.stmxcsr(__dword_ptr[HostAt + 8]);

        // 64-bit code does not care what DS and ES hold, but can read it; compatibility mode needs a data segment.
        a.mov(eax, 0x2B);
        a.mov(ds, ax);
        a.mov(es, ax);
        a.mov(eax, 7);
        a.xor(edx, edx);
        a.xrstor64(__[InputAt + NativeImage.XsaveOffset]);
        a.push(At64(InputAt + (17 * 8)));
    }

    private static void EmitEnter64(Assembler a)
    {
        EmitSaveHost(a);
        a.popfq();
        AssemblerRegister64[] registers = Registers();
        for (uint i = 0; i < 16; i++)
        {
            a.mov(registers[i], At64(InputAt + (i * 8)));
        }

        a.jmp(At64(InputAt + (16 * 8)));
    }

    // A far jump to the kernel's 32-bit user code segment. The m16:32 pointer is the low half of RIP followed by the selector.
    private static void EmitEnter32(Assembler a)
    {
        EmitSaveHost(a);
        a.mov(eax, __dword_ptr[InputAt + (16 * 8)]);
        a.mov(__dword_ptr[HostAt + 16], eax);
        a.mov(__word_ptr[HostAt + 20], 0x23);
        a.popfq();
        AssemblerRegister64[] registers = Registers();
        for (uint i = 0; i < 16; i++)
        {
            a.mov(registers[i], At64(InputAt + (i * 8)));
        }

        a.jmp(__fword_ptr[HostAt + 16]);
    }

    private static void EmitExit64(Assembler a)
    {
        AssemblerRegister64[] registers = Registers();
        for (uint i = 0; i < 16; i++)
        {
            a.mov(At64(OutputAt + (i * 8)), registers[i]);
        }

        a.mov(rsp, At64(HostAt));
        a.pushfq();
        a.pop(At64(OutputAt + (17 * 8)));
        a.push(2);
        a.popfq();
        a.mov(eax, 7);
        a.xor(edx, edx);
        a.xsave64(__[OutputAt + NativeImage.XsaveOffset]);
        a.mov(At64(OutputAt + (18 * 8)), -1);
        EmitRestoreHost(a);
    }

    // Runs in 32-bit mode up to the far jump: the same encodings (no REX) mean 32-bit registers there.
    private void EmitExit32(Assembler a)
    {
        // jmp 0x33:Exit64, encoded by hand: the 64-bit assembler has no direct far jump.
        a.db(0xEA);
        a.dd((uint)Exit64);
        a.dw(0x33);
    }

    private static void EmitLanding(Assembler a) => EmitRestoreHost(a);

    private static void EmitRestoreHost(Assembler a)
    {
        a.mov(At64(ThreadAt), 0);
        a.fninit();
        a.vzeroupper();
        a.ldmxcsr(__dword_ptr[HostAt + 8]);
        a.xor(eax, eax);
        a.mov(ds, ax);
        a.mov(es, ax);
        a.cld();
        a.pop(r15);
        a.pop(r14);
        a.pop(r13);
        a.pop(r12);
        a.pop(rbp);
        a.pop(rbx);
        a.ret();
    }

    // void handler(int signal, siginfo_t *info, ucontext_t *context), entered on the alternate stack.
    private int InstallHandler(int index, ulong at)
    {
        const int Mcontext = 40;
        const int Rip = Mcontext + (16 * 8);
        uint oldHandlerAt = HostAt + 64 + ((uint)index * 8);
        int length = Emit(at, a =>
        {
            Label chain = a.CreateLabel();
            a.mov(rax, __qword_ptr.fs[0]);
            a.cmp(rax, At64(ThreadAt));
            a.jne(chain);
            a.cld();
            a.mov(r8, rdx);
            a.mov(edi, RecordAt);
            a.lea(rsi, __[r8 + Mcontext]);
            a.mov(ecx, GregBytes / 8);
            a.rep.movsq();
            a.mov(rsi, __qword_ptr[r8 + Mcontext + GregBytes]);
            a.mov(ecx, NativeImage.XsaveBytes / 8);
            a.rep.movsq();
            a.mov(rax, Landing);
            a.mov(__qword_ptr[r8 + Rip], rax);
            a.mov(rax, At64(HostAt));
            a.mov(__qword_ptr[r8 + Mcontext + (15 * 8)], rax);
            a.mov(__qword_ptr[r8 + Rip + 8], 0x202);
            a.mov(__word_ptr[r8 + Rip + 16], 0x33);
            a.ret();
            a.Label(ref chain);
            a.jmp(At64(oldHandlerAt));
        });

        const int SaSiginfoOnstack = 0x0800_0004;
        byte[] action = new byte[152];
        _oldActions[index] = new byte[152];
        fixed (byte* p = action)
        fixed (byte* old = _oldActions[index])
        {
            if (Sigaction(s_signals[index], null, old) != 0)
            {
                throw new InvalidOperationException("sigaction failed");
            }

            *(ulong*)oldHandlerAt = *(ulong*)old;
            *(ulong*)p = at;
            *(int*)(p + 136) = SaSiginfoOnstack;
            if (Sigaction(s_signals[index], p, null) != 0)
            {
                throw new InvalidOperationException("sigaction failed");
            }
        }

        return length;
    }

    private void TakeRecord()
    {
        ulong* gregs = (ulong*)RecordAt;
        NativeImage* to = Output;
        for (int i = 0; i < 16; i++)
        {
            to->Gpr[i] = gregs[s_gregOrder[i]];
        }

        to->Rip = gregs[16];
        to->Rflags = gregs[17];
        to->ErrorCode = gregs[19];
        to->Vector = gregs[20];
        to->Cr2 = gregs[22];
        Buffer.MemoryCopy((byte*)RecordAt + GregBytes, to->Xsave, NativeImage.XsaveBytes, NativeImage.XsaveBytes);

        // The kernel may leave components in their initial state unwritten and clear their bit instead.
        ulong present = *(ulong*)(to->Xsave + 512);
        if ((present & 2) == 0)
        {
            new Span<byte>(to->Xsave + 160, 256).Clear();
        }

        if ((present & 4) == 0)
        {
            new Span<byte>(to->Xsave + 576, 256).Clear();
        }
    }

    [LibraryImport("libc", EntryPoint = "mmap", SetLastError = true)]
    private static partial nint Map(nint address, nint length, int protection, int flags, int fd, nint offset);

    [LibraryImport("libc", EntryPoint = "munmap", SetLastError = true)]
    private static partial int Unmap(nint address, nint length);

    [LibraryImport("libc", EntryPoint = "sigaction", SetLastError = true)]
    private static partial int Sigaction(int signal, byte* action, byte* old);

    [LibraryImport("libc", EntryPoint = "arch_prctl", SetLastError = true)]
    private static partial int ArchPrctl(int code, ulong address);
}
