// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;

namespace Vmm.X86.Tests;

/// <summary>
/// What CPUID names is what is implemented: every encoding that Iced knows is bound with everything offered, and every
/// feature bit stands for an instruction, a bit of CR4, an MSR or something that is named here.
/// </summary>
public sealed unsafe class OfferedInstructionTests
{
    // Undefined by design: the instructions whose meaning is #UD, and PREFETCH of a register, which AMD's processors refuse
    // (APM 3, PREFETCHlevel) and Intel's ignore.
    private static readonly HashSet<Code> s_undefined =
    [
        Code.Ud0, Code.Ud0_r16_rm16, Code.Ud0_r32_rm32, Code.Ud0_r64_rm64, Code.Ud1_r16_rm16, Code.Ud1_r32_rm32,
        Code.Ud1_r64_rm64, Code.Ud2, Code.Reservednop_rm16_r16_0F0D, Code.Reservednop_rm32_r32_0F0D,
        Code.Reservednop_rm64_r64_0F0D,
    ];

    // Of CET and MPX, which are not offered: reserved NOPs.
    private static readonly HashSet<Mnemonic> s_nops =
    [
        Mnemonic.Rdsspd, Mnemonic.Rdsspq, Mnemonic.Bndmk, Mnemonic.Bndcl, Mnemonic.Bndcu, Mnemonic.Bndcn, Mnemonic.Bndmov,
        Mnemonic.Bndldx, Mnemonic.Bndstx,
    ];

    [Theory]
    [InlineData(16)]
    [InlineData(32)]
    [InlineData(64)]
    public void EveryEncoding_HasAHandlerExactlyWhenItIsOffered(int bitness)
    {
        using var vm = new TestVm(1 << 20);
        uint key = (uint)(bitness / 32);
        var wrong = new SortedSet<string>();
        int bound = 0;
        foreach (Instruction instruction in Encodings(bitness))
        {
            Insn insn;
            byte[] bytes = BytesOf(instruction, bitness);
            Binder.Bind(vm.Cpu, instruction, bytes, &insn, key);
            bool isUndefined = (nint)insn.Handler == (nint)(delegate*<CpuContext*, Insn*, Status>)&Misc.Ud ||
                (nint)insn.Handler == (nint)(delegate*<CpuContext*, Insn*, Status>)&VectorUnit.Undefined;
            bool isOffered = vm.Cpu.IsOffered(instruction.Code) && !s_undefined.Contains(instruction.Code);
            isOffered |= instruction.Mnemonic is Mnemonic.Wbnoinvd || s_nops.Contains(instruction.Mnemonic);
            bound += isUndefined ? 0 : 1;
            if (isUndefined == isOffered)
            {
                string features = string.Join(' ', instruction.Code.CpuidFeatures());
                wrong.Add($"{instruction.Code} [{features}] {(isOffered ? "is offered" : "is not offered")}");
            }
        }

        wrong.Should().BeEmpty();
        bound.Should().BeGreaterThan(900);
    }

    private static byte[] BytesOf(Instruction instruction, int bitness)
    {
        var writer = new BytesWriter();
        return Encoder.Create(bitness, writer).TryEncode(instruction, 0, out _, out _) ? [.. writer.Bytes] : new byte[16];
    }

    // One register and one memory form of each code, found by decoding every opcode of every map with every prefix.
    private static List<Instruction> Encodings(int bitness)
    {
        var found = new Dictionary<(Code Code, bool HasMemory), Instruction>();
        byte[][] legacy =
        [
            [], [0x66], [0xF3], [0xF2], [0x67], [0x66, 0xF3], [0x66, 0xF2], [0x48], [0x66, 0x48], [0xF3, 0x48], [0xF2, 0x48],
        ];
        byte[][] maps = [[], [0x0F], [0x0F, 0x38], [0x0F, 0x3A]];
        foreach (byte[] prefix in legacy.Where(prefix => bitness == 64 || !prefix.Contains((byte)0x48)))
        {
            foreach (byte[] map in maps)
            {
                Decode(found, bitness, [.. prefix, .. map]);
            }
        }

        for (int map = 1; map <= 3; map++)
        {
            for (int third = 0; third < 16; third++)
            {
                // VEX with L and pp in the low bits, W in bit 7, vvvv as "none" and as a register.
                byte last = (byte)((third & 7) | ((third & 8) << 4));
                Decode(found, bitness, [0xC4, (byte)(0xE0 | map), (byte)(last | 0x78)]);
                Decode(found, bitness, [0xC4, (byte)(0xE0 | map), (byte)(last | 0x70)]);
            }
        }

        return [.. found.Values];
    }

