// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using FluentAssertions;
using Vmm.Config;
using Vmm.Core;
using Vmm.X86;
using Xunit;

namespace Vmm.Machine.Tests;

/// <summary>A test that needs Debian's cloud kernel; skipped where it is not installed.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class CloudKernelTheoryAttribute : TheoryAttribute
{
    public CloudKernelTheoryAttribute() => Skip = Kernel is null ? "no /boot/vmlinuz-*-cloud-amd64" : null;

    /// <summary>The newest one.</summary>
    public static string? Kernel { get; } = Newest();

    private static string? Newest()
    {
        string[] all = Directory.Exists("/boot") ? Directory.GetFiles("/boot", "vmlinuz-*-cloud-amd64") : [];
        Array.Sort(all, StringComparer.Ordinal);
        return all.Length == 0 ? null : all[^1];
    }
}

/// <summary>With <c>clock: icount</c> the same definition does the same in every run.</summary>
public sealed class CountedClockTests
{
    private const long MemoryBytes = 96 << 20;
    private const int ChunkBytes = 64 << 10;

    // Guest time is 1 ns an instruction, so that this is about as many instructions, and what the kernel sleeps.
    private const long FirstNs = 100_000_000;
    private const long StepNs = 150_000_000;
    private const int Probes = 5;

    // Debian's kernel, which ends in a panic without a root file system.
    [CloudKernelTheory]
    [InlineData(true)]
    public void DebianKernel_BootedTwice_IsTheSameAtTheSameInstructions(bool translate)
    {
        (List<string> first, string firstText) = Boot(translate);
        (List<string> second, string secondText) = Boot(translate);

        first.Should().HaveCount(Probes);
        second.Should().Equal(first);
        secondText.Should().Be(firstText, "time stamps are guest time");
        firstText.Should().Contain("Linux version").And.Contain("] ");
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void Pit_ReadBehindALoop_ShowsTheSameEachTime(bool translate)
    {
        // Channel 0 in mode 2 at 18.2 Hz, latched behind two million instructions.
        byte[] code =
        [
            0xB0, 0x34, 0xE6, 0x43, 0x30, 0xC0, 0xE6, 0x40, 0xE6, 0x40,     // mov al,34h; out 43h; xor al,al; out 40h twice
            0xB9, 0x00, 0x00, 0x10, 0x00,                                   // mov ecx, 100000h
            0x49, 0x75, 0xFD,                                               // L: dec ecx; jnz L
            0xB0, 0x00, 0xE6, 0x43, 0xE4, 0x40, 0x88, 0xC3, 0xE4, 0x40,     // latch; in al,40h; mov bl,al; in al,40h
            0x88, 0xD8, 0x83, 0xE0, 0x3F, 0xE6, 0xF4,                       // mov al,bl; and eax,63; out F4h
        ];
        string directory = Directory.CreateTempSubdirectory("vmm-icount-").FullName;
        try
        {
            MachineSpec spec = Payload.Spec(directory, code) with { Clock = new ClockSpec { Source = ClockSource.Icount } };
            var results = new HashSet<int>();
            for (int i = 0; i < 3; i++)
            {
                using Machine machine = Build(spec, translate, new Payload.Recorder());
                results.Add(machine.Run().ExitStatus);
                machine.Clock.NowNs.Should().BeInRange(0x200000, 0x300000, "an instruction is a nanosecond");
            }

            results.Should().ContainSingle("the PIT shows the same count after the same instructions");
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    private static Machine Build(MachineSpec spec, bool translate, ICharBackend stdio)
    {
        IHypervisor soft = AccelChooser.Choose(["soft"]).Hypervisor;
        ((SoftHypervisor)soft).Translate = translate;
        return MachineBuilder.Build(spec, soft, stdio);
    }

    // What the machine is at each of the probes, and what it has written.
    private static (List<string> Probes, string Text) Boot(bool translate)
    {
        var spec = new MachineSpec
        {
            Name = "counted",
            MemoryBytes = MemoryBytes,
            Clock = new ClockSpec { Source = ClockSource.Icount },
            Cpus = new CpuSpec { Model = "x86-64-v2" },
            Boot = new BootSpec { Kernel = CloudKernelTheoryAttribute.Kernel, Cmdline = "console=ttyS0 panic=-1 nokaslr" },
        };
        var output = new Payload.Recorder();
        var probes = new List<string>();
        using Machine machine = Build(spec, translate, output);
        IGuestTimer? timer = null;
        timer = machine.Clock.CreateTimer("probe", () =>
        {
            probes.Add(Describe(machine));
            if (probes.Count < Probes)
            {
                timer!.ArmAt(FirstNs + (probes.Count * StepNs));
            }
            else
            {
                machine.Stop(MachineResult.For(StopReason.PowerOff, "enough"));
            }
        });
        timer.ArmAt(FirstNs);
        machine.Run();
        return (probes, output.Text);
    }

    private static string Describe(Machine machine)
    {
        var vcpu = (SoftVcpu)machine.Vcpu(0);
        var state = new CpuState();
        vcpu.ReadState(state);
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        hash.AppendData(MemoryMarshal.AsBytes<ulong>(state.Gpr));
        hash.AppendData(MemoryMarshal.AsBytes<ulong>(new[] { state.Rip, state.Rflags, state.Cr0, state.Cr2, state.Cr3 }));
        hash.AppendData(state.Xsave);
        var chunk = new byte[ChunkBytes];
        for (ulong at = 0; at < MemoryBytes; at += ChunkBytes)
        {
            // The hole of the video memory is not RAM.
            if (machine.Memory.TryRead(at, chunk))
            {
                hash.AppendData(chunk);
            }
        }

        string digest = Convert.ToHexString(hash.GetHashAndReset());
        return string.Create(
            CultureInfo.InvariantCulture, $"{vcpu.InstructionsRetired} {machine.Clock.NowNs} {state.Rip:x} {digest}");
    }
}
