// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.IO;
using System.Text;
using FluentAssertions;
using Vmm.Core;
using Vmm.Machine.Boot;
using Vmm.Memory;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Machine.Tests.Boot;

public sealed class DirectBootTests : IDisposable
{
    private readonly string _directory = Directory.CreateTempSubdirectory("vmm-boot-").FullName;

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    [Fact]
    public void BzImage_64Bit_EntersLongModeAtPreferredAddress()
    {
        using var box = new Box(64);
        string kernel = Save("bzImage", BzImage(0x1000000, 0x200000, xloadflags: 1));
        string initrd = Save("initrd", new byte[5000]);
        DirectBoot.Load(new DirectBootRequest(kernel, initrd, "console=ttyS0"), box.Memory, box.Layout, 0xE0000, box.Cpu)
            .Should().Be("bzImage");
        box.Cpu.Rip.Should().Be(0x1000200);
        box.Cpu.Cr0.Should().Be(0x80000011);
        ulong zeroPage = box.Cpu.Gpr[6];
        box.Read64(zeroPage + 0x70).Should().Be(0xE0000);
        box.ReadText(box.Read32(zeroPage + 0x228)).Should().Be("console=ttyS0");
        ulong initrdAt = box.Read32(zeroPage + 0x218);
        initrdAt.Should().Be((64UL << 20) - 8192);
        box.Read32(zeroPage + 0x21C).Should().Be(5000);
        box.Byte(zeroPage + 0x1E8).Should().BeGreaterThan((byte)3);
        box.Byte(0x1000000).Should().Be(0xCC, "the protected-mode part starts there");
    }

    [Fact]
    public void BzImage_32BitOnly_EntersProtectedMode()
    {
        using var box = new Box(64);
        string kernel = Save("bzImage", BzImage(0x1000000, 0x200000, xloadflags: 0));
        DirectBoot.Load(new DirectBootRequest(kernel, null, string.Empty), box.Memory, box.Layout, 0, box.Cpu);
        box.Cpu.Rip.Should().Be(0x1000000);
        box.Cpu.Cr0.Should().Be(0x11);
    }

    [Fact]
    public void BzImage_LittleMemory_RelocatesToOneMegabyte()
    {
        using var box = new Box(16);
        string kernel = Save("bzImage", BzImage(0x1000000, 0x200000, xloadflags: 1));
        DirectBoot.Load(new DirectBootRequest(kernel, null, string.Empty), box.Memory, box.Layout, 0, box.Cpu);
        box.Cpu.Rip.Should().Be(0x100200);
    }

    [Fact]
    public void BzImage_TooLarge_SaysHowMuchIsMissing()
    {
        using var box = new Box(2);
        string kernel = Save("bzImage", BzImage(0x1000000, 0x2000000, xloadflags: 1));
        Boot(box, kernel).Should().Throw<BootException>().WithMessage("*needs 33 MiB*memory:*");
    }

    [Fact]
    public void Initrd_LargerThanMemory_IsRefused()
    {
        using var box = new Box(32);
        string kernel = Save("bzImage", BzImage(0x1000000, 0x200000, xloadflags: 1));
        string initrd = Save("initrd", new byte[40 << 20]);
        Action act = () => DirectBoot.Load(new DirectBootRequest(kernel, initrd, string.Empty), box.Memory, box.Layout, 0, box.Cpu);
        act.Should().Throw<BootException>().WithMessage("initrd*40 MiB do not fit*");
    }

    [Fact]
    public void CommandLine_TooLong_IsRefused()
    {
        using var box = new Box(64);
        string kernel = Save("bzImage", BzImage(0x1000000, 0x200000, xloadflags: 1));
        Action act = () => DirectBoot.Load(
            new DirectBootRequest(kernel, null, new string('x', 3000)), box.Memory, box.Layout, 0, box.Cpu);
        act.Should().Throw<BootException>().WithMessage("cmdline: has 3000 bytes*2047*");
    }

