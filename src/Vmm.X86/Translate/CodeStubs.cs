// SPDX-License-Identifier: BSD-2-Clause
using System.Numerics;

namespace Vmm.X86;

// Routines at the start of a code arena.
//
// Registers inside translated code: guest RAX to R12 live in the host's registers of the same number, except RSP, which
// lives in R13; guest R13 to R15 stay in the context. R14 and R15 are scratch. GS points to the context. The host's RSP
// is the thread's real stack, 16-byte aligned, so that signal handlers and helpers find one.
//
//     Enter            ulong enter(CpuContext* cpu, byte* entry): loads registers, jumps; answers an ExitCode
//     Handler          called with T0 = a record, T1 = its block (both as arena offsets): executes the record through
//                      the interpreter's handler; comes back, with the host's flags loaded, when that answered Next;
//                      goes on elsewhere when it jumped to a place that the indirect-branch cache has; leaves otherwise
//     ExitHostFlags    T0 = exit record: saves the host's flags, then like
//     ExitFlagImage    T0 = exit record: leaves to the dispatcher
//     BranchMiss       T0 = exit record, T1 = twice the entry of the indirect-branch cache that Rip was not found in: tries
//                      its second place, then like ExitFlagImage
//     Interpret        T0 = a record, T1 = its block: leaves, and the interpreter goes on there
//     FillSite         called with T0 = a linear address, T1 = a site (its offset, and the operand's size - 1 from bit 24
//                      on): fills the site from the TLB; ZF set and T1 = addend when it could; keeps T0
//     LoadX87          called: the same for the x87 state
//     LoadVectors      called: loads the guest's vector registers and MXCSR; CF set when it must not (T0 is lost)
//
// Helpers run in the managed world with everything in the context: they may read and change all of it.

/// <summary>Why generated code came back.</summary>
internal static class ExitCode
{
    /// <summary>ExitInfo is an exit record.</summary>
    public const int Exit = 0;

    /// <summary>A handler answered something else than Next: low byte of ExitInfo is its status.</summary>
    public const int Status = 1;

    /// <summary>ExitInfo: record (low half) and block (high half) where the interpreter must go on.</summary>
    public const int Interpret = 2;
}

