// SPDX-License-Identifier: BSD-2-Clause
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Vmm.X86;

// Theory of the software processor.
//
// State. Everything that executing code touches lies in one block of unmanaged memory per vCPU, CpuContext, with fixed
// offsets: handlers address a register as "context + byte offset", and generated code can do the same through GS.
// The managed SoftVcpu owns the block and is reached from it through a GC handle (devices, clock, APIC only).
//
// Execution. Guest code is decoded by Iced into basic blocks of 64-byte Insn records (Insn.cs), kept per vCPU, found by
// guest-physical address and mode (BlockCache.cs). The dispatch loop (Dispatch.cs) calls insn->Handler(cpu, insn) and goes
// on to the next record while the answer is Status.Next. Handlers are static functions without state of their own:
//
//     static Status Handler(CpuContext* cpu, Insn* insn)
//
// A handler reads registers by the offsets in the record (Reg.*), memory by Mem.Read/Write on a linear address that
// Mem.Address computes from the record, flags through Flags.*, and answers
//     Next   go on with the following record; RIP need not be touched,
//     Fault  nothing architectural has changed; Fault.Raise* stored vector and error code; RIP of this instruction is
//            reported (it is recomputed from the record, handlers do not keep it up to date),
//     others for jumps and for instructions that change the mode (see Status).
// Faults are values: no exception is thrown, and a handler checks everything that can fault before it changes anything.
//
// Instruction pointer. cpu->Rip is exact at block boundaries only. Inside a block, the instruction's address is
// cpu->BlockRip + insn->Offset (masked with cpu->RipMask), so that one decoded block serves every virtual address that
// its physical page is mapped at. RIP-relative operands use BlockRip as base register with a displacement from there.
//
// Flags are lazy: the result, the carry-out vector and a correction (Flags.cs); RflagsSystem holds all other bits.
//
// Memory. A direct-mapped software TLB per privilege mode maps pages to host pointers (Tlb.cs). A store also looks at
// the page's PageFlags byte: when it is not exactly Written (dirty bits missing, or Code set), the slow path runs.
//
// Threads. A context belongs to its vCPU's thread. Others touch Request (atomically) and nothing else. Atomic guest
// instructions are host atomics on guest memory; ordinary loads and stores are plain host loads and stores, so the
// guest gets the host's own total store order.

/// <summary>Hidden part and selector of a segment register; 32 bytes.</summary>
[StructLayout(LayoutKind.Explicit, Size = 32)]
internal struct SegmentRegister
{
    /// <summary>Base as loaded.</summary>
    [FieldOffset(0)]
    public ulong Base;

    /// <summary>What address computation adds: Base, or 0 for ES/CS/SS/DS in 64-bit mode.</summary>
    [FieldOffset(8)]
    public ulong EffectiveBase;

    /// <summary>Limit in bytes, granularity applied.</summary>
    [FieldOffset(16)]
    public uint Limit;

    /// <summary>As <see cref="Core.SegmentState.Rights"/>: bit 16 says unusable.</summary>
    [FieldOffset(20)]
    public uint Rights;

    /// <summary>Visible part.</summary>
    [FieldOffset(24)]
    public ushort Selector;

    /// <summary>Type and S: the low five bits of <see cref="Rights"/>.</summary>
    public readonly uint TypeBits => Rights & 0x1F;

    /// <summary>Descriptor privilege level.</summary>
    public readonly int Dpl => (int)(Rights >> 5) & 3;

    /// <summary>No descriptor is loaded (null selector).</summary>
    public readonly bool Unusable => (Rights & Segmentation.UnusableBit) != 0;
}

/// <summary>Indices of <see cref="CpuContext"/> segments, in the encoding's order.</summary>
internal static class Seg
{
    public const int Es = 0;
    public const int Cs = 1;
    public const int Ss = 2;
    public const int Ds = 3;
    public const int Fs = 4;
    public const int Gs = 5;
    public const int Ldtr = 6;
    public const int Tr = 7;
}

/// <summary>
/// Why the dispatch loop should look up: bits of <see cref="CpuContext.Request"/>.
/// </summary>
internal static class RequestBits
{
    /// <summary>IVcpu.Kick was called: Run returns Interrupted.</summary>
    public const int Kick = 2;

    /// <summary>Memory slots changed: drop every cached translation before going on.</summary>
    public const int FlushAll = 4;

    /// <summary>Something that this thread itself did needs the slow path (mode, interrupt flag, breakpoints).</summary>
    public const int Look = 8;

