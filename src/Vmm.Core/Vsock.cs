// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Core;

// Theory. Streams between a guest and processes of the host that need no network (AF_VSOCK). The device knows ports,
// credit and packets; the back end knows what a port is on the host. A back end holds no lock of its own while it calls
// a receiver or an acceptor, so a device may call a stream under its lock.

/// <summary>The host's end of a stream; made by a back end, used and disposed by the device. Any thread.</summary>
public interface IVsockStream : IDisposable
{
    /// <summary>Passes bytes of the guest on without blocking.</summary>
    /// <returns>How many were taken, perhaps 0: then <see cref="IVsockReceiver.OnWritable"/> comes; -1 when broken.</returns>
    int Write(ReadOnlySpan<byte> bytes);

    /// <summary>The guest sends nothing more.</summary>
    void ShutdownWrite();

    /// <summary>The receiver can take data (again). Also starts a new stream.</summary>
    void ResumeRead();
}

/// <summary>The device's end of a stream. Called on the back end's thread, without locks held.</summary>
public interface IVsockReceiver
{
    /// <summary>Data for the guest.</summary>
    /// <returns>How much was taken; after less than everything the back end waits for ResumeRead.</returns>
    int OnData(ReadOnlySpan<byte> bytes);

    /// <summary>The stream takes bytes again.</summary>
    void OnWritable();

    /// <summary>The host sends nothing more, or (<paramref name="broken"/>) the stream is gone.</summary>
    void OnEnd(bool broken);
}

/// <summary>The device's answer to a stream that a process of the host opens.</summary>
public interface IVsockAcceptor
{
    /// <summary>Asks the guest for a connection to a port; the answer comes through <paramref name="decided"/>.</summary>
    /// <param name="guestPort">Port in the guest.</param>
    /// <param name="stream">The host's end; the device owns it from now on.</param>
    /// <param name="decided">Called once with the host port, or 0 when the guest refused.</param>
    /// <returns>The receiver, or null when there is no guest to ask; the stream is then disposed.</returns>
    IVsockReceiver? Open(uint guestPort, IVsockStream stream, Action<uint> decided);
}

/// <summary>What a guest's vsock reaches on the host.</summary>
public interface IVsockBackend : IDisposable
{
    /// <summary>Says who accepts. Once, before the machine runs.</summary>
    void Attach(IVsockAcceptor acceptor);

    /// <summary>The guest connects to a port of the host. Does not block.</summary>
    /// <returns>The stream, not reading yet, or null when nobody listens there.</returns>
    IVsockStream? Connect(uint port, IVsockReceiver receiver);
}