/// <summary>Addresses of the stubs, in the writable alias (jumps are relative, so the alias does not matter).</summary>
internal sealed unsafe class CodeStubs
{
    public CodeStubs(ref Emitter e, long executeDelta)
    {
        byte* setGs = Align(ref e);
        EmitSetGs(ref e);
        byte* saveVectors = Align(ref e);
        EmitVectors(ref e, store: true);
        byte* loadVectors = Align(ref e);
        EmitVectors(ref e, store: false);
        LoadVectors = Align(ref e);
        e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.VectorsReady), 1);
        byte* refuse = e.JumpIf(HostCondition.Below);
        e.Jump(loadVectors);
        e.Land(refuse);
        e.Return();

        byte* saveX87 = Align(ref e);
        EmitSaveX87(ref e);
        byte* loadX87 = Align(ref e);
        EmitLoadX87(ref e);
        LoadX87 = Align(ref e);
        e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.X87Ready), 1);
        refuse = e.JumpIf(HostCondition.Below);
        e.Jump(loadX87);
        e.Land(refuse);
        e.Return();

        byte* enter = Align(ref e);
        EmitEnter(ref e);
        ExitHostFlags = Align(ref e);
        SaveFlags(ref e, Host.T1);
        ExitFlagImage = e.At;
        e.Store(HostMemory.Context(Offsets.ExitInfo), Host.T0);
        EmitLeave(ref e, saveVectors, saveX87, ExitCode.Exit);
        BranchMiss = Align(ref e);
        EmitBranchMiss(ref e);
        Interpret = Align(ref e);
        e.Shift(4, Host.T1, 32);
        e.Alu(AluOp.Or, Host.T0, Host.T1);
        e.Store(HostMemory.Context(Offsets.ExitInfo), Host.T0);
        EmitLeave(ref e, saveVectors, saveX87, ExitCode.Interpret);
        for (int i = 0; i < Sites.Classes; i++)
        {
            FillSite[i] = (nint)Align(ref e);
            EmitFillSite(ref e, i);
        }

        Handler = Align(ref e);
        EmitHandler(ref e, saveVectors, loadVectors, saveX87, loadX87);
        Enter = (delegate* unmanaged<CpuContext*, byte*, ulong>)(enter + executeDelta);
        SetGs = (delegate* unmanaged<CpuContext*, long>)(setGs + executeDelta);
    }

    /// <summary>Runs generated code. Plain transition: the thread must be in preemptive mode meanwhile.</summary>
    public delegate* unmanaged<CpuContext*, byte*, ulong> Enter { get; }

    /// <summary>Points this thread's GS to a context; 0 or an error number.</summary>
    public delegate* unmanaged<CpuContext*, long> SetGs { get; }

    public byte* Handler { get; }

    public byte* ExitHostFlags { get; }

    public byte* ExitFlagImage { get; }

    public byte* BranchMiss { get; }

    public byte* Interpret { get; }

    public byte* LoadVectors { get; }

    public byte* LoadX87 { get; }

    /// <summary>For each class of sites.</summary>
    public nint[] FillSite { get; } = new nint[Sites.Classes];

    /// <summary>FlagImage = the host's flags without some of the image's. Leaves the host's flags undefined.</summary>
    public static void SaveFlags(ref Emitter e, int scratch, int without = 0)
    {
        e.Move(scratch, Host.Rax);
        e.Lahf();
        e.SetOverflowAl();
        if (without != 0)
        {
            e.AluImmediate(AluOp.And, Host.Rax, ~without, wide: false);
        }

        e.StoreWord(HostMemory.Context(Offsets.FlagImage), Host.Rax);
        e.Move(Host.Rax, scratch);
    }

    /// <summary>The host's flags = FlagImage.</summary>
    public static void LoadFlags(ref Emitter e, int scratch)
    {
        e.Move(scratch, Host.Rax);
        e.LoadWord(Host.Rax, HostMemory.Context(Offsets.FlagImage));
        e.AddAl(0x7F);
        e.Sahf();
        e.Move(Host.Rax, scratch);
    }

    // As Translator.EmitBranchProbe does for the first place; BlockCache.SecondSlot.
    private void EmitBranchMiss(ref Emitter e)
    {
        e.Store(HostMemory.Context(Offsets.ExitInfo), Host.T0);
        e.Move32(Host.T0, Host.T1);
        e.Shift(5, Host.T0, 1 + BitOperations.Log2(BlockCache.BranchWindow));
        e.Shift(4, Host.T0, 1 + BitOperations.Log2(BlockCache.BranchSeconds));
        e.AluImmediate(AluOp.And, Host.T1, (BlockCache.BranchSeconds - 1) << 1, wide: false);
        e.Lea(Host.T1, new HostMemory(Host.T1, Host.T0, 0, BlockCache.Branches << 1));
        e.Load(Host.T0, HostMemory.Context(Offsets.Rip));
        e.Alu(AluOp.Cmp, Host.T0, BranchTable(CpuContext.BranchKeysOffset + BranchKey.LinearOffset));
        byte* miss = e.JumpIf(HostCondition.NotEqual);
        e.Load(Host.T0, HostMemory.Context(Offsets.Request));
        e.Alu(AluOp.Cmp, Host.T0, BranchTable(CpuContext.BranchKeysOffset + BranchKey.ContextOffset));
        byte* other = e.JumpIf(HostCondition.NotEqual);
        e.Load(Host.T0, BranchTable(CpuContext.BranchTargetsOffset + BranchTarget.PageOffset));
        e.Store(HostMemory.Context(Offsets.CodeBase), Host.T0);
        e.JumpMemory(BranchTable(CpuContext.BranchTargetsOffset + BranchTarget.CodeOffset));
        e.Land(miss);
        e.Land(other);
        e.Load(Host.T0, HostMemory.Context(Offsets.ExitInfo));
        e.Jump(ExitFlagImage);
    }

    /// <summary>A field of the indirect-branch cache's entry that T1, twice its number, names.</summary>
    public static HostMemory BranchTable(int offset) => new(Host.None, Host.T1, 3, offset, isContext: true);

    // SAFETY: the same check as the inline one of the interpreter (Mem.Read, Mem.WritePointer): first and last byte lie in
    // the page that the entry names. A site grows over neighbours only where the TLB has them with the same addend.
    private static void EmitFillSite(ref Emitter e, int kind)
    {
        bool isStore = Sites.IsStore(kind);
        int mode = Sites.ModeOf(kind);
        int table = CpuContext.TlbOffset + (mode * TlbEntry.Count * TlbEntry.SizeBytes);
        e.Push(Host.Rax);
        e.Push(Host.Rcx);
        e.Move32(Host.Rcx, Host.T1);
        e.Shift(5, Host.Rcx, 24);
        e.AluImmediate(AluOp.And, Host.T1, 0xFFFFFF, wide: false);
        e.Lea(Host.Rcx, new HostMemory(Host.T0, Host.Rcx, 0, 0));
        e.AluImmediate(AluOp.And, Host.Rcx, -4096);
        e.Move(Host.Rax, Host.T0);
        EmitFind(ref e, table, isStore);
        byte* missing = e.JumpIf(HostCondition.NotEqual);
        byte* unwritten = null;
        byte* outside = null;
        if (isStore)
        {
            EmitFlagsCheck(ref e, table, out unwritten, out outside);
        }

        // Most misses of a filled site only get the translation: a place may go back and forth between two pages.
        HostMemory misses = HostMemory.Context(Host.Rcx, Counters + SiteCounter.MissesOffset);
        e.AluImmediate8(AluOp.Add, HostMemory.Context(Offsets.SiteMisses), 1, wide: true);
        e.Move(Host.Rcx, Host.T1);
        e.Shift(5, Host.Rcx, Sites.CounterShift);
        e.AluImmediate8(AluOp.Add, misses, 1);
        e.Load32(Host.Rcx, misses);
        e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Host.T1, SiteEntry.LimitOffset), 0, wide: true);
        byte* empty = e.JumpIf(HostCondition.Equal);
        e.AluImmediate(AluOp.And, Host.Rcx, Sites.MissesOfFill - 1, wide: false);
        byte* light = e.JumpIf(HostCondition.NotEqual);
        byte* filled = e.JumpForward();
        e.Land(empty);
        int count = Offsets.SiteCounts + (mode * sizeof(int));
        int journal = CpuContext.SiteJournalOffset + (mode * Sites.CountOfMode * sizeof(int));
        e.Load32(Host.Rcx, HostMemory.Context(count));
        e.Store32(new HostMemory(Host.None, Host.Rcx, 2, journal, isContext: true), Host.T1);
        e.AluImmediate8(AluOp.Add, HostMemory.Context(count), 1);
        e.Land(filled);
        e.Push(Host.Rdx);
        e.Push(Host.Rbx);
        e.Push(Host.Rsi);
        e.Push(Host.Rdi);
        e.Move(Host.Rsi, Host.T1);
        e.Shift(5, Host.Rsi, Sites.CounterShift);
        EmitThrashCheck(ref e, Host.Rsi);

        // A place that moves between two pages must not pay for neighbours that are not there each time.
        e.Load32(Host.Rcx, HostMemory.Context(Host.Rsi, Counters + SiteCounter.MissesOffset));
        e.Load(Host.Rdx, HostMemory.Context(Host.Rax, table + TlbEntry.AddendOffset));
        e.Move(Host.Rbx, Host.T0);
        e.AluImmediate(AluOp.And, Host.Rbx, -4096);
        e.Lea(Host.Rsi, new HostMemory(Host.Rbx, 4096));
        e.AluImmediate(AluOp.And, Host.Rcx, Sites.MissesOfGrowth - 1, wide: false);
        e.AluImmediate(AluOp.Cmp, Host.Rcx, 1);
        byte* stays = e.JumpIf(HostCondition.Above);
        EmitGrow(ref e, table, isStore, Host.Rsi, 0, 4096);
        EmitGrow(ref e, table, isStore, Host.Rbx, -4096, -4096);
        e.Land(stays);
        e.Store(HostMemory.Context(Host.T1, SiteEntry.LowOffset), Host.Rbx);
        e.Alu(AluOp.Sub, Host.Rsi, Host.Rbx);
        e.AluImmediate(AluOp.Sub, Host.Rsi, Sites.BytesOf(kind) - 1);
        e.Store(HostMemory.Context(Host.T1, SiteEntry.LimitOffset), Host.Rsi);
        e.Store(HostMemory.Context(Host.T1, SiteEntry.AddendOffset), Host.Rdx);
        e.Alu(AluOp.Add, Host.Rbx, Host.Rdx);
        e.Store(HostMemory.Context(Host.T1, SiteEntry.HostLowOffset), Host.Rbx);
        e.Pop(Host.Rdi);
        e.Pop(Host.Rsi);
        e.Pop(Host.Rbx);
        e.Pop(Host.Rdx);
        e.Land(light);
        if (isStore)
        {
            e.Land(outside);
        }

        // With ZF clear when the place thrashes: the helper hears of it.
        e.Load(Host.T1, HostMemory.Context(Host.Rax, table + TlbEntry.AddendOffset));
        e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.Thrashing), 0);
        e.Land(missing);
        if (isStore)
        {
            e.Land(unwritten);
        }

        e.Pop(Host.Rcx);
        e.Pop(Host.Rax);
        e.Return();
    }

    // What an offset among the sites, shifted, is added to for its counter.
    private const int Counters = CpuContext.SiteCountersOffset - (CpuContext.SitesOffset >> Sites.CounterShift);

    // Looks at the misses of the site whose offset is in a register, shifted. Many of them in a short time: the place does
    // not stay in a page, and had better look into the TLB each time. Destroys RCX and RDX.
    private static void EmitThrashCheck(ref Emitter e, int counter)
    {
        HostMemory misses = HostMemory.Context(counter, Counters + SiteCounter.MissesOffset);
        HostMemory since = HostMemory.Context(counter, Counters + SiteCounter.SinceOffset);
        e.Load32(Host.Rcx, misses);
        e.AluImmediate(AluOp.And, Host.Rcx, Sites.MissesOfThrash - 1, wide: false);
        byte* few = e.JumpIf(HostCondition.NotEqual);
        e.Push(Host.Rax);
        e.Byte(0x0F);
        e.Byte(0x31);
        e.Move32(Host.Rcx, Host.Rax);
        e.Alu32(AluOp.Sub, Host.Rcx, since);
        e.Store32(since, Host.Rax);
        e.Pop(Host.Rax);
        e.AluImmediate(AluOp.Cmp, Host.Rcx, Sites.MissesOfThrash * Sites.CyclesOfThrash, wide: false);
        byte* slow = e.JumpIf(HostCondition.AboveOrEqual);
        e.StoreImmediate32(HostMemory.Context(Offsets.Thrashing), 1);
        e.Land(slow);
        e.Land(few);
    }

    // RAX: a linear address, becomes the offset of its TLB entry; RCX: a page, becomes a tag. ZF: it is the entry's.
    private static void EmitFind(ref Emitter e, int table, bool isStore)
    {
        e.Shift(5, Host.Rax, 7);
        e.AluImmediate(AluOp.And, Host.Rax, (TlbEntry.Count - 1) << 5, wide: false);
        e.Alu(AluOp.Or, Host.Rcx, HostMemory.Context(Offsets.TlbAsid));
        e.Alu(
            AluOp.Cmp, Host.Rcx, HostMemory.Context(Host.Rax, table + (isStore ? TlbEntry.WriteTagOffset : TlbEntry.ReadTagOffset)));
    }

    // Pages whose flags somebody may clear while code runs get no sites for stores: only those of the main memory do.
    private static void EmitFlagsCheck(ref Emitter e, int table, out byte* unwritten, out byte* outside)
    {
        e.Load(Host.Rcx, HostMemory.Context(Host.Rax, table + TlbEntry.PageFlagsOffset));
        e.CompareByte(new HostMemory(Host.Rcx, 0), (int)Memory.PageFlags.Written);
        unwritten = e.JumpIf(HostCondition.NotEqual);
        e.Alu(AluOp.Sub, Host.Rcx, HostMemory.Context(Offsets.SiteFlagsLow));
        e.Alu(AluOp.Cmp, Host.Rcx, HostMemory.Context(Offsets.SiteFlagsLength));
        outside = e.JumpIf(HostCondition.AboveOrEqual);
    }

    // Moves an edge over neighbouring pages that the TLB has with the addend in RDX. Keeps RAX.
    private static void EmitGrow(ref Emitter e, int table, bool isStore, int edge, int page, int step)
    {
        e.Push(Host.Rax);
        e.MoveImmediate(Host.Rdi, Sites.Growth);
        byte* again = e.At;
        e.Lea(Host.Rcx, new HostMemory(edge, page));
        e.Move(Host.Rax, Host.Rcx);
        EmitFind(ref e, table, isStore);
        byte* missing = e.JumpIf(HostCondition.NotEqual);
        e.Alu(AluOp.Cmp, Host.Rdx, HostMemory.Context(Host.Rax, table + TlbEntry.AddendOffset));
        byte* elsewhere = e.JumpIf(HostCondition.NotEqual);
        byte* unwritten = null;
        byte* outside = null;
        if (isStore)
        {
            EmitFlagsCheck(ref e, table, out unwritten, out outside);
        }

        e.AluImmediate(AluOp.Add, edge, step);
        e.AluImmediate(AluOp.Sub, Host.Rdi, 1);
        e.JumpIf(HostCondition.NotEqual, again);
        e.Land(missing);
        e.Land(elsewhere);
        if (isStore)
        {
            e.Land(unwritten);
            e.Land(outside);
        }

        e.Pop(Host.Rax);
    }

    private static byte* Align(ref Emitter e)
    {
        while (((ulong)e.At & 15) != 0)
        {
            e.Byte(0xCC);
        }

        return e.At;
    }

    // arch_prctl(ARCH_SET_GS, cpu): the base is the thread's own and survives context switches and signals.
    private static void EmitSetGs(ref Emitter e)
    {
        e.Move(Host.Rsi, Host.Rdi);
        e.MoveImmediate(Host.Rdi, 0x1001);
        e.MoveImmediate(Host.Rax, 158);
        e.Byte(0x0F);
        e.Byte(0x05);
        e.Return();
    }

    private static void EmitRegisters(ref Emitter e, bool store)
    {
        for (int register = 0; register <= 12; register++)
        {
            int host = register == Host.Rsp ? Host.GuestRsp : register;
            if (store)
            {
                e.Store(HostMemory.Context(8 * register), host);
            }
            else
            {
                e.Load(host, HostMemory.Context(8 * register));
            }
        }
    }

    // XMM0 to XMM15 and MXCSR, and the upper halves when VectorsReady says 2.
    //
    // Upper halves that are all zero are not loaded one by one but cleared. The processor knows them to be clear then;
    // while any is not, each SSE instruction has to merge its result with what is above, and so waits for the last one
    // that wrote its register: loops over MOVSD or CVTSI2SD take three to nine times as long.
    private static void EmitVectors(ref Emitter e, bool store)
    {
        e.Mxcsr(store ? 3 : 2, HostMemory.Context(Offsets.Mxcsr));
        if (store)
        {
            e.Mxcsr(2, HostMemory.Context(Offsets.HostMxcsr));
        }
        else
        {
            e.Load32(Host.T0, HostMemory.Context(Offsets.VectorsReady));
            e.Store32(HostMemory.Context(Offsets.VectorsLoaded), Host.T0);
            e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.VectorsLoaded), 2);
            byte* without = e.JumpIf(HostCondition.Below);
            for (int i = 0; i < 8; i++)
            {
                e.LoadWide(0, HostMemory.Context(Offsets.YmmHigh + (32 * i)), or: i != 0);
            }

            e.TestWide(0);
            byte* wide = e.JumpIf(HostCondition.NotEqual);
            e.ZeroUpper();
            e.Land(without);
            MoveVectors(ref e, store: false);
            e.Alu32(AluOp.Xor, Host.T0, Host.T0);
            e.Return();
            e.Land(wide);
        }

        MoveVectors(ref e, store);

        byte* narrow = null;
        if (store)
        {
            e.AluImmediate8(AluOp.Cmp, HostMemory.Context(Offsets.VectorsLoaded), 2);
            narrow = e.JumpIf(HostCondition.Below);
        }

        for (int i = 0; i < 16; i++)
        {
            e.MoveUpper(i, HostMemory.Context(Offsets.YmmHigh + (16 * i)), store);
        }

        if (store)
        {
            // What runs next must not pay for upper halves that are not clear.
            e.ZeroUpper();
            e.Land(narrow);
        }
        else
        {
            // CF clear: they are loaded.
            e.Alu32(AluOp.Xor, Host.T0, Host.T0);
        }

        e.Return();
    }

    private static void MoveVectors(ref Emitter e, bool store)
    {
        for (int i = 0; i < 16; i++)
        {
            e.MoveVector(i, HostMemory.Context(Offsets.Xmm + (16 * i)), store);
        }
    }

    // XSAVE with only the x87 component (EAX:EDX are saved: general registers are the guest's). Instruction and operand
    // pointers would be the host's: the guest keeps those that the interpreter recorded last. FNINIT leaves the unit as
    // .NET expects it.
    private static void EmitSaveX87(ref Emitter e)
    {
        PushPair(ref e);
        e.Push(Host.Rcx);
        e.Push(Host.Rsi);
        e.Push(Host.Rdi);
        e.Load32(Host.Rcx, HostMemory.Context(Offsets.Fop));
        e.Load(Host.Rsi, HostMemory.Context(Offsets.Fip));
        e.Load(Host.Rdi, HostMemory.Context(Offsets.Fdp));
        XsaveX87(ref e, 4);
        e.StoreWord(HostMemory.Context(Offsets.Fop), Host.Rcx);
        e.Store(HostMemory.Context(Offsets.Fip), Host.Rsi);
        e.Store(HostMemory.Context(Offsets.Fdp), Host.Rdi);
        e.Byte(0xDB);
        e.Byte(0xE3);
        e.Pop(Host.Rdi);
        e.Pop(Host.Rsi);
        e.Pop(Host.Rcx);
        PopPair(ref e);
        e.Return();
    }

    private static void EmitLoadX87(ref Emitter e)
    {
        PushPair(ref e);
        XsaveX87(ref e, 5);
        PopPair(ref e);
        e.StoreImmediate32(HostMemory.Context(Offsets.X87Loaded), 1);

        // CF clear: it is loaded.
        e.Alu32(AluOp.Xor, Host.T0, Host.T0);
        e.Return();
    }

    private static void PushPair(ref Emitter e)
    {
        e.Push(Host.Rax);
        e.Push(Host.Rdx);
    }

    private static void PopPair(ref Emitter e)
    {
        e.Pop(Host.Rdx);
        e.Pop(Host.Rax);
    }

    // XSAVE64 (4) or XRSTOR64 (5) gs:[area] with mask 1; the header says that the component is there (Prepare).
    private static void XsaveX87(ref Emitter e, int kind)
    {
        e.MoveImmediate(Host.Rax, 1);
        e.MoveImmediate(Host.Rdx, 0);
        e.Xsave(kind, HostMemory.Context(CpuContext.XsaveOffset));
    }

    private static void EmitEnter(ref Emitter e)
    {
        e.Push(Host.Rbx);
        e.Push(Host.Rbp);
        e.Push(Host.R12);
        e.Push(Host.R13);
        e.Push(Host.R14);
        e.Push(Host.R15);
        e.AluImmediate(AluOp.Sub, Host.Rsp, 8);
        e.Move(Host.T0, Host.Rsi);
        EmitRegisters(ref e, store: false);
        e.JumpRegister(Host.T0);
    }

    private static void EmitReturn(ref Emitter e, int code)
    {
        e.StoreImmediate32(HostMemory.Context(Offsets.VectorsLoaded), 0);
        e.StoreImmediate32(HostMemory.Context(Offsets.X87Loaded), 0);
        e.MoveImmediate(Host.Rax, (uint)code);
        e.AluImmediate(AluOp.Add, Host.Rsp, 8);
        e.Pop(Host.R15);
        e.Pop(Host.R14);
        e.Pop(Host.R13);
        e.Pop(Host.R12);
        e.Pop(Host.Rbp);
        e.Pop(Host.Rbx);
        e.Return();
    }

    private static void EmitLeave(ref Emitter e, byte* saveVectors, byte* saveX87, int code)
    {
        EmitRegisters(ref e, store: true);
        CallIfLoaded(ref e, Offsets.VectorsLoaded, saveVectors);
        CallIfLoaded(ref e, Offsets.X87Loaded, saveX87);
        EmitReturn(ref e, code);
    }

    // Calls what saves or loads a part of the state when that part is in the host's registers.
    private static void CallIfLoaded(ref Emitter e, int loaded, byte* stub)
    {
        e.AluImmediate8(AluOp.Cmp, HostMemory.Context(loaded), 0);
        byte* none = e.JumpIf(HostCondition.Equal);
        e.Call(stub);
        e.Land(none);
    }

    private static void EmitHandler(
        ref Emitter e, byte* saveVectors, byte* loadVectors, byte* saveX87, byte* loadX87)
    {
        // The caller's CALL has misaligned the stack by 8.
        e.AluImmediate(AluOp.Sub, Host.Rsp, 8);
        EmitRegisters(ref e, store: true);
        CallIfLoaded(ref e, Offsets.VectorsLoaded, saveVectors);
        CallIfLoaded(ref e, Offsets.X87Loaded, saveX87);
        e.Load(Host.Rdi, HostMemory.Context(Offsets.Self));
        e.Move(Host.Rsi, Host.T0);
        e.Move(Host.Rdx, Host.T1);
        e.CallMemory(HostMemory.Context(Offsets.Helper));
        e.Test32(Host.Rax, Host.Rax);
        byte* elsewhere = e.JumpIf(HostCondition.NotEqual);
        CallIfLoaded(ref e, Offsets.VectorsLoaded, loadVectors);
        CallIfLoaded(ref e, Offsets.X87Loaded, loadX87);
        e.Load32(Host.Rax, HostMemory.Context(Offsets.FlagImage));
        e.AddAl(0x7F);
        e.Sahf();
        EmitRegisters(ref e, store: false);
        e.Lea(Host.Rsp, new HostMemory(Host.Rsp, 8));
        e.Return();
        e.Land(elsewhere);
        e.AluImmediate(AluOp.Cmp, Host.Rax, HandlerResult.Leave, wide: false);
        byte* leaves = e.JumpIf(HostCondition.Equal);

        // The block at the target loads vector and x87 state when it needs them.
        e.StoreImmediate32(HostMemory.Context(Offsets.VectorsLoaded), 0);
        e.StoreImmediate32(HostMemory.Context(Offsets.X87Loaded), 0);
        EmitRegisters(ref e, store: false);
        e.Lea(Host.Rsp, new HostMemory(Host.Rsp, 16));
        e.JumpMemory(HostMemory.Context(Offsets.ExitInfo));
        e.Land(leaves);
        e.AluImmediate(AluOp.Add, Host.Rsp, 16);
        EmitReturn(ref e, ExitCode.Status);
    }
}