    /// <summary>Code was overwritten: generated code of it must be cut off (VmShared.CodeWriteRing).</summary>
    public const int Code = 16;

    /// <summary>Another vCPU has decoded code from a page: sites for stores must be emptied (Sites.cs).</summary>
    public const int Stores = 32;
}

/// <summary>
/// The processor's state as handlers and generated code see it. 64-byte aligned at least; offsets are ABI inside
/// Vmm.X86 (generated code has them as constants).
/// </summary>
[StructLayout(LayoutKind.Explicit, Size = SizeBytes)]
internal unsafe struct CpuContext
{
    /// <summary>Bytes of the block.</summary>
    public const int SizeBytes = 0x2000;

    /// <summary>Where the TLB tables lie, reached by generated code through GS like everything here.</summary>
    public const int TlbOffset = SizeBytes;

    /// <summary>The indirect-branch cache's keys.</summary>
    public const int BranchKeysOffset = TlbOffset + (TlbEntry.Tables * TlbEntry.Count * TlbEntry.SizeBytes);

    /// <summary>The indirect-branch cache's targets.</summary>
    public const int BranchTargetsOffset = BranchKeysOffset + (BlockCache.BranchEntries * BranchKey.SizeBytes);

    /// <summary>Translations cached by places in generated code (Translate/Sites.cs).</summary>
    public const int SitesOffset = BranchTargetsOffset + (BlockCache.BranchEntries * BranchTarget.SizeBytes);

    /// <summary>Offsets of the sites that are filled, for each mode.</summary>
    public const int SiteJournalOffset = SitesOffset + (Sites.Count * Sites.EntryBytes);

    /// <summary>What is counted of each site.</summary>
    public const int SiteCountersOffset = SiteJournalOffset + (Sites.Count * sizeof(int));

    /// <summary>Generated code's checks of operands, by AccessCount, when it counts them.</summary>
    public const int AccessCountsOffset = SiteCountersOffset + (Sites.Count * Sites.CounterBytes);

    /// <summary>Bytes of the context and the tables behind it.</summary>
    public const int TotalBytes = AccessCountsOffset + (AccessCount.Count * sizeof(ulong));

    /// <summary>Where the XSAVE area starts: standard (non-compacted) format, 64-byte aligned, 4096 bytes.</summary>
    public const int XsaveOffset = 0x1000;

    /// <summary>Offset of the always-zero quadword (the base or index "register" of operands that have none).</summary>
    public const int ZeroOffset = 0x90;

    /// <summary>Offset of <see cref="BlockRip"/>.</summary>
    public const int BlockRipOffset = 0x88;

    /// <summary>Offset of the segment registers.</summary>
    public const int SegmentsOffset = 0x100;

    /// <summary>RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.</summary>
    [FieldOffset(0x00)]
    public fixed ulong Gpr[16];

    [FieldOffset(0x00)]
    public ulong Rax;

    [FieldOffset(0x08)]
    public ulong Rcx;

    [FieldOffset(0x10)]
    public ulong Rdx;

    [FieldOffset(0x18)]
    public ulong Rbx;

    [FieldOffset(0x20)]
    public ulong Rsp;

    [FieldOffset(0x28)]
    public ulong Rbp;

    [FieldOffset(0x30)]
    public ulong Rsi;

    [FieldOffset(0x38)]
    public ulong Rdi;

    /// <summary>Instruction pointer; exact at block boundaries.</summary>
    [FieldOffset(Offsets.Rip)]
    public ulong Rip;

    /// <summary>Instruction pointer of the running block's first instruction.</summary>
    [FieldOffset(BlockRipOffset)]
    public ulong BlockRip;

    /// <summary>Always 0.</summary>
    [FieldOffset(ZeroOffset)]
    public ulong Zero;

    /// <summary>Lazy flags: sign-extended result (Flags.cs).</summary>
    [FieldOffset(0x98)]
    public ulong FlagResult;

    /// <summary>Lazy flags: bit 63 CF, bit 62 CF xor OF, bit 3 AF, the rest is noise.</summary>
    [FieldOffset(0xA0)]
    public ulong FlagCarry;

    /// <summary>Lazy flags: xor-ed into FlagResult for SF (bit 63) and PF (bits 7:0), not for ZF.</summary>
    [FieldOffset(0xA8)]
    public ulong FlagDelta;

