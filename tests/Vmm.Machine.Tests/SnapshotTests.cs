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

    [Theory]
    [MemberData(nameof(Pairs))]
    public void Machine_SavedInHaltAndAgainAtWork_IsNotHaltedAnyMore(string from, string to)
    {
        // A timer of the local APIC ends the HLT; its handler never returns and looks for input with interrupts off.
        const uint Handler = 0x100100;
        byte[] code =
        [
            0xBC, 0, 0, 0x18, 0,                                        // mov esp, 0x180000
            0x8C, 0xC8, 0xC1, 0xE0, 0x10, 0x0D, .. BitConverter.GetBytes((ushort)(Handler & 0xFFFF)), 0, 0,  // mov eax, cs ; shl eax, 16 ; or eax, handler
            0xA3, 0, 0x01, 0x11, 0,                                     // mov [0x110100], eax          the gate of vector 0x20
            0xC7, 0x05, 4, 0x01, 0x11, 0, 0, 0x8E, 0x10, 0,             // mov dword [0x110104], 0x108E00
            0x66, 0xC7, 0x05, 0, 0, 0x12, 0, 0xFF, 0x07,                // mov word [0x120000], 0x7FF
            0xC7, 0x05, 2, 0, 0x12, 0, 0, 0, 0x11, 0,                   // mov dword [0x120002], 0x110000
            0x0F, 0x01, 0x1D, 0, 0, 0x12, 0,                            // lidt [0x120000]
            0xB0, 0xFF, 0xE6, 0x21,                                     // mov al, 0xFF ; out 0x21, al
            0xC7, 0x05, 0xF0, 0, 0xE0, 0xFE, 0xFF, 1, 0, 0,             // mov dword [0xFEE000F0], 0x1FF   enabled
            0xC7, 0x05, 0xE0, 3, 0xE0, 0xFE, 0x0A, 0, 0, 0,             // mov dword [0xFEE003E0], 10      divided by 128
            0xC7, 0x05, 0x20, 3, 0xE0, 0xFE, 0x20, 0, 0, 0,             // mov dword [0xFEE00320], 0x20    once
            0xC7, 0x05, 0x80, 3, 0xE0, 0xFE, .. BitConverter.GetBytes(3_000_000),
            0xB0, (byte)'a', 0x66, 0xBA, 0xF8, 0x03, 0xEE, 0xFB, 0xF4,  // mov al, 'a' ; mov dx, 0x3F8 ; out dx, al ; sti ; hlt
        ];
        byte[] handler =
        [
            0xB0, (byte)'b', 0xEE, 0x66, 0xBA, 0xFD, 0x03,              // mov al, 'b' ; out dx, al ; mov dx, 0x3FD
            0xEC, 0xA8, 0x01, 0x74, 0xFB,                               // L: in al, dx ; test al, 1 ; jz L
            0xB0, 0x15, 0xE6, 0xF4,                                     // mov al, 0x15 ; out 0xF4, al
        ];
        Array.Resize(ref code, (int)(Handler - 0x100020));
        MachineSpec spec = Payload.Spec(_directory, [.. code, .. handler]);
        using var halted = new MemoryStream();
        var output = new Payload.Recorder();
        using (Machine first = Build(spec, from, output))
        {
            first.Resume();
            SpinWait.SpinUntil(() => output.Text.Length > 0, TimeSpan.FromSeconds(20)).Should().BeTrue();
            first.Pause();
            first.Result.Should().BeNull();
            first.Save(halted);
        }

        // On a busy machine the timer may have come before the pause.
        string before = output.Text;
        halted.Position = 0;
        using var atWork = new MemoryStream();
        output = new Payload.Recorder();
        using (Machine second = Build(spec, to, output))
        {
            second.Load(halted);
            second.Resume();
            SpinWait.SpinUntil(() => (before + output.Text).Contains('b'), TimeSpan.FromSeconds(20)).Should().BeTrue(second.Result?.ToString());
            second.Pause();
            second.Save(atWork);
        }

        atWork.Position = 0;
        output = new Payload.Recorder();
        using Machine third = Build(spec, from, output);
        third.Load(atWork);
        third.Resume();
        output.Send((byte)'c');
        SpinWait.SpinUntil(() => third.Result is not null, TimeSpan.FromSeconds(20)).Should().BeTrue();
        third.Result!.ExitStatus.Should().Be((0x15 << 1) | 1, third.Result.Message);
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
