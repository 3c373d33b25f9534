// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using Vmm.Backends.CloudInit;
using Vmm.Backends.Limits;
using Vmm.Backends.Net;
using Vmm.Config;
using Vmm.Core;
using Vmm.Devices.Net;
using Vmm.Devices.Virtio;
using Vmm.Host;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>
/// Makes the cards of a definition that are VirtIO or Ethernet, with their back ends, in a fixed order, so that the same definition gives the
/// same PCI addresses: network cards, random numbers, balloon, consoles, shares, sockets, input, cloud-init's seed.
/// </summary>
internal sealed class Cards : IDisposable
{
    private readonly MachineSpec _spec;
    private readonly CharFactory _chars;
    private readonly GuestMemory _memory;
    private readonly Func<RamBlock, HostMemory?> _hostMemory;
    private readonly VirtioCards _virtio;
    private PollLoop? _loop;

    /// <summary>Prepares.</summary>
    /// <param name="spec">The definition.</param>
    /// <param name="chars">Makes the host ends of consoles.</param>
    /// <param name="memory">Guest memory, for the balloon.</param>
    /// <param name="hostMemory">The host memory behind a block; null when it cannot be released.</param>
    /// <param name="virtio">Makes cards of VirtIO models.</param>
    public Cards(
        MachineSpec spec, CharFactory chars, GuestMemory memory, Func<RamBlock, HostMemory?> hostMemory, VirtioCards virtio)
    {
        _spec = spec;
        _chars = chars;
        _memory = memory;
        _hostMemory = hostMemory;
        _virtio = virtio;
    }

    /// <summary>The balloon, when the definition has one.</summary>
    public VirtioBalloon? Balloon { get; private set; }

    /// <summary>Input devices; who has a screen sends to them.</summary>
    public List<VirtioInput> Inputs { get; } = [];

    private PollLoop Loop => _loop ??= new PollLoop("net " + _spec.Name);

    /// <summary>Makes the cards.</summary>
    /// <exception cref="HostException">A back end cannot be opened.</exception>
    /// <exception cref="IOException">A file of cloud-init's cannot be read.</exception>
    public IEnumerable<IDevice> Make()
    {
        int index = 0;
        foreach (NicSpec nic in _spec.Nics)
        {
            byte[] mac = MacOf(nic, index);
            string id = $"net{index++}";
            switch (nic.Model)
            {
                case NicModel.Virtio:
                    yield return Card(
                        id, new VirtioNet(MakeNetwork(nic, mac), mac, new VirtioNetOptions { Mtu = (ushort)nic.Mtu, QueuePairs = nic.Queues }));
                    break;
                case NicModel.E1000:
                    yield return new E1000(id, MakeNetwork(nic, mac), mac);
                    break;
                case NicModel.Rtl8139:
                    yield return new Rtl8139(id, MakeNetwork(nic, mac), mac);
                    break;
            }
        }

        if (_spec.Rng)
        {
            yield return Card("rng0", new VirtioRng(new HostEntropy()));
        }

        if (_spec.Balloon)
        {
            Balloon = new VirtioBalloon(new Reclaimer(_memory, _hostMemory));
            yield return Card("balloon0", Balloon);
        }

        if (_spec.Console.Count > 0)
        {
            var ports = new List<VirtioConsolePort>();
            foreach (ConsoleSpec console in _spec.Console)
            {
                ICharBackend end = _chars.Make($"console{ports.Count}", console.Backend);
                ports.Add(new VirtioConsolePort(end, console.Name ?? "", IsConsole: console.Name is null));
            }

            yield return Card("console", new VirtioConsole(ports));
        }

        index = 0;
        foreach (ShareSpec share in _spec.Shares)
        {
            yield return Card(
                $"share{index++}", new Virtio9P(new SharedDirectory(share.Path, share.ReadOnly), share.Tag));
        }

        if (_spec.Vsock is { } vsock)
        {
            yield return Card("vsock0", new VirtioVsock(vsock.Cid, new UnixVsockBackend(Loop, vsock.Path)));
        }

        foreach (InputDevice input in _spec.Input)
        {
            VirtioInputKind? kind = input switch
            {
                InputDevice.VirtioKeyboard => VirtioInputKind.Keyboard,
                InputDevice.VirtioTablet => VirtioInputKind.Tablet,
                _ => null,
            };
            if (kind is { } known)
            {
                var model = new VirtioInput(known);
                Inputs.Add(model);
                yield return Card($"input{Inputs.Count - 1}", model);
            }
        }

        if (_spec.CloudInit is { } cloudInit)
        {
            yield return Card("cloud-init", new VirtioBlock(new MemoryBlockBackend(Seed(cloudInit))));
        }
    }