    /// <summary>RFLAGS without CF PF AF ZF SF OF; bit 1 is set.</summary>
    [FieldOffset(Offsets.RflagsSystem)]
    public ulong RflagsSystem;

    /// <summary><see cref="RequestBits"/>; written by any thread with atomics, polled between blocks.</summary>
    [FieldOffset(Offsets.Request)]
    public int Request;

    /// <summary>
    /// Names address space and privilege mode to the indirect-branch cache of generated code (CodeCache.cs). It shares a
    /// quadword with <see cref="Request"/>, so that a request makes every probe of that cache miss; what is between
    /// the two stays 0.
    /// </summary>
    [FieldOffset(Offsets.BranchTag)]
    public ushort BranchTag;

    /// <summary>The TLB of the current privilege mode.</summary>
    [FieldOffset(Offsets.Tlb)]
    public TlbEntry* Tlb;

    /// <summary>Low 12 bits of a valid tag in <see cref="Tlb"/>, never 0: one of the two numbers of Asids.cs.</summary>
    [FieldOffset(Offsets.TlbAsid)]
    public ulong TlbAsid;

    /// <summary>What ESP/RSP is masked with for stack accesses: 0xFFFF, 0xFFFFFFFF or all ones.</summary>
    [FieldOffset(0xD0)]
    public ulong StackMask;

    /// <summary>What RIP is masked with: 0xFFFFFFFF outside 64-bit mode.</summary>
    [FieldOffset(0xD8)]
    public ulong RipMask;

    /// <summary>The running block.</summary>
    [FieldOffset(0xE0)]
    public Block* CurrentBlock;

    /// <summary><see cref="BlockKey"/> bits of the current mode.</summary>
    [FieldOffset(Offsets.ModeKey)]
    public uint ModeKey;

    /// <summary>One of <see cref="ProcessorMode"/>.</summary>
    [FieldOffset(0xEC)]
    public ProcessorMode Mode;

    /// <summary>
    /// Instructions retired, exact at block boundaries; of translated code only where <see cref="CountsBlocks"/> is 1.
    /// </summary>
    [FieldOffset(Offsets.InstructionCount)]
    public ulong InstructionCount;

    /// <summary>GC handle of the owning SoftVcpu.</summary>
    [FieldOffset(0xF8)]
    public nint OwnerHandle;

    /// <summary>First of ES, CS, SS, DS, FS, GS, LDTR, TR; see <see cref="Segment"/>.</summary>
    [FieldOffset(SegmentsOffset)]
    public SegmentRegister FirstSegment;

    [FieldOffset(0x200)]
    public ulong GdtBase;

    [FieldOffset(0x208)]
    public ulong IdtBase;

    [FieldOffset(0x210)]
    public ushort GdtLimit;

    [FieldOffset(0x212)]
    public ushort IdtLimit;

    [FieldOffset(Offsets.Cr0)]
    public ulong Cr0;

    [FieldOffset(Offsets.Cr2)]
    public ulong Cr2;

    [FieldOffset(Offsets.Cr3)]
    public ulong Cr3;

    [FieldOffset(Offsets.Cr4)]
    public ulong Cr4;

    /// <summary>IA32_EFER.</summary>
    [FieldOffset(0x238)]
    public ulong Efer;

    /// <summary>XCR0.</summary>
    [FieldOffset(0x240)]
    public ulong Xcr0;

    /// <summary>PKRU (the register; the XSAVE area's copy is not used while running).</summary>
    [FieldOffset(Offsets.Pkru)]
    public uint Pkru;

    /// <summary>DR0 to DR3.</summary>
    [FieldOffset(0x250)]
    public fixed ulong Dr[4];

    [FieldOffset(0x270)]
    public ulong Dr6;

    [FieldOffset(0x278)]
    public ulong Dr7;

    /// <summary>The fault that a handler raised (valid after Status.Fault).</summary>
    [FieldOffset(0x280)]
    public FaultInfo Fault;

    /// <summary>Bit 0: STI shadow, bit 1: MOV SS shadow; in force for the next instruction.</summary>
    [FieldOffset(0x298)]
    public int Shadow;

    /// <summary>NMIs are blocked until IRET.</summary>
    [FieldOffset(0x29C)]
    public int NmiBlocked;

    /// <summary>One of Core.ActivityState.</summary>
    [FieldOffset(0x2A0)]
    public int Activity;

    /// <summary>DR6 bits of breakpoints that the running instruction has hit.</summary>
    [FieldOffset(0x2A4)]
    public uint PendingDebug;