    [Theory]
    [InlineData("missing")]
    [InlineData("directory")]
    public void Kernel_NotAFile_IsMissingInput(string kind)
    {
        using var box = new Box(64);
        string path = kind == "missing" ? Path.Combine(_directory, "none") : _directory;
        Boot(box, path).Should().Throw<BootException>().Which.IsMissingInput.Should().BeTrue();
    }

    [Fact]
    public void Kernel_Text_IsRefusedByKind()
    {
        using var box = new Box(64);
        Boot(box, Save("text", Encoding.ASCII.GetBytes(new string('a', 9000)))).Should().Throw<BootException>()
            .WithMessage("*is neither a Linux bzImage*");
    }

    [Fact]
    public void Pvh_Elf64_EntersAtNote()
    {
        using var box = new Box(64);
        string kernel = Save("vmlinux", PvhElf(0x1000000));
        DirectBoot.Load(new DirectBootRequest(kernel, null, "a b"), box.Memory, box.Layout, 0xE0000, box.Cpu).Should().Be("PVH");
        box.Cpu.Rip.Should().Be(0x1000040);
        ulong info = box.Cpu.Gpr[3];
        box.Read32(info).Should().Be(0x336EC578);
        box.ReadText(box.Read64(info + 24)).Should().Be("a b");
        box.Read64(info + 32).Should().Be(0xE0000);
        box.Byte(0x1000000).Should().Be(0xAB);
        box.Byte(0x1000000 + 4096).Should().Be(0, "bss is cleared");
    }

    [Fact]
    public void Multiboot_WithAddresses_LoadsBelowHeader()
    {
        using var box = new Box(64);
        var file = new byte[8192];
        const int HeaderAt = 64;
        uint flags = 1 << 16;
        uint[] header = [0x1BADB002, flags, unchecked(0u - 0x1BADB002 - flags), 0x100040, 0x100000, 0x102000, 0x104000, 0x100080];
        for (int i = 0; i < header.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(file.AsSpan(HeaderAt + (i * 4)), header[i]);
        }

        file[0] = 0x77;
        string module = Save("module", [1, 2, 3]);
        string kernel = Save("multiboot", file);
        DirectBoot.Load(new DirectBootRequest(kernel, module, "x"), box.Memory, box.Layout, 0, box.Cpu).Should().Be("multiboot");
        box.Cpu.Rip.Should().Be(0x100080);
        box.Cpu.Gpr[0].Should().Be(0x2BADB002);
        box.Byte(0x100000).Should().Be(0x77);
        ulong info = box.Cpu.Gpr[3];
        (box.Read32(info) & (1 << 3)).Should().NotBe(0u);
        uint modules = box.Read32(info + 24);
        box.Byte(box.Read32(modules)).Should().Be(1);
        (box.Read32(modules + 4) - box.Read32(modules)).Should().Be(3);
    }

    [Fact]
    public void AnyMutation_EndsInBootExceptionOrSuccess()
    {
        byte[][] seeds = [BzImage(0x1000000, 0x200000, 1), PvhElf(0x1000000)];
        var random = new Random(7);
        using var box = new Box(64);
        for (int i = 0; i < 600; i++)
        {
            byte[] bad = (byte[])seeds[i % 2].Clone();
            for (int k = 0; k < 4; k++)
            {
                bad[random.Next(0x300)] = (byte)random.Next(256);
            }

            Array.Resize(ref bad, random.Next(1, bad.Length + 1));
            string path = Save("mutant", bad);
            try
            {
                DirectBoot.Load(new DirectBootRequest(path, null, "x"), box.Memory, box.Layout, 0, box.Cpu);
            }
            catch (BootException)
            {
            }
        }
    }