    private static void Decode(Dictionary<(Code Code, bool HasMemory), Instruction> found, int bitness, byte[] start)
    {
        byte[] bytes = new byte[24];
        start.CopyTo(bytes, 0);
        for (int opcode = 0; opcode < 256; opcode++)
        {
            bytes[start.Length] = (byte)opcode;
            for (int modrm = 0; modrm < 256; modrm++)
            {
                // Register forms, all of them behind the prefixes that choose; memory forms with one address, and one with a
                // SIB byte, which VSIB needs.
                bool isRegister = modrm >= 0xC0;
                if ((isRegister && (modrm & 7) != 0 && start.Length > 2) || (!isRegister && (modrm & 0xC7) is not (0x03 or 0x04)))
                {
                    continue;
                }

                bytes[start.Length + 1] = (byte)modrm;
                bytes[start.Length + 2] = 0x10;
                var decoder = Decoder.Create(bitness, new ByteArrayCodeReader(bytes));
                decoder.Decode(out Instruction instruction);
                if (instruction.Code != Code.INVALID)
                {
                    bool hasMemory = modrm < 0xC0;
                    found.TryAdd((instruction.Code, hasMemory), instruction);
                }
            }
        }
    }

    /// <summary>What stands behind each feature bit: codes that need it, a bit of CR4, an MSR, or a name of what does.</summary>
    public static TheoryData<string> Bits => [.. Rows().Select(row => row.Key)];

    [Fact]
    public void EveryAdvertisedBit_HasARow()
    {
        using var vm = new TestVm(1 << 20, translateAfter: 0);
        var missing = new List<string>();
        Dictionary<string, object> rows = Rows();
        foreach (CpuidEntry leaf in new SoftHypervisor(TestCode.Create()) { Translate = false }.SupportedCpuid)
        {
            foreach ((string name, uint value) in FeatureWords(leaf))
            {
                for (int bit = 0; bit < 32; bit++)
                {
                    if ((value >> bit & 1) != 0 && !rows.ContainsKey($"{name}.{bit}"))
                    {
                        missing.Add($"{name}.{bit}");
                    }
                }
            }
        }

        missing.Should().BeEmpty();
    }

    [Theory]
    [MemberData(nameof(Bits))]
    public void FeatureBit_WhenCleared_TakesItsInstructionOrControlBitAway(string bit)
    {
        using var vm = new TestVm(1 << 20, translateAfter: 0);
        CpuidEntry[] leaves = [.. new SoftHypervisor(TestCode.Create()) { Translate = false }.SupportedCpuid];
        object row = Rows()[bit];
        vm.Cpu.SetCpuid(leaves);
        if (!Has(leaves, bit))
        {
            // The host lacks it: then nothing may be there.
            (row is Code absent && vm.Cpu.IsOffered(absent)).Should().BeFalse();
            return;
        }

        Check(vm, row).Should().BeTrue("it is advertised");
        vm.Cpu.SetCpuid(Without(leaves, bit));
        if (row is Code or ulong)
        {
            Check(vm, row).Should().BeFalse("it is not advertised");
        }
    }

    // AMD64 APM 3, PREFETCHW: 3DNowPrefetch or long mode. Linux uses it on every AMD processor with long mode.
    [Fact]
    public void Prefetchw_IsThereWithLongModeAlone()
    {
        using var vm = new TestVm(1 << 20, translateAfter: 0);
        CpuidEntry[] leaves = Without([.. new SoftHypervisor(TestCode.Create()).SupportedCpuid], "80000001.0.ecx.8");
        vm.Cpu.SetCpuid(leaves);
        vm.Cpu.IsOffered(Code.Prefetchw_m8).Should().BeTrue();
        vm.Cpu.SetCpuid(Without(leaves, "80000001.0.edx.29"));
        vm.Cpu.IsOffered(Code.Prefetchw_m8).Should().BeFalse();
    }

    private static bool Check(TestVm vm, object row) => row switch
    {
        Code code => vm.Cpu.IsOffered(code),
        ulong control => (ControlRegisters.AllowedCr4(vm.Cpu.Context) & control) != 0,
        uint msr => Msrs.TryReadSaved(vm.Cpu, msr, out _),
        _ => true,
    };

    private static bool Has(CpuidEntry[] leaves, string bit) => leaves.Any(
        leaf => FeatureWords(leaf).Any(word => bit.StartsWith(word.Name + ".", StringComparison.Ordinal) &&
            (word.Value >> int.Parse(bit[(word.Name.Length + 1)..], null) & 1) != 0));

