// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using FluentAssertions;
using Vmm.Config;
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
        string initrd = Save("initrd", [1, 2, 3]);
        DirectBoot.Load(new DirectBootRequest(Save("multiboot", MultibootImage()), initrd, "x"), box.Memory, box.Layout, 0, box.Cpu)
            .Should().Be("multiboot");
        box.Cpu.Rip.Should().Be(0x100080);
        box.Cpu.Gpr[0].Should().Be(0x2BADB002);
        box.Byte(0x100000).Should().Be(0x77);
        box.Byte(0x103FFF).Should().Be(0, "bss is cleared");
        ulong info = box.Cpu.Gpr[3];
        box.ReadText(box.Read32(info + 64)).Should().Be("vmctl");
        Modules(box).Should().Equal((0x104000u, 3u, "x"));
    }

    /// <summary>Multiboot §3.3: one entry a module, in the order of the definition, each on a page (header flag 0).</summary>
    [Fact]
    public void Multiboot_Modules_FollowTheKernelPageByPage()
    {
        using var box = new Box(64);
        var modules = new BootModuleSpec[BootSpec.MaxModules];
        for (int i = 0; i < modules.Length; i++)
        {
            string path = Save("module" + i, Enumerable.Repeat((byte)(i + 1), 4096 + i).ToArray());
            modules[i] = new BootModuleSpec { Path = path, Cmdline = i % 2 == 0 ? string.Empty : $"server{i} ${{root}}" };
        }

        Boot(box, Save("multiboot", MultibootImage()), modules)();

        Modules(box).Should().Equal(modules.Select((module, i) =>
            (i == 0 ? 0x104000u : 0x105000u + (((uint)i - 1) * 0x2000), 4096u + (uint)i, module.Cmdline)));
        foreach ((uint start, uint length, _) in Modules(box))
        {
            byte first = box.Byte(start);
            first.Should().NotBe(0);
            box.Byte(start + length - 1).Should().Be(first);
        }

        uint map = box.Read32(box.Cpu.Gpr[3] + 48);
        box.Read32(map).Should().Be(20, "the list of modules does not reach into the memory map");
        MultibootLoader.MaxModules.Should().Be(BootSpec.MaxModules);
    }

    [Fact]
    public void Multiboot_KernelBelowOneMegabyte_HasItsModulesAbove()
    {
        using var box = new Box(64);
        string kernel = Save("multiboot", MultibootImage(0x8_0000));

        Boot(box, kernel, new BootModuleSpec { Path = Save("module", [1]) })();

        Modules(box).Should().Equal((0x100000u, 1u, string.Empty));
    }

    [Theory]
    [InlineData(62L << 20, 64, "module *62 MiB do not fit behind the kernel into 64 MiB below 4 GiB*memory:")]
    [InlineData(5L << 30, 64, "module *5120 MiB do not fit*")]
    [InlineData((1L << 32) + 4096, 64, "module *4096 MiB do not fit*")]
    public void Multiboot_ModuleThatDoesNotFit_IsRefusedUnread(long bytes, int mib, string message)
    {
        using var box = new Box(mib);
        string kernel = Save("multiboot", MultibootImage(lengthBytes: 3 << 20));
        string path = Save("module", []);
        using (FileStream sparse = File.OpenWrite(path))
        {
            sparse.SetLength(bytes);
        }

        Boot(box, kernel, new BootModuleSpec { Path = path }).Should().Throw<BootException>().WithMessage(message);
    }

    [Fact]
    public void Multiboot_SecondModuleBehindALargeFirst_IsRefused()
    {
        using var box = new Box(8);
        string large = Save("large", new byte[6 << 20]);
        Boot(box, Save("multiboot", MultibootImage()), new BootModuleSpec { Path = large }, new BootModuleSpec { Path = large })
            .Should().Throw<BootException>().WithMessage("module *6 MiB do not fit behind the kernel*");
    }

    [Fact]
    public void Multiboot_ModulesThatCannotBe_AreRefusedInOneLine()
    {
        using var box = new Box(64);
        string kernel = Save("multiboot", MultibootImage());
        var one = new BootModuleSpec { Path = Save("module", [1]) };
        BootModuleSpec wordy = one with { Cmdline = new string('\u20ac', 2047) };

        Boot(box, kernel, [.. Enumerable.Repeat(one, 17)])
            .Should().Throw<BootException>().WithMessage("modules: there are 17; a kernel can be given 16");
        Boot(box, kernel, [.. Enumerable.Repeat(wordy, 11)])
            .Should().Throw<BootException>().WithMessage("modules: their command lines take more than 64 KiB");
        Boot(box, kernel, one with { Path = kernel + ".none" })
            .Should().Throw<BootException>().WithMessage("module *: no such file").Which.IsMissingInput.Should().BeTrue();
        Boot(box, Save("vmlinux", PvhElf(0x1000000)), one)
            .Should().Throw<BootException>().WithMessage("*is not a multiboot kernel; it takes an initrd: and no modules:");
        Boot(box, Save("bzImage", BzImage(0x1000000, 0x200000, xloadflags: 1)), one)
            .Should().Throw<BootException>().WithMessage("*is not a multiboot kernel*");
    }

    [Theory]
    [InlineData(0x7000)]
    [InlineData(0x1_F000)]
    [InlineData(0x3_F000)]
    [InlineData(0xF_F000)]
    public void Multiboot_KernelWhereItsParametersGo_IsRefused(uint address)
    {
        using var box = new Box(64);
        Boot(box, Save("multiboot", MultibootImage(address))).Should().Throw<BootException>().WithMessage("*lies where its parameters go*");
    }

    [Fact]
    public void Kernel_Compressed_SaysWhatToDo()
    {
        using var box = new Box(64);
        Boot(box, Save("gnumach.gz", [0x1F, 0x8B, 8, 0])).Should().Throw<BootException>().WithMessage("*decompress it with gunzip");
    }

    [Fact]
    public void AnyMutation_EndsInBootExceptionOrSuccess()
    {
        byte[][] seeds = [BzImage(0x1000000, 0x200000, 1), PvhElf(0x1000000), MultibootImage()];
        string initrd = Save("initrd", [1]);
        var random = new Random(7);
        using var box = new Box(64);
        for (int i = 0; i < 900; i++)
        {
            byte[] bad = (byte[])seeds[i % 3].Clone();
            for (int k = 0; k < 4; k++)
            {
                bad[random.Next(0x300)] = (byte)random.Next(256);
            }

            Array.Resize(ref bad, random.Next(1, bad.Length + 1));
            string path = Save("mutant", bad);
            try
            {
                DirectBoot.Load(new DirectBootRequest(path, initrd, "x"), box.Memory, box.Layout, 0, box.Cpu);
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

    // Header at 64, code from the start of the file on, as much bss as file behind it.
    private static byte[] MultibootImage(uint address = 0x10_0000, uint lengthBytes = 8192)
    {
        var image = new byte[lengthBytes];
        const uint Flags = (1 << 16) | 3;
        uint[] header =
        [
            0x1BADB002, Flags, unchecked(0u - 0x1BADB002 - Flags),
            address + 64, address, address + lengthBytes, address + (2 * lengthBytes), address + 0x80,
        ];
        for (int i = 0; i < header.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(64 + (i * 4)), header[i]);
        }

        image[0] = 0x77;
        return image;
    }

    // The list that the information structure points at.
    private static List<(uint Start, uint LengthBytes, string CommandLine)> Modules(Box box)
    {
        ulong info = box.Cpu.Gpr[3];
        var modules = new List<(uint, uint, string)>();
        if ((box.Read32(info) & (1 << 3)) != 0)
        {
            uint at = box.Read32(info + 24);
            for (uint left = box.Read32(info + 20); left > 0; left--, at += 16)
            {
                uint start = box.Read32(at);
                modules.Add((start, box.Read32(at + 4) - start, box.ReadText(box.Read32(at + 8))));
                box.Read32(at + 12).Should().Be(0, "reserved");
            }
        }

        return modules;
    }

    private static Action Boot(Box box, string kernel, params BootModuleSpec[] modules) => () =>
        DirectBoot.Load(
            new DirectBootRequest(kernel, null, string.Empty) { Modules = modules }, box.Memory, box.Layout, 0, box.Cpu);

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
