// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Text;
using FluentAssertions;
using Xunit;

namespace Vmm.Config.Tests;

public sealed class MachineParserTests
{
    private const string Plan = """
        name: web1
        cpus: 2
        memory: 512M
        accel: auto
        irqchip: auto
        boot: {kernel: vmlinuz, initrd: initrd.gz, cmdline: "console=ttyS0"}
        disks: [{path: web1.qcow2, bus: virtio, size: 10G, backing: base.qcow2, readonly: false}]
        nics:  [{backend: user, model: virtio, mac: auto, forward: ["127.0.0.1:2222:22"]}]
        serial: [stdio]
        display: {vga: std, vnc: "127.0.0.1:5901"}
        rng: true
        balloon: true
        debug-exit: 0xf4
        restart: on-failure
        after: [db1]
        """;

    [Fact]
    public void Plan_Example_MeansWhatThePlanSays()
    {
        MachineSpec spec = One(Plan);

        spec.Name.Should().Be("web1");
        spec.Cpus.Count.Should().Be(2);
        spec.MemoryBytes.Should().Be(512L << 20);
        spec.Accel.Should().Equal("auto");
        spec.Boot.Kernel.Should().Be("/vm/vmlinuz");
        spec.Boot.Initrd.Should().Be("/vm/initrd.gz");
        spec.Boot.Cmdline.Should().Be("console=ttyS0");
        spec.Boot.Firmware.Should().BeNull();
        spec.Disks.Should().ContainSingle().Which.Should().BeEquivalentTo(new DiskSpec
        {
            Path = "/vm/web1.qcow2",
            SizeBytes = 10L << 30,
            Backing = "/vm/base.qcow2",
        });
        spec.Nics.Should().ContainSingle().Which.Forward.Should().Equal(new PortForward(false, IPAddress.Loopback, 2222, 22));
        spec.Serial.Should().Equal(new CharSpec(CharKind.Stdio));
        spec.Display.Vga.Should().Be(VgaModel.Std);
        spec.Display.VncAddress.Should().Be("127.0.0.1:5901");
        spec.Rng.Should().BeTrue();
        spec.Balloon.Should().BeTrue();
        spec.DebugExit.Should().Be(0xF4);
        spec.Restart.Policy.Should().Be(RestartPolicy.OnFailure);
        spec.After.Should().Equal("db1");
    }

    [Fact]
    public void Minimal_Definition_BootsFirmwareWithDefaults()
    {
        MachineSpec spec = One("name: a");

        spec.Boot.Firmware.Should().Be("seabios");
        spec.MemoryBytes.Should().Be(512L << 20);
        spec.Cpus.Count.Should().Be(1);
        spec.Display.Vga.Should().Be(VgaModel.Std);
        spec.Serial.Should().Equal(new CharSpec(CharKind.Stdio));
        spec.Input.Should().Equal(InputDevice.Ps2);
        spec.DebugExit.Should().BeNull();
    }