    private static CpuidEntry[] Without(CpuidEntry[] leaves, string bit)
    {
        string word = bit[..bit.LastIndexOf('.')];
        uint mask = ~(1U << int.Parse(bit[(word.Length + 1)..], null));
        return [.. leaves.Select(leaf => word[^3..] switch
        {
            _ when !word.StartsWith($"{leaf.Function:x}.{leaf.Index:x}.", StringComparison.Ordinal) => leaf,
            "eax" => leaf with { Eax = leaf.Eax & mask },
            "ebx" => leaf with { Ebx = leaf.Ebx & mask },
            "ecx" => leaf with { Ecx = leaf.Ecx & mask },
            _ => leaf with { Edx = leaf.Edx & mask },
        })];
    }

    private static IEnumerable<(string Name, uint Value)> FeatureWords(CpuidEntry leaf) => (leaf.Function, leaf.Index) switch
    {
        (1, _) => [("1.0.ecx", leaf.Ecx), ("1.0.edx", leaf.Edx)],
        (6, _) => [("6.0.eax", leaf.Eax)],
        (7, 0) => [("7.0.ebx", leaf.Ebx), ("7.0.ecx", leaf.Ecx), ("7.0.edx", leaf.Edx)],
        (0xD, 1) => [("d.1.eax", leaf.Eax)],
        (0x80000001, _) => [("80000001.0.ecx", leaf.Ecx), ("80000001.0.edx", leaf.Edx)],
        (0x80000007, _) => [("80000007.0.edx", leaf.Edx)],
        (0x80000008, _) => [("80000008.0.ebx", leaf.Ebx)],
        (0x80000021, _) => [("80000021.0.eax", leaf.Eax)],
        _ => [],
    };

