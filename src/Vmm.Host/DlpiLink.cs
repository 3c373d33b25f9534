// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using Microsoft.Win32.SafeHandles;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. illumos has no tap interfaces; what a virtual machine gets there is a VNIC (`dladm create-vnic -l LINK vnic0`),
// and a program talks to it by DLPI: messages on a STREAMS device /dev/net/NAME. All of that is needed only to set it up.
// Bound to everything, in raw mode, and with a stream that keeps the bounds of messages, each read(2) gives one Ethernet
// frame and each write(2) sends one, so that the rest of this program sees a tap without a header (TapDevice).
//
//   DL_BIND_REQ          the stream belongs to the link; the number is of no interest, since:
//   DL_PROMISCON_REQ     DL_PROMISC_SAP: frames of every type to the VNIC's address and to all;
//                        DL_PROMISC_MULTI: and to groups; DL_PROMISC_RX_ONLY: but not what we send ourselves
//   DLIOCRAW             messages are frames with their headers
//   I_SRDOPT             one message a read; what the link has to tell us (its state, its speed) is thrown away
//
// The link filters by the VNIC's own address, so a guest's `mac:` must be that address (`dladm show-vnic`).
//
// This was written from illumos' dlpi(4P), dlpi.h and stropts.h. It is tested against a provider that checks every
// message; it has not run on illumos.

/// <summary>What setting up a link needs of a stream.</summary>
internal interface IStreams
{
    /// <summary>putmsg(2) of a control part. 0 or the system's error number.</summary>
    int Put(ReadOnlySpan<byte> control);

    /// <summary>getmsg(2) of a control part, waiting. 0 or the system's error number; a message of data has length 0.</summary>
    int Get(Span<byte> control, out int length);

    /// <summary>An I_STR request without data. 0 or the system's error number.</summary>
    int Request(int command);

    /// <summary>I_SRDOPT. 0 or the system's error number.</summary>
    int SetReadOptions(int options);
}

/// <summary>A VNIC of illumos as a descriptor that carries Ethernet frames.</summary>
internal static class DlpiLink
{
    internal const uint BindRequest = 0x01;
    internal const uint BindAck = 0x04;
    internal const uint ErrorAck = 0x05;
    internal const uint OkAck = 0x06;
    internal const uint PromiscOnRequest = 0x1F;
    internal const uint PromiscSap = 2;
    internal const uint PromiscMulti = 3;
    internal const uint PromiscReceiveOnly = 4;
    internal const int RawMode = ('D' << 8) | 1; // DLIOCRAW
    internal const int MessageDiscard = 1; // RMSGD
    internal const int ProtocolDiscard = 8; // RPROTDIS

    private const int BindRequestBytes = 20;
    private const int PromiscRequestBytes = 8;
    private const int MaxAckBytes = 256;
    private const int MaxSkipped = 4096;
    private const uint SystemError = 4; // DL_SYSERR: the second number is an error of the system
    private const ushort Connectionless = 2; // DL_CLDLS

    /// <summary>Opens a VNIC.</summary>
    /// <exception cref="HostException">It does not exist, may not be opened, or refuses; the message says which.</exception>
    internal static SafeFileHandle Open(string name)
    {
        const int ReadWrite = 2;
        int fd = LibC.open("/dev/net/" + name, ReadWrite | OsAbi.Current.OpenCloseOnExec, 0);
        if (fd < 0)
        {
            throw HostException.Last($"vnic {name}: open /dev/net/{name}");
        }

        var handle = new SafeFileHandle(fd, ownsHandle: true);
        try
        {
            SetUp(new Stream(fd), "vnic " + name);
            if (FileIo.SetNonBlocking(handle, enabled: true) is not Errno.None and var error)
            {
                throw new HostException($"vnic {name}: {error}");
            }

            return handle;
        }
        catch
        {
            handle.Dispose();
            throw;
        }
    }

