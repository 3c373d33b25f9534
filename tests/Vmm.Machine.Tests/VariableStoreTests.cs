// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Machine.Boot;
using Xunit;

namespace Vmm.Machine.Tests;

/// <summary>The file of UEFI variables: made once, kept, never shared, never half written.</summary>
public sealed class VariableStoreTests : IDisposable
{
    private readonly string _directory = Directory.CreateTempSubdirectory("vmm-vars").FullName;

    private string Vars => Path.Combine(_directory, "state", "vars.fd");

    [Fact]
    public void Open_WhenMissing_MakesItFromTheTemplateAndKeepsWhatTheChipWrites()
    {
        byte[] template = Template();
        using (VariableStore store = VariableStore.Open(Vars, template))
        {
            var chip = new FlashChip("flash", store.Content, store, null);
            chip.Write(4096, AccessWidth.Byte, 0x40);
            chip.Write(4096, AccessWidth.Byte, 0x0F);
            chip.Write(4096, AccessWidth.Byte, 0xFF);
        }

        template[4096] &= 0x0F;
        File.ReadAllBytes(Vars).Should().Equal(template);
        using VariableStore again = VariableStore.Open(Vars, null);
        Span<byte> one = stackalloc byte[1];
        again.Content.TryRead(4096, one).Should().BeTrue();
        one[0].Should().Be(template[4096]);
    }

    [Fact]
    public void Open_WithoutFileAndTemplate_SaysWhatIsMissing()
    {
        Action open = () => VariableStore.Open(Vars, null);
        open.Should().Throw<BootException>().WithMessage("*vars.fd does not exist*no template*");
    }

    [Theory]
    [InlineData(0)]
    [InlineData(4095)]
    [InlineData(8 << 20)]
    public void Open_OfAnOddSize_IsRefusedByName(int length)
    {
        Directory.CreateDirectory(Path.GetDirectoryName(Vars)!);
        File.WriteAllBytes(Vars, new byte[length]);
        Action open = () => VariableStore.Open(Vars, null);
        open.Should().Throw<BootException>().WithMessage($"*vars.fd has {length} bytes*");
    }

    [Fact]
    public void Load_OfOneImageWithItsVariablesInFront_TakesThemApart()
    {
        byte[] image = new byte[0x2_0000 + 0x1_0000];
        new Guid("fff12b8d-7696-4c8b-a985-2747075b4f50").TryWriteBytes(image.AsSpan(16));
        BitConverter.TryWriteBytes(image.AsSpan(32), 0x2_0000UL);
        "_FVH"u8.CopyTo(image.AsSpan(40));
        image[0x2_0000] = 0x77;
        string path = Path.Combine(_directory, "OVMF.fd");
        File.WriteAllBytes(path, image);
        FirmwareImage loaded = FirmwareImage.Load(path);
        loaded.IsUefi.Should().BeTrue();
        loaded.Variables.Should().HaveCount(0x2_0000);
        loaded.Code.Should().HaveCount(0x1_0000);
        loaded.Code[0].Should().Be(0x77);
    }

    [Fact]
    public void Load_OfCodeWithATemplateBesideIt_FindsIt()
    {
        byte[] code = new byte[0x1_0000];
        "_FVH"u8.CopyTo(code.AsSpan(40));
        File.WriteAllBytes(Path.Combine(_directory, "MY_CODE.fd"), code);
        File.WriteAllBytes(Path.Combine(_directory, "MY_VARS.fd"), Template());
        FirmwareImage loaded = FirmwareImage.Load(Path.Combine(_directory, "MY_CODE.fd"));
        loaded.IsUefi.Should().BeTrue();
        loaded.Variables.Should().Equal(Template());
    }

    [Fact]
    public void Load_OfABios_HasNoVariables()
    {
        string path = Path.Combine(_directory, "bios.bin");
        File.WriteAllBytes(path, new byte[0x2_0000]);
        FirmwareImage.Load(path).IsUefi.Should().BeFalse();
    }

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    private static byte[] Template()
    {
        byte[] template = new byte[16384];
        new Random(4).NextBytes(template);
        return template;
    }
}