    [Theory]
    [InlineData("memry: 1G", 2, 1, "unknown key \"memry\"; did you mean \"memory\"?")]
    [InlineData("debug_exit: 0xf4", 2, 1, "unknown key \"debug_exit\"; did you mean \"debug-exit\"?")]
    [InlineData("zzz: 1", 2, 1, "unknown key \"zzz\"")]
    [InlineData("boot: {kernal: x}", 2, 8, "unknown key \"kernal\"; did you mean \"kernel\"?")]
    [InlineData("disks: [{path: a, bos: ide}]", 2, 19, "unknown key \"bos\"; did you mean \"bus\"?")]
    [InlineData("name: b", 2, 1, "key \"name\" is given twice; first on line 1")]
    [InlineData("cpus: 0", 2, 7, "\"cpus\" is 0; it must be 1 to 64")]
    [InlineData("cpus: 5000", 2, 7, "\"cpus\" is 5000; it must be 1 to 64")]
    [InlineData("cpus: two", 2, 7, "\"cpus\" takes a number from 1 to 64, not \"two\"")]
    [InlineData("cpus: {count: 3, sockets: 2}", 2, 7, "3 cpus cannot be spread evenly over 2 sockets with 1 threads a core")]
    [InlineData("cpus: {count: 2, pin: [1]}", 2, 24, "\"pin\" names 1 processors for 2 cpus; give one for each")]
    [InlineData("memory: 0", 2, 9, "\"memory\" is 0; it must be 1M to 4T")]
    [InlineData("memory: 3", 2, 9, "\"memory\" is 3; it must be 1M to 4T")]
    [InlineData("memory: 1P", 2, 9, "\"memory\" is 1P; it must be 1M to 4T")]
    [InlineData("memory: 1048577", 2, 9, "\"memory\" must be a multiple of 4K")]
    [InlineData("memory: lots", 2, 9, "\"memory\" takes a size such as 512M or 4G, not \"lots\"")]
    [InlineData("memory: -1G", 2, 9, "\"memory\" takes a size such as 512M or 4G, not \"-1G\"")]
    [InlineData("accel: kmv", 2, 8, "\"accel\" is \"kmv\"; it must be one of auto, kvm, soft; did you mean \"kvm\"?")]
    [InlineData("accel: [kvm, kvm]", 2, 14, "\"kvm\" is named twice")]
    [InlineData("boot: {kernel: a, firmware: uefi}", 2, 7, "\"boot\" has both \"kernel\" and \"firmware\"; keep one")]
    [InlineData("boot: {initrd: a}", 2, 16, "\"initrd\" needs a \"kernel\"")]
    [InlineData("boot: {modules: [a]}", 2, 17, "\"modules\" needs a \"kernel\"")]
    [InlineData("boot: {kernel: a, initrd: b, modules: c}", 2, 27, "\"boot\" has both \"initrd\" and \"modules\"; put the initrd into \"modules\"")]
    [InlineData("boot: {kernel: a, modules: [{cmdline: b}]}", 2, 29, "a module of \"boot\" needs a \"path\"")]
    [InlineData("boot: {kernel: a, modules: [{path: b, cmdlin: c}]}", 2, 39, "unknown key \"cmdlin\"; did you mean \"cmdline\"?")]
    [InlineData("boot: {kernel: a, modules: [a,a,a,a,a,a,a,a,a,a,a,a,a,a,a,a,a]}", 2, 28, "\"modules\" has 17 entries; the most is 16")]
    [InlineData("boot: {kernel: a, menu: true}", 2, 25, "\"menu\" is for firmware; it has no effect with \"kernel\"")]
    [InlineData("boot: linux", 2, 7, "\"boot\" takes keys, for example {kernel: vmlinuz} or {firmware: seabios}, not \"linux\"")]
    [InlineData("disks: [{bus: ide}]", 2, 9, "a disk needs a \"path\" (only a cdrom or floppy drive may be empty)")]
    [InlineData("disks: [a, ./a]", 2, 12, "/vm/a is already written by disks[0]; a second writer would destroy it")]
    [InlineData("nics: [{mac: \"01:00:5e:00:00:01\"}]", 2, 14, "\"01:00:5e:00:00:01\" is not the address of one card")]
    [InlineData("nics: [{forward: [22]}]", 2, 19, "\"22\" is no forward; write [udp:][ADDRESS:]HOSTPORT:GUESTPORT, for example \"127.0.0.1:2222:22\"")]
    [InlineData("nics: [usr]", 2, 8, "\"usr\" is no network; it must be user, tap:NAME, socket:PATH or none; did you mean \"user\"?")]
    [InlineData("serial: [stdio, stdio]", 2, 17, "only one serial port can be on stdio")]
    [InlineData("serial: [a, b, c, d, e]", 2, 9, "\"serial\" has 5 entries; the most is 4")]
    [InlineData("display: {vga: none, vnc: \"127.0.0.1:5900\"}", 2, 27, "\"vnc\" needs a display; \"vga\" is none")]
    [InlineData("rng: maybe", 2, 6, "\"rng\" takes true or false, not \"maybe\"")]
    [InlineData("debug-exit: 70000", 2, 13, "\"debug-exit\" is 70000; it must be 1 to 65535")]
    [InlineData("health: {interval: 1s}", 2, 9, "\"health\" takes one of \"tcp\", \"console\" and \"agent: true\"")]
    [InlineData("name2: !!python/object:os.system x", 2, 8, "not YAML")]
    [InlineData("virtio: {transport: mmoi}", 2, 21, "\"transport\" is \"mmoi\"; it must be one of pci, legacy, mmio; did you mean \"mmio\"?")]
    [InlineData("vsock: {cid: 2, path: s}", 2, 14, "\"cid\" is 2; it must be 3 to 4294967294")]
    public void Definition_WithAMistake_SaysWhereAndWhatToDo(string line, int atLine, int atColumn, string message)
    {
        Diagnostic error = Errors("name: a\n" + line)[0];

        error.At.Line.Should().Be(atLine);
        if (message is not "not YAML")
        {
            error.Message.Should().Be(message);
            error.At.Column.Should().Be(atColumn);
            error.ToString().Should().StartWith(string.Create(CultureInfo.InvariantCulture, $"t.yaml:{atLine}:{atColumn}: "));
        }
    }

