// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Threading;
using FluentAssertions;
using Vmm.Config;
using Vmm.Core;
using Xunit;

namespace Vmm.Machine.Tests;

/// <summary>A machine is saved in the middle of its work and finishes it elsewhere, also under another driver.</summary>
public sealed class SnapshotTests : IDisposable
{
    private readonly string _directory = Directory.CreateTempSubdirectory("vmm-snapshot-").FullName;

    public static TheoryData<string, string> Pairs
    {
        get
        {
            var data = new TheoryData<string, string> { { "soft", "soft" } };
            if (File.Exists("/dev/kvm"))
            {
                data.Add("kvm", "kvm");
                data.Add("soft", "kvm");
                data.Add("kvm", "soft");
            }

            return data;
        }
    }

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    [Theory]
    [MemberData(nameof(Pairs))]
    public void Machine_SavedUnderOneDriver_FinishesUnderTheOther(string from, string to)
    {
        // mov ebx, 0x15 ; xor esi, esi ; mov ecx, N ; mov dx, 0x3F8 ; mov al, 'a' ; out dx, al
        // L: inc esi ; mov [0x200000], esi ; dec ecx ; jnz L
        // cmp dword [0x200000], N ; jne bad ; mov al, bl ; out 0xF4, al ; bad: mov al, 0 ; out 0xF4, al
        const uint Turns = 2_000_000;
        byte[] turns = BitConverter.GetBytes(Turns);
        byte[] code =
        [
            0xBB, 0x15, 0, 0, 0, 0x31, 0xF6, 0xB9, .. turns, 0x66, 0xBA, 0xF8, 0x03, 0xB0, (byte)'a', 0xEE,
            0x46, 0x89, 0x35, 0, 0, 0x20, 0, 0x49, 0x75, 0xF6,
            0x81, 0x3D, 0, 0, 0x20, 0, .. turns, 0x75, 0x04, 0x88, 0xD8, 0xE6, 0xF4, 0xB0, 0, 0xE6, 0xF4,
        ];
        MachineSpec spec = Payload.Spec(_directory, code);
        using var snapshot = new MemoryStream();
        var output = new Payload.Recorder();
        using (Machine first = Build(spec, from, output))
        {
            first.Resume();
            SpinWait.SpinUntil(() => output.Text.Length > 0, TimeSpan.FromSeconds(20)).Should().BeTrue();
            first.Pause();
            first.Result.Should().BeNull("the work must be under way when it is saved");
            first.Save(snapshot);
        }

        snapshot.Position = 0;
        using Machine second = Build(spec, to, new Payload.Recorder());
        second.Load(snapshot);
        second.Run().ExitStatus.Should().Be((0x15 << 1) | 1);
    }

    [Fact]
    public void Load_DamagedSnapshot_OnlyThrowsStateException()
    {
        MachineSpec spec = Payload.Spec(_directory, [0xF4]);
        using var snapshot = new MemoryStream();
        using (Machine machine = Build(spec, "soft", new Payload.Recorder()))
        {
            machine.Save(snapshot);
        }

        byte[] good = snapshot.ToArray();
        var random = new Random(3);
        for (int i = 0; i < 40; i++)
        {
            byte[] bad = good[..random.Next(1, good.Length + 1)];
            bad[random.Next(bad.Length)] ^= (byte)random.Next(1, 256);
            using Machine machine = Build(spec, "soft", new Payload.Recorder());
            Action load = () => machine.Load(new MemoryStream(bad));
            load.Should().Throw<StateException>();
        }
    }

    [Fact]
    public void Load_OtherDefinition_SaysWhatDiffers()
    {
        MachineSpec spec = Payload.Spec(_directory, [0xF4]);
        using var snapshot = new MemoryStream();
        using (Machine machine = Build(spec, "soft", new Payload.Recorder()))
        {
            machine.Save(snapshot);
        }

        snapshot.Position = 0;
        using Machine larger = Build(spec with { MemoryBytes = 8 << 20 }, "soft", new Payload.Recorder());
        Action load = () => larger.Load(snapshot);
        load.Should().Throw<StateException>().WithMessage("*4 MiB*8*");
    }

    private static Machine Build(MachineSpec spec, string driver, ICharBackend stdio) => MachineBuilder.Build(
        spec with { Irqchip = IrqchipChoice.User, Cpus = new CpuSpec { Model = "x86-64-v2" } },
        AccelChooser.Choose([driver]).Hypervisor,
        stdio);
}
