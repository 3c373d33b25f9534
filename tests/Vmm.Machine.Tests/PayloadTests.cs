// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;
using FluentAssertions;
using Vmm.Config;
using Vmm.Core;
using Xunit;

namespace Vmm.Machine.Tests;

/// <summary>Whole machines that run a few instructions, under every driver of this host.</summary>
public sealed class PayloadTests : IDisposable
{
    private readonly string _directory = Directory.CreateTempSubdirectory("vmm-payload-").FullName;

    public static TheoryData<string, string> Drivers
    {
        get
        {
            var data = new TheoryData<string, string> { { "soft", "user" } };
            if (File.Exists("/dev/kvm"))
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
        var output = new Recorder();
        Run(driver, irqchip, output, [.. Print("hello"), 0xB0, 5, 0xE6, 0xF4]).Should().Be((5 << 1) | 1);
        output.Text.Should().Be("hello");
    }

    [Theory]
    [MemberData(nameof(Drivers))]
    public void PowerOff_ThroughAcpi_EndsWith1(string driver, string irqchip) =>
        Run(driver, irqchip, new Recorder(), [0x66, 0xBA, 0x04, 0x06, 0x66, 0xB8, 0x00, 0x20, 0x66, 0xEF]).Should().Be(1);

    [Theory]
    [MemberData(nameof(Drivers))]
    public void Reset_ThroughPortCf9_EndsWith0(string driver, string irqchip) =>
        Run(driver, irqchip, new Recorder(), [0x66, 0xBA, 0xF9, 0x0C, 0xB0, 0x06, 0xEE]).Should().Be(0);

    [Theory]
    [MemberData(nameof(Drivers))]
    public void TripleFault_EndsWith3(string driver, string irqchip) =>
        Run(driver, irqchip, new Recorder(), [0x0F, 0x01, 0x1D, 0, 0, 0, 0, 0x0F, 0x0B]).Should().Be(3);

    [Fact]
    public void Halt_WithInterruptsOff_EndsWith2() =>
        Run("soft", "user", new Recorder(), [0xFA, 0xF4]).Should().Be(2);

    // A flat multiboot image at 1 MiB; the code follows the header and ends in a loop.
    private int Run(string driver, string irqchip, Recorder output, byte[] code)
    {
        var image = new byte[4096];
        const uint Flags = 1 << 16;
        uint[] header = [0x1BADB002, Flags, unchecked(0u - 0x1BADB002 - Flags), 0x100000, 0x100000, 0x101000, 0x101000, 0x100020];
        for (int i = 0; i < header.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(i * 4), header[i]);
        }

        code.CopyTo(image, 0x20);
        image[0x20 + code.Length] = 0xEB;
        image[0x21 + code.Length] = 0xFE;
        string kernel = Path.Combine(_directory, "payload");
        File.WriteAllBytes(kernel, image);
        var spec = new MachineSpec
        {
            Name = "payload",
            MemoryBytes = 4 << 20,
            Accel = [driver],
            Irqchip = Enum.Parse<IrqchipChoice>(irqchip, ignoreCase: true),
            DebugExit = 0xF4,
            Boot = new BootSpec { Kernel = kernel },
        };
        var log = new StringWriter();
        int status = MachineRunner.Run(spec, new RunOptions { Stdio = output, ReportDriver = false }, log);
        if (status == 4)
        {
            throw new InvalidOperationException(log.ToString());
        }

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

    private sealed class Recorder : ICharBackend
    {
        private readonly StringBuilder _text = new();

        public string Text
        {
            get
            {
                lock (_text)
                {
                    return _text.ToString();
                }
            }
        }

        public void Write(ReadOnlySpan<byte> bytes)
        {
            lock (_text)
            {
                _text.Append(Encoding.ASCII.GetString(bytes));
            }
        }

        public void Attach(ICharReceiver receiver)
        {
        }

        public void ResumeInput()
        {
        }

        public void Dispose()
        {
        }
    }
}
