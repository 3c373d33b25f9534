// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using System.Text;
using FluentAssertions;
using Vmm.Config;
using Vmm.Fleet.Import;
using Xunit;

namespace Vmm.Fleet.Tests;

/// <summary>Definitions of other programs: what they mean here, and that nothing is lost in silence.</summary>
public sealed class ImporterTests
{
    private const string VmBhyve = """
        # a template
        loader="uefi"
        cpu=2
        memory=1G
        network0_type="virtio-net"
        network0_switch="public"
        network0_mac="58:9c:fc:00:00:01"
        disk0_type="ahci-hd"
        disk0_name="disk0.img"
        disk0_size="20G"
        graphics="yes"
        graphics_port="5999"
        passthru0="4/0/0"
        """;

    private const string VmConf = """
        sets="/var/www/htdocs/pub/OpenBSD/snapshots/amd64/"
        switch "uplink" { interface bridge0 }
        vm "openbsd.vm" {
            memory 2G
            disk "/home/vm.img" format qcow2
            cdrom $sets
            interface tap3 { lladdr fe:e1:ba:d0:eb:aa switch "uplink" }
            disable
        }
        vm "other" { boot "/bsd.rd" interfaces 2 }
        """;

    private const string Vmadm = """
        {"brand": "kvm", "alias": "web 1", "vcpus": 2, "ram": 1024, "autoboot": true, "indestructible_zoneroot": true,
         "disks": [{"path": "/dev/zvol/rdsk/zones/x", "model": "virtio"}, {"path": "/cd.iso", "media": "cdrom"}],
         "nics": [{"nic_tag": "admin", "mac": "b2:1e:ba:a5:6e:71", "model": "e1000"}]}
        """;

    private const string Libvirt = """
        <domain type='kvm'><name>demo</name><memory unit='MiB'>512</memory><vcpu>4</vcpu>
          <os><type>hvm</type><boot dev='cdrom'/><boot dev='hd'/></os>
          <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a.qcow2'/><target dev='sda' bus='sata'/></disk>
          <disk type='file' device='cdrom'><source file='/a.iso'/><target dev='hda' bus='ide'/></disk>
          <interface type='network'><mac address='52:54:00:00:00:01'/><model type='e1000'/></interface>
          <graphics type='vnc' port='5905'/><video><model type='vmvga'/></video><hostdev/></devices></domain>
        """;

    private const string Qemu = """
        qemu-system-x86_64 -enable-kvm -m 2G -smp 4,sockets=1 -kernel /boot/vmlinuz -append "console=ttyS0 root=/dev/vda" \
            -drive file=disk.qcow2,if=virtio,format=qcow2 -cdrom 'my cd.iso' -netdev user,id=n0 -device virtio-net-pci,netdev=n0 \
            -device virtio-rng-pci -vnc :3 -rtc base=localtime -device isa-debug-exit,iobase=0xf4 -usb -soundhw hda
        """;

    [Fact]
    public void VmBhyve_IsCarriedOver_AndTheRestIsListed()
    {
        (MachineSpec spec, IReadOnlyList<string> lost) = One("vm-bhyve", VmBhyve);

        spec.Boot.Firmware.Should().Be("uefi");
        spec.Cpus.Count.Should().Be(2);
        spec.MemoryBytes.Should().Be(1L << 30);
        spec.Disks.Single().Should().Match<DiskSpec>(d => d.Bus == DiskBus.Ahci && d.SizeBytes == 20L << 30 && d.Path == "/vm/disk0.img");
        spec.Nics.Single().Mac.Should().Be(0x589CFC000001);
        spec.Display.VncAddress.Should().Be("127.0.0.1:5999");
        lost.Should().Contain("passthru0: not known here").And.Contain(line => line.StartsWith("network0_switch"));
    }

    [Fact]
    public void VmConf_WithMacrosAndTwoVms_IsCarriedOver()
    {
        IReadOnlyList<ImportedVm> vms = Importer.Read("vm.conf", VmConf, "vm");
        MachineSpec first = Parse(vms[0]);

        vms.Select(vm => vm.Name).Should().Equal("openbsd.vm", "other");
        first.MemoryBytes.Should().Be(2L << 30);
        first.Autostart.Should().BeFalse();
        first.Disks[0].Format.Should().Be(DiskFormat.Qcow2);
        first.Disks[1].Path.Should().Be("/var/www/htdocs/pub/OpenBSD/snapshots/amd64/");
        first.Nics.Single().Should().Match<NicSpec>(n => n.Backend == NicBackend.Tap && n.Target == "tap3" && n.Mac == 0xFEE1BAD0EBAA);
        Parse(vms[1]).Boot.Kernel.Should().Be("/bsd.rd");
        Parse(vms[1]).Nics.Should().HaveCount(2);
        vms[0].Lost.Should().Contain("switch: has no place in a VM's definition");
    }