    /// <summary>1 while the thread holds no pointer into guest memory (outside Run, or in a device).</summary>
    [FieldOffset(0x2A8)]
    public int Safe;

    /// <summary>1 while the interrupt port may have something deliverable (cheap filter before asking it).</summary>
    [FieldOffset(Offsets.InterruptHint)]
    public int InterruptHint;

    /// <summary>An NMI that state restore brought along.</summary>
    [FieldOffset(0x2B0)]
    public int NmiPending;

    /// <summary>Highest CPUID-enumerated features that handlers test: <see cref="CpuFeature"/> bits.</summary>
    [FieldOffset(0x2B8)]
    public ulong Features;

    /// <summary>Bits of the physical address (MAXPHYADDR).</summary>
    [FieldOffset(0x2C0)]
    public int PhysicalBits;

    /// <summary>Delivery in progress for #DF decisions: 0 none, else 1 + vector.</summary>
    [FieldOffset(0x2C4)]
    public int Delivering;

    /// <summary>Physical address mask of valid address bits in page-table entries.</summary>
    [FieldOffset(0x2C8)]
    public ulong PhysicalMask;

    /// <summary>What all vCPUs of the VM share.</summary>
    [FieldOffset(0x2D0)]
    public VmShared* Shared;

    /// <summary>The four TLB tables, one after the other (<see cref="MmuMode"/>).</summary>
    [FieldOffset(0x2D8)]
    public TlbEntry* Tlbs;

    /// <summary>Guest-physical page of the local APIC, or all ones when it is not memory-mapped.</summary>
    [FieldOffset(0x2E0)]
    public ulong ApicPage;

    /// <summary>Bit n: some 1 GiB region whose number hashes to n has TLB entries from a page of 1 GiB.</summary>
    [FieldOffset(0x2E8)]
    public ulong GiantPages;

    /// <summary>The same for regions of 2 MiB and pages of 2 or 4 MiB.</summary>
    [FieldOffset(0x800)]
    public fixed ulong LargePages[Paging.LargePageWords];

    /// <summary>Number of the address space in TLB tags.</summary>
    [FieldOffset(Offsets.SpaceAsid)]
    public ulong SpaceAsid;

    /// <summary>Number of what the supervisor's TLB holds, whatever the address space.</summary>
    [FieldOffset(Offsets.GlobalAsid)]
    public ulong GlobalAsid;

    /// <summary>Entries of the supervisor's TLB that are not global; more than there is room for: too many to name.</summary>
    [FieldOffset(0xA10)]
    public int PrivateCount;

    /// <summary>Which those are.</summary>
    [FieldOffset(0xA20)]
    public fixed ushort PrivateSlots[Asids.MaxPrivate];

    /// <summary>SYSCALL and SYSRET in generated code.</summary>
    [FieldOffset(Offsets.Calls)]
    public FastCalls Calls;

    /// <summary>Generated code: a word that one instruction keeps for itself between two checks.</summary>
    [FieldOffset(Offsets.Scratch)]
    public ulong Scratch;

    /// <summary>CPUID in generated code.</summary>
    [FieldOffset(Offsets.LastCpuid)]
    public LastCpuid LastCpuid;

    /// <summary>Where InstructionCount stops (SoftVcpu.StopAt).</summary>
    [FieldOffset(Offsets.CountLimit)]
    public ulong CountLimit;

    /// <summary>RDTSC in generated code; Value has the vCPU's offset. The limit is 0 where RDTSC may fault.</summary>
    [FieldOffset(Offsets.Tsc)]
    public TscLine Tsc;

    /// <summary>PAE page-directory-pointer registers (SDM 3A 4.4.1).</summary>
    [FieldOffset(0x2F0)]
    public fixed ulong Pdpte[4];

    /// <summary>TLB fills, for statistics.</summary>
    [FieldOffset(0x310)]
    public ulong TlbFills;

    /// <summary>TLB number of each PCID, 0 for none.</summary>
    [FieldOffset(0x390)]
    public ushort* PcidAsids;

    /// <summary>EXT: 1 in error codes while an external event is being delivered.</summary>
    [FieldOffset(0x3A0)]
    public int ExternalBit;

    /// <summary>1 when the block cache must be emptied before the next block (memory slots changed).</summary>
    [FieldOffset(0x3A4)]
    public int BlocksStale;

    /// <summary>VmShared.Epoch as this vCPU last saw it between two blocks.</summary>
    [FieldOffset(0x3A8)]
    public long SeenEpoch;