    /// <summary>Makes the network behind a card of any model.</summary>
    /// <exception cref="HostException">It cannot be made.</exception>
    private INetBackend MakeNetwork(NicSpec nic, byte[] mac)
    {
        INetBackend network = nic.Backend switch
        {
            NicBackend.User => new UserNetwork(UserOptions(nic, mac)),
            NicBackend.Tap => new TapNetBackend(Loop, nic.Target!),
            NicBackend.Socket => new SocketNetBackend(Loop, nic.Target!),
            _ => new NoNetBackend(),
        };
        return nic.BytesPerSecond > 0 ? new LimitedNetBackend(network, nic.BytesPerSecond) : network;
    }

    /// <summary>A card's address: as defined, or locally administered and derived from the VM's name.</summary>
    private byte[] MacOf(NicSpec nic, int index)
    {
        byte[] mac = new byte[6];
        if (nic.Mac is { } given)
        {
            for (int i = 0; i < 6; i++)
            {
                mac[i] = (byte)(given >> (8 * (5 - i)));
            }

            return mac;
        }

        // FNV-1a, folded: what matters is that it is the same every time.
        ulong hash = 0xCBF2_9CE4_8422_2325;
        foreach (byte value in Encoding.UTF8.GetBytes(string.Create(CultureInfo.InvariantCulture, $"{_spec.Name}/{index}")))
        {
            hash = (hash ^ value) * 0x100_0000_01B3;
        }

        uint folded = (uint)(hash ^ (hash >> 32));
        (mac[0], mac[1]) = (0x52, 0x54);
        System.Buffers.Binary.BinaryPrimitives.WriteUInt32BigEndian(mac.AsSpan(2), folded);
        return mac;
    }

    /// <inheritdoc/>
    public void Dispose() => _loop?.Dispose();

    private static byte[] Seed(CloudInitSpec spec) => CloudInitSeed.Build(new CloudInitOptions
    {
        HostName = spec.Hostname,
        SshKeys = spec.SshKeys,
        UserData = spec.UserData is null ? null : File.ReadAllBytes(spec.UserData),
        Network = spec.Network is null ? null : File.ReadAllBytes(spec.Network),
    });

    private IDevice Card(string id, IVirtioModel model) => _virtio.Make(id, model);

    private UserNetworkOptions UserOptions(NicSpec nic, byte[] mac)
    {
        var forwards = new List<Backends.Net.PortForward>();
        foreach (Config.PortForward forward in nic.Forward)
        {
            forwards.Add(new Backends.Net.PortForward(
                forward.IsUdp, forward.HostAddress, (ushort)forward.HostPort, (ushort)forward.GuestPort));
        }

        return new UserNetworkOptions
        {
            HostName = _spec.Name,
            GuestMac = mac,
            Forwards = forwards,
            Mtu = nic.Mtu == 0 ? 1500 : nic.Mtu,
            SwitchDirectory = nic.Network is null ? null : UserSwitch.DirectoryOf(nic.Network),
        };
    }

    /// <summary>The host's random numbers.</summary>
    private sealed class HostEntropy : IEntropySource
    {
        public void Fill(Span<byte> into) => HostRandom.Fill(into);
    }

    /// <summary>A cable with nobody at the other end.</summary>
    private sealed class NoNetBackend : INetBackend
    {
        public bool CanOffload => false;

        public void Send(ReadOnlySpan<byte> frame, in NetOffload offload)
        {
        }

        public void Attach(INetReceiver receiver)
        {
        }

        public void ResumeReceive()
        {
        }

        public void Dispose()
        {
        }
    }

    /// <summary>Gives ballooned pages back to the host.</summary>
    private sealed class Reclaimer(GuestMemory memory, Func<RamBlock, HostMemory?> hostMemory) : IMemoryReclaimer
    {
        public bool TryRelease(ulong guestAddress, ulong lengthBytes)
        {
            while (lengthBytes > 0)
            {
                if (!memory.TryFind(guestAddress, out RamRange range) || range.ReadOnly
                    || hostMemory(range.Block) is not { } host)
                {
                    return false;
                }

                ulong inside = guestAddress - range.GuestAddress;
                ulong part = Math.Min(lengthBytes, range.LengthBytes - inside);
                if (!host.TryDiscard((long)(range.Offset + inside), (long)part))
                {
                    return false;
                }

                // The pages read as zeroes now: that is a change like a write.
                for (ulong done = 0; done < part;)
                {
                    int step = (int)Math.Min(part - done, 1 << 30);
                    memory.MarkWritten(guestAddress + done, step);
                    done += (ulong)step;
                }

                guestAddress += part;
                lengthBytes -= part;
            }

            return true;
        }
    }
}
