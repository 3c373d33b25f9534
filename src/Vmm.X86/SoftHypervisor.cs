// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;
using System.IO;
using Vmm.Core;

namespace Vmm.X86;

/// <summary>The software processor as a driver: works on every x86-64 host, needs no privilege.</summary>
public sealed class SoftHypervisor : IHypervisor
{
    /// <summary>
    /// Code memory: thunks, which are bounded by the instruction set, and an arena for each vCPU's translated blocks. All of
    /// it is within reach of a jump. Pages are committed when they are used; vCPUs beyond the last arena are interpreted.
    /// </summary>
    public const int CodeMemoryBytes = ThunkBytes + (MaxVcpus * (28 << 20));

    /// <summary>Bytes for thunks.</summary>
    internal const int ThunkBytes = 64 << 20;

    private const int MaxVcpus = 64;

    /// <summary>
    /// A vCPU that has filled its arena starts again from nothing, so an arena has to hold the code that large programs
    /// execute (a compiler's takes 120 MB). No vCPU gets more than this.
    /// </summary>
    private const int MaxArenaBytes = 256 << 20;

    /// <summary>With these, a small host still runs a guest at a fair speed.</summary>
    private const int MinArenaBytes = 16 << 20;

    private readonly ThunkCache? _thunks;

    /// <summary>Makes the driver.</summary>
    /// <param name="code">
    /// Memory for generated code, of <see cref="CodeMemoryBytes"/>; the caller disposes it after this. Null when the host
    /// forbids it: guests then get a processor without x87, MMX, SSE and AVX (see <see cref="Restriction"/>).
    /// </param>
    /// <param name="refusal">Why there is none, in a line.</param>
    public SoftHypervisor(ICodeMemory? code, string? refusal = null)
    {
        Restriction = code is null ? $"no x87, MMX, SSE and AVX for guests: {refusal ?? "no executable memory"}" : null;
        _thunks = code is null ? null : new ThunkCache(code);
        SupportedCpuid = CpuidTable.Build(hasVectorUnit: code is not null);
    }

    /// <summary>Null, or one line that says what guests go without and why.</summary>
    public string? Restriction { get; }

    /// <summary>Translate hot code of VMs made from now on; otherwise everything is interpreted.</summary>
    public bool Translate { get; set; } = true;

    /// <summary>
    /// Lets translated code of VMs made from now on count what it executes, so that SoftVcpu.InstructionsRetired is the
    /// interpreter's count, instruction for instruction, whenever the vCPU has left Run or is in a device. Costs three
    /// instructions a block; without it only what the interpreter executes is counted.
    /// </summary>
    public bool CountInstructions { get; set; }

    /// <summary>
    /// VMs made from now on repeat themselves: they count instructions, stop where <see cref="SoftVcpu.StopAt"/> says, and
    /// RDRAND gives a fixed sequence.
    /// </summary>
    public bool Deterministic { get; set; }

    /// <summary>
    /// Lets translated code of VMs made from now on count its checks of memory operands and its look-ups of branch
    /// targets, for statistics. Costs an instruction or two for each; without it such code is not made.
    /// </summary>
    public bool CountAccesses { get; set; }

    /// <summary>
    /// Gets a line for each translated block of VMs made from now on, in the form of Linux perf's /tmp/perf-PID.map. The
    /// caller disposes it after the VMs; vCPU threads write to it under its lock.
    /// </summary>
    public TextWriter? PerfMap { get; set; }

    /// <summary>Frequency of the guest's TSC: one tick a nanosecond.</summary>
    public const long TscKhz = 1_000_000;

    /// <inheritdoc/>
    public string Name => "soft";

    /// <inheritdoc/>
    public HypervisorCapabilities Capabilities { get; } = new()
    {
        MaxVcpus = MaxVcpus,
        MaxMemorySlots = SlotTable.MaxSlots,
        IrqchipModes = [IrqchipMode.User],
        ReadOnlyMemory = true,
        FastKernelCode = true,
        TscKhz = TscKhz,
        UserApicMsrs = true,
    };

    /// <inheritdoc/>
    public IReadOnlyList<CpuidEntry> SupportedCpuid { get; }

    /// <inheritdoc/>
    public IReadOnlyList<uint> SavedMsrs => Msrs.Saved;

    /// <inheritdoc/>
    public IVm CreateVm(VmOptions options)
    {
        System.ArgumentNullException.ThrowIfNull(options);
        return new SoftVm(options, TscKhz, _thunks)
        {
            ArenaBytes = ArenaBytes(options.VcpuCount ?? MaxVcpus, System.GC.GetGCMemoryInfo().TotalAvailableMemoryBytes),
            Translate = Translate,
            CountInstructions = CountInstructions || Deterministic,
            Deterministic = Deterministic,
            CountAccesses = CountAccesses,
            PerfMap = PerfMap,
        };
    }

    /// <inheritdoc/>
    public void Dispose() => _thunks?.Dispose();

    /// <summary>
    /// Bytes for one vCPU's translated blocks: an equal part of the code memory, and of a sixteenth of the host's memory,
    /// because three times as much goes into the records of the same blocks. A multiple of 64 KiB.
    /// </summary>
    internal static int ArenaBytes(int vcpus, long hostBytes)
    {
        long part = System.Math.Min(CodeMemoryBytes - ThunkBytes, hostBytes / 16) / System.Math.Clamp(vcpus, 1, MaxVcpus);
        return (int)System.Math.Clamp(part, MinArenaBytes, MaxArenaBytes) & ~0xFFFF;
    }
}
