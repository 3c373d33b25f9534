// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Vmm.Config;
using Vmm.Kvm;
using Xunit;

namespace Vmm.Machine.Tests;

/// <summary>Whole machines that run a few instructions, under every driver of this host.</summary>
public sealed class PayloadTests : IDisposable
{
    private const int LimitMs = 60_000;
    private readonly string _directory = Directory.CreateTempSubdirectory("vmm-payload-").FullName;
    private string _log = "";

    public static TheoryData<string, string> Drivers
    {
        get
        {
            var data = new TheoryData<string, string> { { "soft", "user" } };
            if (KvmProbe.Diagnose().IsUsable)
            {
                data.Add("kvm", "user");
                data.Add("kvm", "split");
                data.Add("kvm", "kernel");
            }

            return data;
        }
    }

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    [Theory]
    [MemberData(nameof(Drivers))]
    public void DebugExit_EndsWithItsStatus_AfterSerialOutput(string driver, string irqchip)
    {
        var output = new Payload.Recorder();
        Run(driver, irqchip, output, [.. Print("hello"), 0xB0, 5, 0xE6, 0xF4]).Should().Be((5 << 1) | 1);
        output.Text.Should().Be("hello");
    }

    [Theory]
    [MemberData(nameof(Drivers))]
    public void PowerOff_ThroughAcpi_EndsWith1(string driver, string irqchip)
    {
        Run(driver, irqchip, new Payload.Recorder(), [0x66, 0xBA, 0x04, 0x06, 0x66, 0xB8, 0x00, 0x20, 0x66, 0xEF]).Should().Be(1);
        _log.Should().Be("vmctl: payload: powered off by ACPI S5");
    }

    [Theory]
    [MemberData(nameof(Drivers))]
    public void Reset_ThroughPortCf9_EndsWith0(string driver, string irqchip)
    {
        Run(driver, irqchip, new Payload.Recorder(), [0x66, 0xBA, 0xF9, 0x0C, 0xB0, 0x06, 0xEE]).Should().Be(0);
        _log.Should().Be("vmctl: payload: reset by port 0xCF9");
    }

    [Theory]
    [MemberData(nameof(Drivers))]
    public void Reset_ThroughTheKeyboardController_EndsWith0(string driver, string irqchip)
    {
        // Only a machine with a screen or firmware has one.
        Run(driver, irqchip, new Payload.Recorder(), [0xB0, 0xFE, 0xE6, 0x64], VgaModel.Std).Should().Be(0);
        _log.Should().Be("vmctl: payload: reset by the keyboard controller");
    }

    // An x87 operand in memory-mapped registers: no KVM emulates that, so the software processor completes it. The sum
    // of 1.0 and what a floating bus gives is a NaN of all ones; its top byte, cut to six bits, becomes the status.
    [Theory]
    [MemberData(nameof(Drivers))]
    public void InstructionThatNoDriverEmulates_IsCompleted(string driver, string irqchip) =>
        Run(
            driver,
            irqchip,
            new Payload.Recorder(),
            [
                0xDB, 0xE3,                             // fninit
                0xD9, 0xE8,                             // fld1
                0xD8, 0x05, 0x00, 0x00, 0x00, 0xD0,     // fadd dword [0xD0000000]
                0xD9, 0x1D, 0x00, 0x00, 0x30, 0x00,     // fstp dword [0x300000]
                0xA0, 0x03, 0x00, 0x30, 0x00,           // mov al, [0x300003]
                0x24, 0x3F,                             // and al, 0x3F
                0xE6, 0xF4,                             // out 0xF4, al
            ]).Should().Be((0x3F << 1) | 1);

    [Theory]
    [MemberData(nameof(Drivers))]
    public void TripleFault_EndsWith3(string driver, string irqchip)
    {
        Run(driver, irqchip, new Payload.Recorder(), [0x0F, 0x01, 0x1D, 0, 0, 0, 0, 0x0F, 0x0B]).Should().Be(3);
        _log.Should().Be("vmctl: payload: vCPU 0: triple fault");
    }