    [Fact]
    public void Vmadm_IsCarriedOver()
    {
        (MachineSpec spec, IReadOnlyList<string> lost) = One("vmadm", Vmadm);

        spec.Name.Should().Be("web-1");
        spec.MemoryBytes.Should().Be(1L << 30);
        spec.Disks.Select(d => d.Bus).Should().Equal(DiskBus.Virtio, DiskBus.Cdrom);
        spec.Nics.Single().Model.Should().Be(NicModel.E1000);
        lost.Should().Contain("indestructible_zoneroot: not known here");
    }

    [Fact]
    public void Libvirt_IsCarriedOver()
    {
        (MachineSpec spec, IReadOnlyList<string> lost) = One("libvirt", Libvirt);

        spec.MemoryBytes.Should().Be(512L << 20);
        spec.Boot.Order.Should().Equal(BootDevice.Cdrom, BootDevice.Disk);
        spec.Disks.Select(d => d.Bus).Should().Equal(DiskBus.Ahci, DiskBus.Cdrom);
        spec.Display.Should().Match<DisplaySpec>(d => d.Vga == VgaModel.Vmware && d.VncAddress == "127.0.0.1:5905");
        lost.Should().Contain("<hostdev>: not known here");
    }

    [Fact]
    public void Qemu_CommandLine_IsCarriedOver()
    {
        (MachineSpec spec, IReadOnlyList<string> lost) = One("qemu", Qemu);

        spec.Accel.Should().Equal("kvm", "soft");
        spec.MemoryBytes.Should().Be(2L << 30);
        spec.Cpus.Count.Should().Be(4);
        spec.Boot.Cmdline.Should().Be("console=ttyS0 root=/dev/vda");
        spec.Disks.Select(d => d.Path).Should().Equal("/vm/disk.qcow2", "/vm/my cd.iso");
        spec.Nics.Should().ContainSingle();
        spec.Rng.Should().BeTrue();
        spec.Display.VncAddress.Should().Be("127.0.0.1:5903");
        spec.Clock.LocalTime.Should().BeTrue();
        spec.DebugExit.Should().Be(0xF4);
        lost.Should().Contain("-soundhw hda: not known here");
    }

    [Fact]
    public void Qemu_MultibootModules_AreCarriedOverWithTheirArguments()
    {
        (MachineSpec spec, _) = One("qemu", "qemu -kernel gnumach -initrd 'fs.static --readonly $(a),exec.static' -append root=hd0");

        spec.Boot.Cmdline.Should().Be("root=hd0");
        spec.Boot.Initrd.Should().BeNull();
        spec.Boot.Modules.Should().Equal(
            new BootModuleSpec { Path = "/vm/fs.static", Cmdline = "fs.static --readonly $(a)" },
            new BootModuleSpec { Path = "/vm/exec.static", Cmdline = "exec.static" });
    }

    [Theory]
    [InlineData("qemu -m ''", "-m is followed by no size")]
    [InlineData("qemu -m ,slots=2", "-m is followed by no size")]
    [InlineData("qemu -kernel", "-kernel is followed by nothing")]
    public void Qemu_OptionWithoutItsValue_IsSaid(string text, string message) =>
        ((Action)(() => One("qemu", text))).Should().Throw<FormatException>().WithMessage(message);

    [Fact]
    public void Qemu_OptionsThatHaveNoPlace_AreListedWithTheirValues()
    {
        (MachineSpec spec, IReadOnlyList<string> lost) = One(
            "qemu", "qemu -usb -cpu host -M q35 -device usb-tablet -net socket,listen=:1 -netdev tap,ifname=tap3 -nographic");

        lost.Should().Equal(
            "-usb: not carried over", "-cpu host: not carried over", "-M q35: not carried over", "-device usb-tablet: not carried over",
            "-net socket,listen=:1: not known here");
        spec.Nics.Single().Target.Should().Be("tap3");
    }

    [Fact]
    public void Garbage_IsAFormatErrorAndNothingElse()
    {
        string[] texts = [VmBhyve, VmConf, Vmadm, Libvirt, Qemu];
        var random = new Random(5);
        for (int round = 0; round < 5000; round++)
        {
            int which = random.Next(texts.Length);
            var text = new StringBuilder(texts[which]);
            for (int i = random.Next(1, 10); i > 0; i--)
            {
                int at = random.Next(text.Length);
                if (random.Next(2) == 0)
                {
                    text[at] = (char)random.Next(1, 127);
                }
                else
                {
                    text.Remove(at, Math.Min(random.Next(1, 12), text.Length - at));
                }
            }

            try
            {
                foreach (ImportedVm vm in Importer.Read(Importer.Formats[which], text.ToString(), "x"))
                {
                    Parse(vm);
                }
            }
            catch (Exception expected) when (expected is FormatException or ConfigException)
            {
                expected.Message.Should().NotBeEmpty();
            }
        }
    }

    private static (MachineSpec Spec, IReadOnlyList<string> Lost) One(string format, string text)
    {
        ImportedVm vm = Importer.Read(format, text, "given").Single();
        return (Parse(vm), vm.Lost);
    }

    private static MachineSpec Parse(ImportedVm vm) => ConfigFiles.Parse(vm.Yaml, "imported", "/vm").Machines.Single();
}