    /// <summary>Last TLB number given out.</summary>
    [FieldOffset(0x398)]
    public uint LastAsid;

    /// <summary>1 when a stack offset is a linear address: 64-bit mode, or SS flat.</summary>
    [FieldOffset(0x39C)]
    public int StackFlat;

    /// <summary>Generated code: linear address of the page whose code runs.</summary>
    [FieldOffset(Offsets.CodeBase)]
    public ulong CodeBase;

    /// <summary>Generated code: arithmetic flags as LAHF (bits 15:8) and SETO (bits 7:0) leave them in AX.</summary>
    [FieldOffset(Offsets.FlagImage)]
    public ulong FlagImage;

    /// <summary>Generated code: 0 vector registers are in the context; 1 XMM, 2 YMM are in the host's registers.</summary>
    [FieldOffset(Offsets.VectorsLoaded)]
    public int VectorsLoaded;

    /// <summary>What <see cref="VectorsLoaded"/> may become: 0 where an instruction would raise an exception.</summary>
    [FieldOffset(Offsets.VectorsReady)]
    public int VectorsReady;

    /// <summary>Generated code left through this exit record, or for this record's handler.</summary>
    [FieldOffset(Offsets.ExitInfo)]
    public ulong ExitInfo;

    /// <summary>This context's address.</summary>
    [FieldOffset(Offsets.Self)]
    public CpuContext* Self;

    /// <summary>The function behind the handler stub.</summary>
    [FieldOffset(Offsets.Helper)]
    public nint Helper;

    /// <summary>Generated code: the guest's x87 state is in the host's unit.</summary>
    [FieldOffset(Offsets.X87Loaded)]
    public int X87Loaded;

    /// <summary>What <see cref="X87Loaded"/> may become: 0 where an instruction would raise an exception.</summary>
    [FieldOffset(Offsets.X87Ready)]
    public int X87Ready;

    /// <summary>Generated code: the first block of the trace that calls a handler, as an offset in the arena.</summary>
    [FieldOffset(Offsets.TraceHead)]
    public uint TraceHead;

    /// <summary>Filled sites of each mode: entries of its journal.</summary>
    [FieldOffset(Offsets.SiteCounts)]
    public fixed int SiteCounts[Sites.Modes];

    /// <summary>First page's flags of the main memory (Sites.FindMainMemory).</summary>
    [FieldOffset(Offsets.SiteFlagsLow)]
    public ulong SiteFlagsLow;

    /// <summary>Pages of it.</summary>
    [FieldOffset(Offsets.SiteFlagsLength)]
    public ulong SiteFlagsLength;

    /// <summary>1 when the place that calls the handler should look into the TLB instead of having a site.</summary>
    [FieldOffset(Offsets.Thrashing)]
    public int Thrashing;

    /// <summary>
    /// 1 when a translated block adds its length to <see cref="InstructionCount"/> as it is entered; 2 when it leaves where
    /// that goes beyond <see cref="CountLimit"/>, too.
    /// </summary>
    [FieldOffset(0x7F0)]
    public int CountsBlocks;

    /// <summary>Accesses of generated code that did not find their page in their site; for statistics.</summary>
    [FieldOffset(Offsets.SiteMisses)]
    public ulong SiteMisses;

    /// <summary>Calls of handlers from generated code, by Iced code (Statistics.Codes entries); for statistics.</summary>
    [FieldOffset(0x7C8)]
    public long* HandlerCalls;

    /// <summary>Times that every translation was dropped; for statistics.</summary>
    [FieldOffset(0x7B0)]
    public long FlushesOfAll;

    /// <summary>Times that the translations of a page were dropped; for statistics.</summary>
    [FieldOffset(0x7B8)]
    public long FlushesOfPages;

    /// <summary>Changes to other translations by a load of CR3; for statistics.</summary>
    [FieldOffset(0x7C0)]
    public long SpaceSwitches;

    /// <summary>Current privilege level, 0 to 3.</summary>
    [FieldOffset(Offsets.Cpl)]
    public int Cpl;

    /// <summary>Invalidations of code (VmShared.CodeWrites) that this vCPU has acted upon.</summary>
    [FieldOffset(0x3E0)]
    public long SeenCodeWrites;

    /// <summary>Decoded blocks and the jump cache (BlockCache.cs).</summary>
    [FieldOffset(0x318)]
    public BlockCache Blocks;

