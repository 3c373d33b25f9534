// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Text;
using Microsoft.Win32.SafeHandles;
using Vmm.Host.Native;

namespace Vmm.Host;

/// <summary>
/// An Ethernet interface of the host whose other end is a descriptor. Linux: /dev/net/tun, with a header that carries
/// checksums and segmentation left to do; an interface that was made for the user (`ip tuntap add ... user NAME`) needs
/// no rights. FreeBSD: /dev/tapN, plain frames. illumos: a VNIC (see <c>DlpiLink</c>), plain frames.
/// </summary>
public sealed class TapDevice : IDisposable
{
    /// <summary>Length of the header before each frame while <see cref="HasHeader"/>.</summary>
    public const int HeaderBytes = 12;

    private const uint TunSetInterface = 0x4004_54CA;
    private const uint TunSetOffload = 0x4004_54D0;
    private const uint TunSetHeaderSize = 0x4004_54D8;
    private const ushort FlagTap = 0x0002;
    private const ushort FlagNoPacketInfo = 0x1000;
    private const ushort FlagHeader = 0x4000;
    private const nint OffloadAll = 1 | 2 | 4; // TUN_F_CSUM, TSO4, TSO6
    private const int NameBytes = 16;
    private const int RequestBytes = 40; // struct ifreq

    private TapDevice(SafeFileHandle handle, bool hasHeader)
    {
        Handle = handle;
        HasHeader = hasHeader;
    }

    /// <summary>Frames are read from and written to it; does not block.</summary>
    public SafeFileHandle Handle { get; }

    /// <summary>Each frame is preceded by a virtio-net header (VIRTIO 1.2 §5.1.6) of 12 bytes.</summary>
    public bool HasHeader { get; }

    /// <summary>Opens an interface by name.</summary>
    /// <exception cref="HostException">It does not exist, is taken, or may not be opened; the message says which.</exception>
    public static TapDevice Open(string name)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        bool plain = Encoding.ASCII.GetByteCount(name) < NameBytes && name.IndexOfAny(['/', '\0', ' ']) < 0;
        if (!plain)
        {
            throw new HostException($"tap {name}: not a name of an interface");
        }

        return OsAbi.Current.System switch
        {
            HostSystem.Linux => OpenLinux(name),
            HostSystem.FreeBsd => new TapDevice(OpenFile("/dev/" + name, "tap " + name), hasHeader: false),
            HostSystem.Illumos => new TapDevice(DlpiLink.Open(name), hasHeader: false),
            _ => throw new HostException($"tap {name}: this system has no tap interfaces; use the user network"),
        };
    }

    /// <inheritdoc/>
    public void Dispose() => Handle.Dispose();

    private static SafeFileHandle OpenFile(string path, string what)
    {
        const int ReadWrite = 2;
        OsAbi abi = OsAbi.Current;
        int fd = LibC.open(path, ReadWrite | abi.OpenCloseOnExec | abi.OpenNonBlocking, 0);
        return fd >= 0 ? new SafeFileHandle(fd, ownsHandle: true) : throw Explain(what, HostException.Last($"{what}: open {path}"));
    }

    // What to do about the refusals that everybody meets once.
    private static HostException Explain(string what, HostException refused) => refused.Error switch
    {
        Errno.EPERM or Errno.EACCES => new HostException(
            $"{what}: this user may not use it; run as root, or let root make it for this user"
                + (OsAbi.Current.System == HostSystem.Linux ? " (ip tuntap add mode tap user NAME)" : string.Empty)),
        Errno.EBUSY => new HostException($"{what}: another program uses it; each VM needs a tap of its own"),
        _ => refused,
    };

    private static unsafe TapDevice OpenLinux(string name)
    {
        SafeFileHandle handle = OpenFile("/dev/net/tun", "tap " + name);
        int fd = (int)handle.DangerousGetHandle();
        byte* request = stackalloc byte[RequestBytes];
        var fields = new Span<byte>(request, RequestBytes);
        fields.Clear();
        Encoding.ASCII.GetBytes(name, fields);
        BinaryPrimitives.WriteUInt16LittleEndian(fields[NameBytes..], FlagTap | FlagNoPacketInfo | FlagHeader);
        int headerBytes = HeaderBytes;

        // SAFETY: both arguments lie on this stack and have the sizes that the requests read (struct ifreq, int).
        bool ok = Ioctl.Invoke(fd, TunSetInterface, (nint)request) == 0
            && Ioctl.Invoke(fd, TunSetHeaderSize, (nint)(&headerBytes)) == 0
            && Ioctl.Invoke(fd, TunSetOffload, OffloadAll) == 0;
        if (!ok)
        {
            HostException error = Explain($"tap {name}", HostException.Last($"tap {name}"));
            handle.Dispose();
            throw error;
        }

        return new TapDevice(handle, hasHeader: true);
    }
}