    private static byte[] BzImage(ulong preferred, uint initBytes, ushort xloadflags)
    {
        var image = new byte[512 * 5 + 8192];
        image[0x1F1] = 4;
        image[0x1FE] = 0x55;
        image[0x1FF] = 0xAA;
        image[0x201] = 0x6A;
        "HdrS"u8.CopyTo(image.AsSpan(0x202));
        BinaryPrimitives.WriteUInt16LittleEndian(image.AsSpan(0x206), 0x20F);
        image[0x211] = 1;
        BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(0x22C), 0x7FFFFFFF);
        image[0x234] = 1;
        BinaryPrimitives.WriteUInt16LittleEndian(image.AsSpan(0x236), xloadflags);
        BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(0x238), 2047);
        BinaryPrimitives.WriteUInt64LittleEndian(image.AsSpan(0x258), preferred);
        BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(0x260), initBytes);
        image.AsSpan(512 * 5).Fill(0xCC);
        return image;
    }

    private static byte[] PvhElf(ulong address)
    {
        var elf = new byte[0x2000];
        new byte[] { 0x7F, (byte)'E', (byte)'L', (byte)'F', 2, 1, 1 }.CopyTo(elf, 0);
        BinaryPrimitives.WriteUInt16LittleEndian(elf.AsSpan(16), 2);
        BinaryPrimitives.WriteUInt16LittleEndian(elf.AsSpan(18), 62);
        BinaryPrimitives.WriteUInt64LittleEndian(elf.AsSpan(32), 64);
        BinaryPrimitives.WriteUInt16LittleEndian(elf.AsSpan(54), 56);
        BinaryPrimitives.WriteUInt16LittleEndian(elf.AsSpan(56), 2);
        Segment(elf.AsSpan(64), ElfFile.Load, 0x1000, address, 4096, 8192);
        Segment(elf.AsSpan(64 + 56), ElfFile.Note, 0x200, 0, 20, 20);
        BinaryPrimitives.WriteUInt32LittleEndian(elf.AsSpan(0x200), 4);
        BinaryPrimitives.WriteUInt32LittleEndian(elf.AsSpan(0x204), 4);
        BinaryPrimitives.WriteUInt32LittleEndian(elf.AsSpan(0x208), 18);
        "Xen\0"u8.CopyTo(elf.AsSpan(0x20C));
        BinaryPrimitives.WriteUInt32LittleEndian(elf.AsSpan(0x210), (uint)address + 0x40);
        elf.AsSpan(0x1000).Fill(0xAB);
        return elf;

        static void Segment(Span<byte> at, uint type, ulong offset, ulong physical, ulong file, ulong memory)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(at, type);
            BinaryPrimitives.WriteUInt64LittleEndian(at[8..], offset);
            BinaryPrimitives.WriteUInt64LittleEndian(at[24..], physical);
            BinaryPrimitives.WriteUInt64LittleEndian(at[32..], file);
            BinaryPrimitives.WriteUInt64LittleEndian(at[40..], memory);
        }
    }

    private static Action Boot(Box box, string kernel) => () =>
        DirectBoot.Load(new DirectBootRequest(kernel, null, string.Empty), box.Memory, box.Layout, 0, box.Cpu);

    private string Save(string name, byte[] bytes)
    {
        string path = Path.Combine(_directory, name);
        File.WriteAllBytes(path, bytes);
        return path;
    }

    private sealed class Box : IDisposable
    {
        private readonly RamBlock _ram;

        public Box(int mib)
        {
            ulong bytes = (ulong)mib << 20;
            _ram = new RamBlock("ram", new HeapBuffer((int)bytes), bytes);
            Memory.Map(0, _ram, 0, bytes);
            Layout = new MemoryLayout(bytes);
            Cpu.Reset(false, 0);
        }

        public GuestMemory Memory { get; } = new();

        public MemoryLayout Layout { get; }

        public CpuState Cpu { get; } = new();

        public byte Byte(ulong address)
        {
            var value = new byte[1];
            Memory.TryRead(address, value).Should().BeTrue();
            return value[0];
        }

        public uint Read32(ulong address) => (uint)Read64(address);

        public ulong Read64(ulong address)
        {
            var value = new byte[8];
            Memory.TryRead(address, value).Should().BeTrue();
            return BinaryPrimitives.ReadUInt64LittleEndian(value);
        }

        public string ReadText(ulong address)
        {
            var text = new StringBuilder();
            for (byte b = Byte(address); b != 0; b = Byte(++address))
            {
                text.Append((char)b);
            }

            return text.ToString();
        }

        public void Dispose() => _ram.Dispose();
    }
}
