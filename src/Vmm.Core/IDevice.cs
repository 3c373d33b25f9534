// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Core;

/// <summary>
/// A device model. Order of calls: constructor, Reset, Resume, (Pause, [Save | Load | Reset], Resume)*, Dispose.
/// Constructors take narrow ports (<see cref="IIrqLine"/>, <see cref="IClock"/>, <see cref="IDmaPort"/>, back ends),
/// never the machine. A model has no wall clock, no randomness, no file and no static state: everything that it does
/// can be replayed. Register windows may be called at any time after construction.
/// </summary>
public interface IDevice : IDisposable
{
    /// <summary>Unique in the machine: log scope, snapshot section, name in vmctl ("com1", "ide0").</summary>
    string Id { get; }

    /// <summary>Version of what <see cref="Save"/> writes; old versions load for ever or are refused by name.</summary>
    int StateVersion { get; }

    /// <summary>Power-on values of the data sheet. Called only while paused, with no access under way.</summary>
    void Reset();

    /// <summary>Stops producing work of its own (timers, I/O completions); requests in flight are held or finished.</summary>
    void Pause();

    /// <summary>Continues after <see cref="Pause"/> or starts the first time.</summary>
    void Resume();

    /// <summary>Writes the guest-visible state. Only while paused.</summary>
    void Save(StateWriter writer);

    /// <summary>Restores what <see cref="Save"/> wrote. Only while paused.</summary>
    /// <exception cref="StateException">The state is damaged or of an unknown version.</exception>
    void Load(StateReader reader, int version);
}

/// <summary>An interrupt wire into a controller. Level semantics; calling Set with the present level is a no-op.</summary>
public interface IIrqLine
{
    /// <summary>Drives the wire. Any thread.</summary>
    void Set(bool asserted);
}

/// <summary>Takes message-signalled interrupts (SDM 3A 11.11).</summary>
public interface IMsiSink
{
    /// <summary>Delivers a message. Any thread.</summary>
    /// <param name="address">Message address, 0xFEExxxxx for the local APICs.</param>
    /// <param name="data">Message data.</param>
    void Send(ulong address, uint data);
}

/// <summary>A device's way into guest memory. Never throws on a bad address; copies only.</summary>
public interface IDmaPort
{
    /// <summary>Copies guest memory out.</summary>
    /// <returns>False when any byte lies outside RAM; <paramref name="into"/> is then undefined.</returns>
    bool TryRead(ulong address, Span<byte> into);

    /// <summary>Copies into guest memory and marks the pages dirty.</summary>
    /// <returns>False when any byte lies outside writable RAM; a prefix may have been written.</returns>
    bool TryWrite(ulong address, ReadOnlySpan<byte> from);

    /// <summary>Gets a piece of contiguous RAM for zero-copy I/O by a back end.</summary>
    /// <param name="address">Guest-physical address.</param>
    /// <param name="lengthBytes">Wanted length; the slice may be shorter where RAM is not contiguous.</param>
    /// <param name="forWrite">True when the back end will write into it (a disk read).</param>
    /// <param name="slice">The piece; valid while the machine exists.</param>
    /// <returns>False when the first byte lies outside (writable) RAM.</returns>
    bool TryGetSlice(ulong address, int lengthBytes, bool forWrite, out GuestSlice slice);

    /// <summary>Marks a slice that a back end has filled as dirty. Call after the write, before telling the guest.</summary>
    void MarkWritten(ulong address, int lengthBytes);
}

/// <summary>
/// A contiguous piece of guest RAM as the host sees it: an opaque token to safe code, made by Vmm.Memory and
/// consumed by Vmm.Host's readv/writev wrappers. It must not outlive the machine.
/// </summary>
/// <param name="HostAddress">Address in this process.</param>
/// <param name="LengthBytes">Length.</param>
public readonly record struct GuestSlice(nint HostAddress, int LengthBytes);
