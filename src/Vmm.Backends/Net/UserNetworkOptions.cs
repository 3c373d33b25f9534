// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Net;

namespace Vmm.Backends.Net;

/// <summary>A port of the host that leads to the guest.</summary>
/// <param name="IsUdp">UDP; else TCP.</param>
/// <param name="HostAddress">Address to listen on.</param>
/// <param name="HostPort">Port to listen on; 0 lets the system choose.</param>
/// <param name="GuestPort">Port in the guest.</param>
/// <param name="GuestAddress">Address in the guest; null for the one that DHCP gives out.</param>
public sealed record PortForward(
    bool IsUdp, IPAddress HostAddress, ushort HostPort, ushort GuestPort, IPAddress? GuestAddress = null);

/// <summary>How a user network is laid out. The defaults are those that people know from other monitors.</summary>
public sealed record UserNetworkOptions
{
    /// <summary>The VM's name: DHCP host name and DNS name.</summary>
    public string HostName { get; init; } = "";

    /// <summary>The network card's MAC address, six bytes.</summary>
    public required byte[] GuestMac { get; init; }

    /// <summary>First address of the IPv4 network, /24. .2 is the gateway (and the host), .3 the DNS server.</summary>
    public IPAddress Network { get; init; } = IPAddress.Parse("10.0.2.0");

    /// <summary>Last byte of the address that DHCP gives out, unless a switch chooses one.</summary>
    public byte GuestHost { get; init; } = 15;

    /// <summary>IPv6 prefix, /64; null for no IPv6.</summary>
    public IPAddress? Prefix6 { get; init; } = IPAddress.Parse("fd76:6d6d::");

    /// <summary>The guest reaches services on the host's loopback address through the gateway's address.</summary>
    public bool HostLoopback { get; init; } = true;

    /// <summary>No way out but port forwards and other VMs.</summary>
    public bool Isolated { get; init; }

    /// <summary>Ports of the host that lead to the guest.</summary>
    public IReadOnlyList<PortForward> Forwards { get; init; } = [];

    /// <summary>MTU of the link.</summary>
    public int Mtu { get; init; } = 1500;

    /// <summary>How long a TCP acknowledgement waits for an answer that takes it along; at most 500 (RFC 9293 §3.8.6.3).</summary>
    public int AckDelayMs { get; init; } = 20;

    /// <summary>What timeouts are measured by; ticks of a millisecond or finer.</summary>
    public TimeProvider Time { get; init; } = TimeProvider.System;

    /// <summary>DNS servers to ask; null reads the host's resolv.conf.</summary>
    public IReadOnlyList<IPAddress>? NameServers { get; init; }

    /// <summary>Directory of the switch that VMs of this host share; null for none.</summary>
    public string? SwitchDirectory { get; init; }
}
