// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Backends.Net;

// Theory. VMs of one host that name the same switch reach each other, each VM being a process of its own. There is no
// switch process: the switch is a directory. Each VM binds a Unix datagram socket named after its MAC address in it and
// sends a frame straight to the socket of the destination, or to all of them for a group address. A lease file per IPv4
// address, made with O_EXCL, says who has the address and under which name, which is also what DNS looks up. Whoever
// may write the directory may join; it is made for its owner only.
//
// A VM that died leaves its files behind. A send that is refused tells so, and the sender removes the socket and the
// lease. A full socket loses the frame, as a switch does.
//
// A datagram is a 12-byte header with the work left to do (the fields of NetOffload) and the frame. Where the system's
// limit for datagrams is smaller than a large segment (FreeBSD: net.local.dgram.maxdgram), the sender cuts it first.

/// <summary>A VM's port of a switch that lives in a directory. Thread-safe.</summary>
internal sealed class VmSwitch : IDisposable
{
    private const int HeaderBytes = FrameHeader.Bytes;
    private const int SocketBufferBytes = 1 << 20;
    private const int RescanMs = 1000;
    private const int BurstFrames = 64;
    private const string SocketSuffix = ".port";
    private const string LeasePrefix = "ip-";
    private const int MaxLeaseBytes = 512; // a MAC address and a name

    private readonly Lock _gate = new();
    private readonly string _directory;
    private readonly string _path;
    private readonly Socket _socket;
    private readonly byte[] _out = new byte[HeaderBytes + NetFrames.MaxFrameBytes];
    private readonly byte[] _segment = new byte[NetFrames.MaxFrameBytes];
    private readonly byte[] _in = new byte[HeaderBytes + NetFrames.MaxFrameBytes];
    private readonly Dictionary<ulong, UnixDomainSocketEndPoint> _peers = [];
    private readonly Action<byte[], int, int, NetOffload> _onFrame;
    private readonly ulong _mac;
    private readonly TimeProvider _time;
    private IPollRegistration? _registration;
    private string? _lease;
    private long? _scanned;
    private long _dropped;