/// <summary>In the block's offset that CodeStubs.Handler gets.</summary>
internal static class HandlerArgument
{
    /// <summary>CpuContext.TraceHead says where the code starts that calls the handler.</summary>
    public const uint InTrace = 1U << 30;
}

/// <summary>What the function behind CodeStubs.Handler answers.</summary>
internal static class HandlerResult
{
    /// <summary>The instruction is done; go on behind it.</summary>
    public const int Next = 0;

    /// <summary>Leave to the dispatcher, with ExitCode.Status.</summary>
    public const int Leave = 1;

    /// <summary>Go on at the code in ExitInfo, which expects the flags in their image.</summary>
    public const int Jump = 2;
}

/// <summary>Offsets in the context that generated code uses.</summary>
internal static class Offsets
{
    public const int Request = 0xB8;
    public const int Rip = 0x80;
    public const int RflagsSystem = 0xB0;
    public const int TlbAsid = 0xC8;
    public const int InterruptHint = 0x2AC;
    public const int Cpl = 0x3E8;
    public const int CodeBase = 0x3B0;
    public const int FlagImage = 0x3B8;
    public const int VectorsLoaded = 0x3C0;
    public const int VectorsReady = 0x3C4;
    public const int ExitInfo = 0x3C8;
    public const int X87Loaded = 0x3EC;
    public const int X87Ready = 0x3F0;
    public const int TraceHead = 0x3F4;
    public const int SiteCounts = 0x7E0;
    public const int Msrs = 0x400;
    public const int KernelGsBase = Msrs + (4 * sizeof(ulong));
    public const int SiteMisses = 0x7D0;
    public const int InstructionCount = 0xF0;
    public const int SiteFlagsLow = 0x3F8;
    public const int SiteFlagsLength = 0x7F8;
    public const int Thrashing = 0x7F4;
    public const int Self = 0x3D0;
    public const int Tsc = 0xB00;
    public const int TscBase = Tsc;
    public const int TscLimit = Tsc + 8;
    public const int TscScale = Tsc + 16;
    public const int TscValue = Tsc + 24;
    public const int Calls = 0xB20;
    public const int CallsReady = Calls;
    public const int CallsKeepSystem = Calls + 8;
    public const int CallsKeepImage = Calls + 16;
    public const int CallsKernelCs = Calls + 24;
    public const int CallsKernelSs = Calls + 32;
    public const int CallsUserCs = Calls + 40;
    public const int CallsUserSs = Calls + 48;
    public const int CallsKernelTlb = Calls + 56;
    public const int CallsUserTlb = Calls + 64;
    public const int Scratch = 0xB70;
    public const int CountLimit = 0xB78;
    public const int LastCpuid = 0xB80;
    public const int Cr0 = 0x218;
    public const int Cr2 = 0x220;
    public const int Cr3 = 0x228;
    public const int Cr4 = 0x230;
    public const int Pkru = 0x248;
    public const int Lstar = Msrs + sizeof(ulong);
    public const int BranchTag = 0xBE;
    public const int Tlb = 0xC0;
    public const int ModeKey = 0xE8;
    public const int SpaceAsid = 0xA00;
    public const int GlobalAsid = 0xA08;
    public const int TscAux = Msrs + (9 * sizeof(ulong));
    public const int Helper = 0x3D8;
    public const int Mxcsr = CpuContext.XsaveOffset + XsaveLayout.Mxcsr;
    public const int Xmm = CpuContext.XsaveOffset + XsaveLayout.Xmm;
    public const int YmmHigh = CpuContext.XsaveOffset + XsaveLayout.YmmHigh;
    public const int Fop = CpuContext.XsaveOffset + XsaveLayout.Fop;
    public const int Fip = CpuContext.XsaveOffset + XsaveLayout.Fip;
    public const int Fdp = CpuContext.XsaveOffset + XsaveLayout.Fdp;
    public const int HostMxcsr = VectorScratch.Offset + 0x8C;
}