    private static Dictionary<string, object> Rows()
    {
        var rows = new Dictionary<string, object>
        {
            ["1.0.ecx.0"] = Code.Addsubps_xmm_xmmm128,
            ["1.0.ecx.1"] = Code.Pclmulqdq_xmm_xmmm128_imm8,
            ["1.0.ecx.3"] = Code.Mwait,
            ["1.0.ecx.9"] = Code.Pshufb_xmm_xmmm128,
            ["1.0.ecx.12"] = Code.VEX_Vfmadd132ps_xmm_xmm_xmmm128,
            ["1.0.ecx.13"] = Code.Cmpxchg16b_m128,
            ["1.0.ecx.17"] = Cr4.PcidE,
            ["1.0.ecx.19"] = Code.Pmulld_xmm_xmmm128,
            ["1.0.ecx.20"] = Code.Pcmpistri_xmm_xmmm128_imm8,
            ["1.0.ecx.21"] = "x2APIC: the interrupt port's MSRs",
            ["1.0.ecx.22"] = Code.Movbe_r32_m32,
            ["1.0.ecx.23"] = Code.Popcnt_r32_rm32,
            ["1.0.ecx.24"] = "TSC deadline: the interrupt port's timer",
            ["1.0.ecx.25"] = Code.Aesenc_xmm_xmmm128,
            ["1.0.ecx.26"] = Cr4.OsXsave,
            ["1.0.ecx.28"] = Code.VEX_Vaddps_ymm_ymm_ymmm256,
            ["1.0.ecx.29"] = Code.VEX_Vcvtph2ps_ymm_xmmm128,
            ["1.0.ecx.30"] = Code.Rdrand_r32,
            ["1.0.ecx.31"] = "a hypervisor is present",
            ["1.0.edx.0"] = "x87: kept by every processor since the 486",
            ["1.0.edx.1"] = Cr4.Vme,
            ["1.0.edx.2"] = "debugging extensions: CR4.DE is always allowed",
            ["1.0.edx.3"] = "PSE: CR4.PSE is always allowed",
            ["1.0.edx.4"] = Code.Rdtsc,
            ["1.0.edx.5"] = Code.Rdmsr,
            ["1.0.edx.6"] = "PAE: CR4.PAE is always allowed",
            ["1.0.edx.7"] = "machine checks: CR4.MCE is always allowed",
            ["1.0.edx.8"] = Code.Cmpxchg8b_m64,
            ["1.0.edx.9"] = "APIC: the interrupt port's registers",
            ["1.0.edx.11"] = Code.Sysenter,
            ["1.0.edx.12"] = 0x2FFU,
            ["1.0.edx.13"] = "global pages: CR4.PGE is always allowed",
            ["1.0.edx.14"] = 0x179U,
            ["1.0.edx.15"] = Code.Cmove_r32_rm32,
            ["1.0.edx.16"] = 0x277U,
            ["1.0.edx.17"] = "PSE-36: the walker",
            ["1.0.edx.19"] = Code.Clflush_m8,
            ["1.0.edx.23"] = Code.Paddb_mm_mmm64,
            ["1.0.edx.24"] = Code.Fxsave_m512byte,
            ["1.0.edx.25"] = Code.Addps_xmm_xmmm128,
            ["1.0.edx.26"] = Code.Addpd_xmm_xmmm128,
            ["6.0.eax.2"] = "the APIC timer never stops",
            ["7.0.ebx.0"] = Cr4.FsGsBase,
            ["7.0.ebx.1"] = 0x3BU,
            ["7.0.ebx.3"] = Code.VEX_Andn_r32_r32_rm32,
            ["7.0.ebx.5"] = Code.VEX_Vpaddb_ymm_ymm_ymmm256,
            ["7.0.ebx.7"] = Cr4.Smep,
            ["7.0.ebx.8"] = Code.VEX_Pdep_r32_r32_rm32,
            ["7.0.ebx.9"] = "fast REP MOVSB and STOSB",
            ["7.0.ebx.10"] = Code.Invpcid_r64_m128,
            ["7.0.ebx.18"] = Code.Rdseed_r32,
            ["7.0.ebx.19"] = Code.Adcx_r32_rm32,
            ["7.0.ebx.20"] = Cr4.Smap,
            ["7.0.ebx.22"] = Code.Pcommit,
            ["7.0.ebx.23"] = Code.Clflushopt_m8,
            ["7.0.ebx.24"] = Code.Clwb_m8,
            ["7.0.ebx.29"] = Code.Sha1nexte_xmm_xmmm128,
            ["7.0.ecx.2"] = Cr4.Umip,
            ["7.0.ecx.3"] = Cr4.Pke,
            ["7.0.ecx.8"] = Code.Gf2p8mulb_xmm_xmmm128,
            ["7.0.ecx.9"] = Code.VEX_Vaesenc_ymm_ymm_ymmm256,
            ["7.0.ecx.10"] = Code.VEX_Vpclmulqdq_ymm_ymm_ymmm256_imm8,
            ["7.0.ecx.16"] = Cr4.La57,
            ["7.0.ecx.22"] = Code.Rdpid_r64,
            ["7.0.edx.4"] = "fast short REP MOVSB",
            ["d.1.eax.0"] = Code.Xsaveopt_mem,
            ["d.1.eax.1"] = Code.Xsavec_mem,
            ["d.1.eax.2"] = "XGETBV with ECX 1",
            ["80000001.0.ecx.0"] = "LAHF in 64-bit mode",
            ["80000001.0.ecx.4"] = "LOCK MOV CR0 is MOV CR8",
            ["80000001.0.ecx.5"] = Code.Lzcnt_r32_rm32,
            ["80000001.0.ecx.6"] = Code.Extrq_xmm_xmm,
            ["80000001.0.ecx.8"] = "PREFETCHW, which long mode has in any case",
            ["80000001.0.edx.11"] = Code.Syscall,
            ["80000001.0.edx.20"] = "no-execute: EFER.NXE",
            ["80000001.0.edx.22"] = "AMD's extensions to MMX are part of SSE",
            ["80000001.0.edx.26"] = "1 GiB pages: the walker",
            ["80000001.0.edx.27"] = Code.Rdtscp,
            ["80000001.0.edx.29"] = "long mode: EFER.LME",
            ["80000007.0.edx.8"] = "invariant TSC",
            ["80000008.0.ebx.2"] = "FXSAVE and XSAVE always save the error pointers",
            ["80000008.0.ebx.26"] = "no speculative store bypass",
            ["80000008.0.ebx.29"] = "not vulnerable to branch type confusion",
            ["80000021.0.eax.0"] = "no nested data breakpoints",
            ["80000021.0.eax.2"] = "LFENCE serialises",
            ["80000021.0.eax.6"] = "a null selector clears the base",
            ["80000021.0.eax.8"] = "automatic IBRS: EFER.AutoIbrs",
            ["80000021.0.eax.29"] = "not vulnerable to SRSO",
        };

        // AMD repeats leaf 1 (APM 3, CPUID Fn8000_0001_EDX).
        foreach (int bit in (int[])[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24])
        {
            rows[$"80000001.0.edx.{bit}"] = "as in leaf 1";
        }

        return rows;
    }

    private sealed class BytesWriter : CodeWriter
    {
        public List<byte> Bytes { get; } = [];

        public override void WriteByte(byte value) => Bytes.Add(value);
    }
}