    /// <summary>Joins.</summary>
    /// <param name="directory">Made if it does not exist.</param>
    /// <param name="mac">Our port's name.</param>
    /// <param name="time">Measures how long the list of ports is good for.</param>
    /// <param name="onFrame">Gets (buffer, offset, length, offload) on the loop's thread.</param>
    public VmSwitch(string directory, ulong mac, TimeProvider time, Action<byte[], int, int, NetOffload> onFrame)
    {
        _directory = directory;
        _mac = mac;
        _time = time;
        _onFrame = onFrame;
        if (!OperatingSystem.IsWindows())
        {
            Directory.CreateDirectory(directory, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        }

        _path = Path.Combine(directory, Name(mac) + SocketSuffix);
        File.Delete(_path);
        _socket = new Socket(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified) { Blocking = false };
        try
        {
            _socket.SendBufferSize = SocketBufferBytes;
            _socket.ReceiveBufferSize = SocketBufferBytes;
            _socket.Bind(new UnixDomainSocketEndPoint(_path));
        }
        catch
        {
            _socket.Dispose();
            throw;
        }
    }

    /// <summary>Frames that found no room at their destination.</summary>
    public long Dropped => Interlocked.Read(ref _dropped);

    /// <summary>Starts to deliver.</summary>
    public void Start(Func<System.Runtime.InteropServices.SafeHandle, PollEvents, Action<PollEvents>, IPollRegistration> watch) =>
        _registration = watch(_socket.SafeHandle, PollEvents.Readable, OnReady);

    /// <summary>Claims an address of a /24 network for a name.</summary>
    /// <param name="network">First address of the network.</param>
    /// <param name="preferredHost">Last byte to try first.</param>
    /// <param name="name">The VM's name.</param>
    public NetAddress Claim(NetAddress network, byte preferredHost, string name)
    {
        string content = Name(_mac) + " " + name.ToLowerInvariant() + "\n";
        string? previous = FindLease(Name(_mac));
        if (previous is not null)
        {
            File.Delete(previous); // ours, from before; the address is kept if the name is the same
        }

        for (int i = 0; i < 240; i++)
        {
            int host = ((preferredHost - 4 + i) % 250) + 4;
            var address = new NetAddress(network.Value + (UInt128)host, false);
            string path = Path.Combine(_directory, LeasePrefix + address);
            if (previous is not null && i == 0)
            {
                path = previous;
                address = NetAddress.From(IPAddress.Parse(Path.GetFileName(previous)[LeasePrefix.Length..]));
            }

            try
            {
                using var file = new FileStream(path, FileMode.CreateNew, FileAccess.Write, FileShare.Read);
                file.Write(Encoding.UTF8.GetBytes(content));
                _lease = path;
                return address;
            }
            catch (IOException) when (Path.Exists(path))
            {
                RemoveIfDead(path);
            }
        }

        throw new HostException($"switch {_directory}: no free address");
    }

    /// <summary>The address of a VM by name.</summary>
    public bool TryResolve(string name, out NetAddress address)
    {
        address = default;
        foreach (string path in Files(LeasePrefix + "*"))
        {
            string[] words = ReadLease(path);
            if (words.Length == 2 && string.Equals(words[1], name, StringComparison.OrdinalIgnoreCase)
                && IPAddress.TryParse(Path.GetFileName(path)[LeasePrefix.Length..], out IPAddress? parsed))
            {
                address = NetAddress.From(parsed);
                return true;
            }
        }

        return false;
    }

    /// <summary>Sends a frame to one VM or to all.</summary>
    public void Send(ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        ulong to = Mac.Read(frame);
        lock (_gate)
        {
            bool group = Mac.IsGroup(to);
            if ((group || !_peers.ContainsKey(to))
                && (_scanned is not { } scanned || _time.GetElapsedTime(scanned).TotalMilliseconds > RescanMs))
            {
                Scan();
                _scanned = _time.GetTimestamp();
            }

            if (!group)
            {
                if (_peers.TryGetValue(to, out UnixDomainSocketEndPoint? peer))
                {
                    SendTo(to, peer, frame, offload);
                }

                return;
            }

            foreach ((ulong mac, UnixDomainSocketEndPoint peer) in new List<KeyValuePair<ulong, UnixDomainSocketEndPoint>>(_peers))
            {
                SendTo(mac, peer, frame, offload);
            }
        }
    }

    /// <summary>Leaves; the loop's thread must not be in here (the owner has stopped it).</summary>
    public void Dispose()
    {
        _registration?.Dispose();
        _socket.Dispose();
        File.Delete(_path);
        if (_lease is { } lease)
        {
            File.Delete(lease);
        }
    }

    private static string Name(ulong mac) => mac.ToString("x12", CultureInfo.InvariantCulture);

    private static string[] ReadLease(string path)
    {
        try
        {
            // What another VM left here may be of any size and kind: a pipe without a writer, a link to a device.
            using BlockFile file = BlockFile.Open(path, readOnly: true);
            Span<byte> content = stackalloc byte[(int)Math.Min(file.Length, MaxLeaseBytes)];
            return file.Read(0, content) == BlockStatus.Ok
                ? Encoding.UTF8.GetString(content).Split([' ', '\n'], StringSplitOptions.RemoveEmptyEntries)
                : [];
        }
        catch (IOException)
        {
            return []; // its owner left, or it is no file
        }
    }

    private string[] Files(string pattern)
    {
        try
        {
            return Directory.GetFiles(_directory, pattern);
        }
        catch (IOException)
        {
            return [];
        }
    }

    private string? FindLease(string mac)
    {
        foreach (string path in Files(LeasePrefix + "*"))
        {
            if (ReadLease(path) is [string owner, ..] && string.Equals(owner, mac, StringComparison.Ordinal)
                && IPAddress.TryParse(Path.GetFileName(path)[LeasePrefix.Length..], out _))
            {
                return path;
            }
        }

        return null;
    }

    private void RemoveIfDead(string lease)
    {
        string[] words = ReadLease(lease);
        if (Directory.Exists(lease))
        {
            return; // not ours to remove: the address counts as taken
        }

        if (words.Length < 1 || !File.Exists(Path.Combine(_directory, words[0] + SocketSuffix)))
        {
            File.Delete(lease);
        }
    }

    private void Scan()
    {
        _peers.Clear();
        foreach (string path in Files("*" + SocketSuffix))
        {
            string name = Path.GetFileName(path)[..^SocketSuffix.Length];
            if (ulong.TryParse(name, NumberStyles.HexNumber, CultureInfo.InvariantCulture, out ulong mac) && mac != _mac)
            {
                _peers[mac] = new UnixDomainSocketEndPoint(path);
            }
        }
    }

    private void SendTo(ulong mac, UnixDomainSocketEndPoint peer, ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        if (Write(mac, peer, frame, offload) != SocketError.MessageSize)
        {
            return;
        }

        if (offload.SegmentKind == 0)
        {
            Interlocked.Increment(ref _dropped);
            return;
        }

        int position = 0;
        while (NetFrames.TryNextSegment(frame, offload, ref position, _segment, out int length))
        {
            Write(mac, peer, _segment.AsSpan(0, length), default);
        }
    }

    private SocketError Write(ulong mac, UnixDomainSocketEndPoint peer, ReadOnlySpan<byte> frame, in NetOffload offload)
    {
        Span<byte> datagram = _out;
        FrameHeader.Write(datagram, offload);
        frame.CopyTo(datagram[HeaderBytes..]);
        try
        {
            _socket.SendTo(datagram[..(HeaderBytes + frame.Length)], SocketFlags.None, peer);
            return SocketError.Success;
        }
        catch (SocketException e)
        {
            if (e.SocketErrorCode is SocketError.ConnectionRefused or SocketError.AddressNotAvailable)
            {
                // Its process is gone: so is its port, and the next who needs its address takes the lease away.
                _peers.Remove(mac);
                File.Delete(Path.Combine(_directory, Name(mac) + SocketSuffix));
            }
            else if (e.SocketErrorCode != SocketError.MessageSize)
            {
                Interlocked.Increment(ref _dropped);
            }

            return e.SocketErrorCode;
        }
    }

    private void OnReady(PollEvents events)
    {
        for (int i = 0; i < BurstFrames; i++)
        {
            int length = _socket.Receive(_in, SocketFlags.None, out SocketError error);
            if (error != SocketError.Success)
            {
                return;
            }

            if (length < HeaderBytes + Proto.EthernetBytes)
            {
                continue;
            }

            if (FrameHeader.TryRead(_in, length - HeaderBytes, out NetOffload offload))
            {
                _onFrame(_in, HeaderBytes, length - HeaderBytes, offload);
            }
        }
    }
}