    /// <summary>MSRs that handlers need fast.</summary>
    [FieldOffset(Offsets.Msrs)]
    public MsrFile Msr;

    /// <summary>The XSAVE area in standard format: x87, SSE, AVX at 576.</summary>
    [FieldOffset(XsaveOffset)]
    public fixed byte Xsave[4096];

    /// <summary>FCW.</summary>
    [FieldOffset(XsaveOffset + 0)]
    public ushort Fcw;

    /// <summary>FSW.</summary>
    [FieldOffset(XsaveOffset + 2)]
    public ushort Fsw;

    /// <summary>Abridged tag word.</summary>
    [FieldOffset(XsaveOffset + 4)]
    public byte Ftw;

    /// <summary>Last x87 opcode.</summary>
    [FieldOffset(XsaveOffset + 6)]
    public ushort Fop;

    /// <summary>Last x87 instruction pointer.</summary>
    [FieldOffset(XsaveOffset + 8)]
    public ulong Fip;

    /// <summary>Last x87 operand pointer.</summary>
    [FieldOffset(XsaveOffset + 16)]
    public ulong Fdp;

    /// <summary>MXCSR.</summary>
    [FieldOffset(XsaveOffset + 24)]
    public uint Mxcsr;

    /// <summary>XSTATE_BV as restored; not kept up to date while running (XsaveState.InUse computes it).</summary>
    [FieldOffset(XsaveOffset + 512)]
    public ulong XstateBv;

    /// <summary>A segment register (<see cref="Seg"/>).</summary>
    // SAFETY: the registers lie at SegmentsOffset of the context, which outlives every Run; callers pass a constant of Seg
    // or a record's segment, which the binder took from those.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static SegmentRegister* Segment(CpuContext* cpu, int index) =>
        (SegmentRegister*)((byte*)cpu + SegmentsOffset) + index;
}

/// <summary>What raised an exception: filled by <see cref="Faults"/>.</summary>
internal struct FaultInfo
{
    /// <summary>#PF: the linear address, which delivery stores in CR2. #DB: bits for DR6.</summary>
    public ulong Address;

    /// <summary>Error code, when <see cref="HasErrorCode"/>.</summary>
    public uint ErrorCode;

    /// <summary>Exception vector.</summary>
    public byte Vector;

    /// <summary>The vector pushes an error code.</summary>
    public bool HasErrorCode;

    /// <summary>#GP(0) for a non-canonical address: becomes #SS(0) where the segment is SS.</summary>
    public bool NonCanonical;

    /// <summary>
    /// The saved RIP points behind the instruction (traps: #DB single step, #BP, #OF); otherwise at it.
    /// </summary>
    public bool IsTrap;
}

/// <summary>What the processor executes as.</summary>
internal enum ProcessorMode
{
    /// <summary>CR0.PE clear.</summary>
    Real,

    /// <summary>Virtual-8086.</summary>
    Virtual8086,

    /// <summary>Protected mode, EFER.LMA clear.</summary>
    Protected,

    /// <summary>EFER.LMA set, CS.L clear.</summary>
    Compatibility,

    /// <summary>64-bit mode.</summary>
    Long,
}

/// <summary>Model-specific registers with a fixed place.</summary>
internal unsafe struct MsrFile
{
    public ulong Star;
    public ulong Lstar;
    public ulong Cstar;
    public ulong SfMask;
    public ulong KernelGsBase;
    public ulong SysenterCs;
    public ulong SysenterEsp;
    public ulong SysenterEip;
    public ulong Pat;
    public ulong TscAux;
    public ulong TscAdjust;

    /// <summary>TSC = clock ticks + this.</summary>
    public ulong TscOffset;
    public ulong MiscEnable;
    public ulong MtrrDefType;
    public ulong DebugCtl;
    public ulong SpecCtrl;
    public ulong Xss;
    public ulong MtrrFix64K;
    public fixed ulong MtrrFix16K[2];
    public fixed ulong MtrrFix4K[8];
    public fixed ulong MtrrVar[16];

    /// <summary>Machine check banks' CTL/STATUS/ADDR/MISC: state only.</summary>
    public fixed ulong Mc[40];
    public ulong McgStatus;
    public ulong McgCtl;

    /// <summary>AMD SYSCFG, HWCR, DE_CFG, VM_HSAVE_PA and TSC_RATIO are state only.</summary>
    public ulong SysCfg;
    public ulong HwCr;
    public ulong DeCfg;
    public ulong HsavePa;
    public ulong TscRatio;
}