    [Fact]
    public void BootModules_PathsAloneAndInDetail_KeepTheirOrder()
    {
        MachineSpec spec = One("name: a\nboot: {kernel: k, modules: [ld.so, {path: ../fs, cmdline: \"fs ${root}\"}]}");

        spec.Boot.Modules.Should().Equal(
            new BootModuleSpec { Path = "/vm/ld.so" },
            new BootModuleSpec { Path = "/fs", Cmdline = "fs ${root}" });
    }

    [Fact]
    public void Errors_Several_AreAllReportedInFileOrder()
    {
        IReadOnlyList<Diagnostic> errors = Errors("name: a\ncpus: 0\nmemory: 3\nrgn: true\n");

        errors.Select(e => e.At.Line).Should().Equal(2, 3, 4);
    }

    [Theory]
    [InlineData("name: \"a b\"")]
    [InlineData("name: ../etc")]
    [InlineData("name: -x")]
    [InlineData("name: \"\"")]
    [InlineData("cpus: 1")]
    public void Name_MissingOrUnfit_IsRefused(string text)
    {
        Errors(text).Should().NotBeEmpty();
    }

    [Fact]
    public void Aliases_ThatWouldExpandToBillions_AreRefusedAtOnce()
    {
        var bomb = new StringBuilder("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for (int i = 1; i < 12; i++)
        {
            string refs = string.Join(", ", Enumerable.Repeat($"*a{i - 1}", 10));
            bomb.Append(CultureInfo.InvariantCulture, $"a{i}: &a{i} [{refs}]\n");
        }

        Errors(bomb.ToString())[0].Message.Should().Be("more than 200000 values once aliases are counted in");
    }

    [Fact]
    public void Nesting_TooDeep_IsRefused()
    {
        string deep = "name: " + new string('[', 5000) + new string(']', 5000);

        Errors(deep)[0].Message.Should().Be("nested deeper than 32 levels");
    }

    [Fact]
    public void Alias_InsideItsOwnAnchor_IsRefused()
    {
        Errors("name: a\naccel: &x [*x]")[0].Message.Should().Be("alias *x has no anchor before it");
    }

    [Fact]
    public void MergeKey_GivesDefaultsThatTheVmOverrides()
    {
        FleetSpec fleet = Many("""
            shared: &small {memory: 64M, cpus: 2}
            vms:
              - {<<: *small, name: a}
              - {<<: *small, name: b, cpus: 4}
            """);

        fleet.Machines.Select(m => m.Cpus.Count).Should().Equal(2, 4);
        fleet.Machines.Select(m => m.MemoryBytes).Should().Equal(64L << 20, 64L << 20);
    }

    [Fact]
    public void Fleet_Circle_IsNamed()
    {
        IReadOnlyList<Diagnostic> errors = Errors("""
            vms:
              - {name: a, after: [b]}
              - {name: b, requires: [c]}
              - {name: c, after: [a]}
            """);

        errors.Should().ContainSingle().Which.Message.Should().Be("VMs wait for each other: a -> b -> c -> a");
    }

    [Fact]
    public void Fleet_UnknownName_IsReportedWithTheNearestOne()
    {
        Errors("vms: [{name: db1}, {name: web, after: [bd1]}]").Should().ContainSingle()
            .Which.Message.Should().Be("\"after\" names \"bd1\", which is not defined; did you mean \"db1\"?");
    }

    [Fact]
    public void Fleet_TwoOfOneName_AreRefused()
    {
        Errors("name: a\n---\nname: a\n").Should().ContainSingle()
            .Which.Message.Should().Be("a VM called \"a\" is already defined at t.yaml:1:7");
    }

    [Fact]
    public void Fleet_LongChain_SortsWithoutDeepRecursion()
    {
        var text = new StringBuilder("vms:\n");
        const int Count = 5000;
        for (int i = 0; i < Count; i++)
        {
            text.Append(CultureInfo.InvariantCulture, $"- name: v{i}\n");
            if (i + 1 < Count)
            {
                text.Append(CultureInfo.InvariantCulture, $"  after: v{i + 1}\n");
            }
        }

        IReadOnlyList<MachineSpec> sorted = FleetOrder.Sort(Many(text.ToString()).Machines);

        sorted[0].Name.Should().Be("v4999");
        sorted[^1].Name.Should().Be("v0");
    }

    [Fact]
    public void File_ThatIsADirectoryOrMissing_IsNoInput()
    {
        Action directory = () => ConfigFiles.LoadMachine("/");
        Action missing = () => ConfigFiles.LoadMachine("/nonexistent/x.yaml");

        directory.Should().Throw<ConfigException>().Which.Should().Match<ConfigException>(e => e.Failure == ConfigFailure.NoInput)
            .And.Match<ConfigException>(e => e.Message == "/: is a directory, not a file");
        missing.Should().Throw<ConfigException>().Which.Message.Should().Be("/nonexistent/x.yaml: no such file or directory");
    }

    [Fact]
    public void File_ThatIsEndless_IsCutOff()
    {
        Action zero = () => ConfigFiles.LoadMachine("/dev/zero");

        zero.Should().Throw<ConfigException>().Which.Message.Should().Be("/dev/zero: is larger than 4 MiB");
    }

    [Fact]
    public void File_ThatIsNoText_IsRefused()
    {
        string path = Path.GetTempFileName();
        try
        {
            File.WriteAllBytes(path, [0x6E, 0xFF, 0xFE, 0x00]);
            Action load = () => ConfigFiles.LoadMachine(path);
            load.Should().Throw<ConfigException>().Which.Message.Should().EndWith("is not UTF-8 text");
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public void Parser_OnRandomEdits_OnlyEverThrowsConfigException()
    {
        var random = new Random(20261);
        ReadOnlySpan<char> alphabet = "[]{}:,-&*!|>'\"%@`#?~\n\t  \u0001\uFFFFa0<<";
        for (int round = 0; round < 20_000; round++)
        {
            var text = new StringBuilder(Plan);
            int edits = random.Next(1, 6);
            for (int i = 0; i < edits; i++)
            {
                int at = random.Next(text.Length);
                switch (random.Next(3))
                {
                    case 0:
                        text[at] = alphabet[random.Next(alphabet.Length)];
                        break;
                    case 1:
                        text.Insert(at, alphabet[random.Next(alphabet.Length)]);
                        break;
                    default:
                        text.Remove(at, Math.Min(random.Next(1, 8), text.Length - at));
                        break;
                }
            }

            try
            {
                ConfigFiles.Parse(text.ToString(), "t.yaml", "/vm");
            }
            catch (ConfigException expected)
            {
                expected.Diagnostics.Should().NotBeEmpty();
                expected.Message.Should().NotContain("\n");
            }
        }
    }

    private static MachineSpec One(string text) => Many(text).Machines.Single();

    private static FleetSpec Many(string text) => ConfigFiles.Parse(text, "t.yaml", "/vm");

    private static IReadOnlyList<Diagnostic> Errors(string text)
    {
        Action parse = () => ConfigFiles.Parse(text, "t.yaml", "/vm");
        return parse.Should().Throw<ConfigException>().Which.Diagnostics;
    }
}

public sealed class QuantityTests
{
    [Theory]
    [InlineData("0", 0L)]
    [InlineData("4096", 4096L)]
    [InlineData("512M", 512L << 20)]
    [InlineData("512m", 512L << 20)]
    [InlineData("1.5G", 3L << 29)]
    [InlineData("4.5G", 9L << 29)]
    [InlineData("2GiB", 2L << 30)]
    [InlineData("2 GB", 2L << 30)]
    [InlineData("1T", 1L << 40)]
    [InlineData("64K", 65536L)]
    public void Size_WellFormed_IsRead(string text, long bytes)
    {
        Quantity.TryParseSize(text, out long read).Should().BeTrue();
        read.Should().Be(bytes);
    }

    [Theory]
    [InlineData("")]
    [InlineData("M")]
    [InlineData("-1M")]
    [InlineData("1.0001K")]
    [InlineData("1e3")]
    [InlineData("0x10")]
    [InlineData("9999999T")]
    [InlineData("99999999999999999999999999999999999")]
    [InlineData("1,000")]
    public void Size_IllFormed_IsRefused(string text)
    {
        Quantity.TryParseSize(text, out _).Should().BeFalse();
    }

    [Theory]
    [InlineData("10", 10_000)]
    [InlineData("250ms", 250)]
    [InlineData("1.5s", 1500)]
    [InlineData("5m", 300_000)]
    [InlineData("2h", 7_200_000)]
    public void Duration_WellFormed_IsReadAndWrittenBack(string text, double ms)
    {
        Quantity.TryParseDuration(text, out TimeSpan read).Should().BeTrue();
        read.TotalMilliseconds.Should().Be(ms);
        Quantity.TryParseDuration(Quantity.FormatDuration(read), out TimeSpan again).Should().BeTrue();
        again.Should().Be(read);
    }

    [Theory]
    [InlineData("s")]
    [InlineData("-1s")]
    [InlineData("400d")]
    [InlineData("1 fortnight")]
    public void Duration_IllFormed_IsRefused(string text)
    {
        Quantity.TryParseDuration(text, out _).Should().BeFalse();
    }
}