    /// <summary>The conversation; see the top of this file.</summary>
    internal static void SetUp(IStreams stream, string what)
    {
        Span<byte> bind = stackalloc byte[BindRequestBytes];
        bind.Clear();
        BinaryPrimitives.WriteUInt32LittleEndian(bind, BindRequest);
        BinaryPrimitives.WriteUInt16LittleEndian(bind[12..], Connectionless);
        Ask(stream, bind, BindAck, what + ": bind");
        Span<byte> promiscuous = stackalloc byte[PromiscRequestBytes];
        BinaryPrimitives.WriteUInt32LittleEndian(promiscuous, PromiscOnRequest);
        foreach (uint level in (ReadOnlySpan<uint>)[PromiscSap, PromiscMulti, PromiscReceiveOnly])
        {
            BinaryPrimitives.WriteUInt32LittleEndian(promiscuous[4..], level);
            Ask(stream, promiscuous, OkAck, $"{what}: receive all types, level {level}");
        }

        Check(stream.Request(RawMode), what + ": raw mode");
        Check(stream.SetReadOptions(MessageDiscard | ProtocolDiscard), what + ": one message a read");
    }

    private static void Ask(IStreams stream, ReadOnlySpan<byte> request, uint wanted, string what)
    {
        Check(stream.Put(request), what);
        Span<byte> ack = stackalloc byte[MaxAckBytes];
        for (int skipped = 0; skipped < MaxSkipped; skipped++)
        {
            Check(stream.Get(ack, out int length), what);
            if (length < 4)
            {
                continue; // a frame that came meanwhile
            }

            uint primitive = BinaryPrimitives.ReadUInt32LittleEndian(ack);
            if (primitive == wanted)
            {
                return;
            }

            if (primitive == ErrorAck && length >= 16)
            {
                uint error = BinaryPrimitives.ReadUInt32LittleEndian(ack[8..]);
                int system = BinaryPrimitives.ReadInt32LittleEndian(ack[12..]);
                throw error == SystemError
                    ? new HostException(what, system)
                    : new HostException($"{what}: the link refuses with DLPI's error {error}");
            }
        }

        throw new HostException(what + ": the link does not answer");
    }

    private static void Check(int error, string what)
    {
        if (error != 0)
        {
            throw new HostException(what, error);
        }
    }

    private sealed unsafe class Stream(int fd) : IStreams
    {
        private const uint StreamRequest = ('S' << 8) | 8; // I_STR
        private const uint SetReadOption = ('S' << 8) | 6; // I_SRDOPT
        private const int TimeoutSeconds = 10;

        public int Put(ReadOnlySpan<byte> control)
        {
            // SAFETY: the bytes are pinned during the call, which gets their length.
            fixed (byte* bytes = control)
            {
                var part = new LibC.StreamBuffer { Length = control.Length, Address = bytes };
                return Result(LibC.putmsg(fd, &part, null, 0));
            }
        }

        public int Get(Span<byte> control, out int length)
        {
            // SAFETY: both buffers are pinned or on this stack during the call, which gets their lengths.
            byte* frame = stackalloc byte[64]; // the rest of a message stays for the next call
            fixed (byte* bytes = control)
            {
                var part = new LibC.StreamBuffer { MaxLength = control.Length, Address = bytes };
                var data = new LibC.StreamBuffer { MaxLength = 64, Address = frame };
                int flags = 0;
                int error = Result(LibC.getmsg(fd, &part, &data, &flags));
                length = error == 0 ? Math.Max(part.Length, 0) : 0;
                return error;
            }
        }

        public int Request(int command)
        {
            // SAFETY: the structure lies on this stack during the call and names no data.
            var request = new LibC.StreamControl { Command = command, TimeoutSeconds = TimeoutSeconds };
            return Result(LibC.ioctl(fd, StreamRequest, (nint)(&request)));
        }

        public int SetReadOptions(int options) => Result(LibC.ioctl(fd, SetReadOption, options));

        private static int Result(int returned) =>
            returned >= 0 ? 0 : System.Runtime.InteropServices.Marshal.GetLastPInvokeError();
    }
}