    // The guest makes a gate for vector 2, opens LINT1 and spins or halts; the handler ends it.
    [Theory]
    [MemberData(nameof(Drivers))]
    public void Nmi_WhileTheGuestSpinsOrHalts_IsTaken(string driver, string irqchip)
    {
        foreach (bool halts in new[] { false, true })
        {
            byte[] wait = halts ? [0xFB, 0xF4, 0xEB, 0xFE] : [0xEB, 0xFE]; // sti; hlt; jmp $
            byte[] handler = [0xB0, 7, 0xE6, 0xF4]; // mov al, 7; out 0xF4, al
            byte[] start =
            [
                0xBC, 0x00, 0x00, 0x30, 0x00,                               // mov esp, 0x300000
                0x66, 0xC7, 0x05, 0x10, 0x00, 0x20, 0x00, 0, 0,             // mov word [0x200010], handler
                0x66, 0x8C, 0x0D, 0x12, 0x00, 0x20, 0x00,                   // mov [0x200012], cs
                0x66, 0xC7, 0x05, 0x14, 0x00, 0x20, 0x00, 0x00, 0x8E,       // mov word [0x200014], 0x8E00
                0x66, 0xC7, 0x05, 0x16, 0x00, 0x20, 0x00, 0x10, 0x00,       // mov word [0x200016], 0x10
                0x66, 0xC7, 0x05, 0x00, 0x10, 0x20, 0x00, 0xFF, 0x07,       // mov word [0x201000], 0x7FF
                0xC7, 0x05, 0x02, 0x10, 0x20, 0x00, 0x00, 0x00, 0x20, 0x00, // mov dword [0x201002], 0x200000
                0x0F, 0x01, 0x1D, 0x00, 0x10, 0x20, 0x00,                   // lidt [0x201000]
                0xC7, 0x05, 0xF0, 0x00, 0xE0, 0xFE, 0xFF, 0x01, 0x00, 0x00, // mov dword [0xFEE000F0], 0x1FF
                0xC7, 0x05, 0x60, 0x03, 0xE0, 0xFE, 0x00, 0x04, 0x00, 0x00, // mov dword [0xFEE00360], 0x400
                0xB0, 0xFF, 0xE6, 0x21, 0xE6, 0xA1,                         // mov al, 0xFF; out 0x21, al; out 0xA1, al
                .. Print("r"),
            ];
            BitConverter.TryWriteBytes(start.AsSpan(12), (ushort)(0x20 + start.Length + wait.Length)).Should().BeTrue();
            var output = new Payload.Recorder();

            Run(driver, irqchip, output, [.. start, .. wait, .. handler], onBuilt: machine => _ = Task.Run(() =>
            {
                SpinWait.SpinUntil(() => output.Text == "r", 60_000);
                machine.InjectNmi();
            })).Should().Be((7 << 1) | 1);
        }
    }

    [Fact]
    public void Halt_WithInterruptsOff_EndsWith2() =>
        Run("soft", "user", new Payload.Recorder(), [0xFA, 0xF4]).Should().Be(2);

    [Fact]
    public void CountedClock_WithTwoVcpus_IsRefusedInALine()
    {
        MachineSpec spec = Payload.Spec(_directory, [0xF4]) with
        {
            Accel = ["soft"],
            Clock = new ClockSpec { Source = ClockSource.Icount },
            Cpus = new CpuSpec { Count = 2 },
        };
        var log = new StringWriter();
        MachineRunner.Run(spec, new RunOptions { ReportDriver = false }, log).Should().Be(MachineRunner.StatusConfig);
        log.ToString().Trim().Should().Be("vmctl: payload: clock: icount needs cpus: 1; there are 2");
    }

    // A guest that halts at once, with a screen.
    [Theory]
    [InlineData("0.0.0.0:0", "whoever reaches 0.0.0.0:0 has the screen and the keyboard")]
    [InlineData("127.0.0.1:0", null)]
    public void ScreenForEverybody_WithoutAPassword_IsRemarkedUpon(string address, string? remark)
    {
        MachineSpec spec = Payload.Spec(_directory, [0xFA, 0xF4]) with
        {
            Accel = ["soft"],
            Display = new DisplaySpec { Vga = VgaModel.Std, VncAddress = address },
        };
        var log = new StringWriter();

        MachineRunner.Run(spec, new RunOptions { ReportDriver = false }, log).Should().Be(2);

        if (remark is null)
        {
            log.ToString().Should().NotContain("whoever reaches");
        }
        else
        {
            log.ToString().Should().Contain(remark);
        }
    }

    private int Run(
        string driver,
        string irqchip,
        Payload.Recorder output,
        byte[] code,
        VgaModel vga = VgaModel.None,
        Action<Machine>? onBuilt = null)
    {
        MachineSpec spec = Payload.Spec(_directory, code) with
        {
            Accel = [driver],
            Irqchip = Enum.Parse<IrqchipChoice>(irqchip, ignoreCase: true),
            Display = new DisplaySpec { Vga = vga },
        };
        var log = new StringWriter();
        int status = MachineRunner.Run(spec, new RunOptions
        {
            Stdio = output,
            ReportDriver = false,
            OnBuilt = machine =>
            {
                onBuilt?.Invoke(machine);
                return new Timer(
                    _ => machine.Stop(MachineResult.For(StopReason.Error, $"still runs after {LimitMs / 1000} s")), null, LimitMs, Timeout.Infinite);
            },
        }, log);
        _log = log.ToString().Trim();
        status.Should().NotBe(4, _log);
        return status;
    }

    // mov dx, 0x3F8 ; { mov al, c ; out dx, al }
    private static byte[] Print(string text)
    {
        var code = new List<byte> { 0x66, 0xBA, 0xF8, 0x03 };
        foreach (char c in text)
        {
            code.AddRange([0xB0, (byte)c, 0xEE]);
        }

        return [.. code];
    }
}
