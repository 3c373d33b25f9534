// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Net;
using FluentAssertions;
using Vmm.Backends.Net;
using Xunit;

namespace Vmm.Backends.Tests.Net;

/// <summary>What another VM may have left in the switch's directory.</summary>
public sealed class VmSwitchTests : IDisposable
{
    private const ulong Mac = 0x525400000001;

    private readonly string _directory = Directory.CreateTempSubdirectory("vmm-switch-").FullName;
    private readonly VmSwitch _switch;

    public VmSwitchTests() => _switch = new VmSwitch(_directory, Mac, TimeProvider.System, (_, _, _, _) => { });

    private static NetAddress Network => Address("10.0.2.0");

    public void Dispose()
    {
        _switch.Dispose();
        Directory.Delete(_directory, recursive: true);
    }

    [Fact]
    public void Claim_NameThatIsThere_Resolves()
    {
        _switch.Claim(Network, 15, "Web1").Should().Be(Address("10.0.2.15"));

        _switch.TryResolve("web1", out NetAddress address).Should().BeTrue();
        address.Should().Be(Address("10.0.2.15"));
    }

    // A sparse file of 8 GiB and a directory: the first took all memory (or more than a string holds), the second
    // ended the network's thread.
    [Fact]
    public void Resolve_HugeFileAndDirectory_ArePassedOver()
    {
        using (FileStream huge = File.Create(Path.Combine(_directory, "ip-10.0.2.4")))
        {
            huge.SetLength(8L << 30);
        }

        Directory.CreateDirectory(Path.Combine(_directory, "ip-10.0.2.5"));
        long before = GC.GetAllocatedBytesForCurrentThread();

        _switch.TryResolve("web1", out _).Should().BeFalse();

        (GC.GetAllocatedBytesForCurrentThread() - before).Should().BeLessThan(1 << 20);
    }

    [Fact]
    public void Claim_LeaseUnderNoAddress_TakesAnother()
    {
        File.WriteAllText(Path.Combine(_directory, "ip-nonsense"), "525400000001 web1\n");

        _switch.Claim(Network, 15, "web1").Should().Be(Address("10.0.2.15"));
    }

    [Fact]
    public void Claim_DirectoryInTheWay_TakesTheNext()
    {
        Directory.CreateDirectory(Path.Combine(_directory, "ip-10.0.2.15"));

        _switch.Claim(Network, 15, "web1").Should().Be(Address("10.0.2.16"));
    }

    private static NetAddress Address(string text) => NetAddress.From(IPAddress.Parse(text));
}
