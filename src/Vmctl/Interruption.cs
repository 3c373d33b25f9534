// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using System.Threading;

namespace Vmctl;

/// <summary>
/// Makes SIGINT, SIGTERM and SIGHUP a cancellation for as long as it lives: for what must be put in order before the
/// process ends. Other commands change nothing by halves, and signals end them as usual.
/// </summary>
internal sealed class Interruption : IDisposable
{
    private readonly CancellationTokenSource _ending;
    private readonly PosixSignalRegistration[] _registrations;

    /// <summary>Begins to listen.</summary>
    /// <param name="onHangUp">What SIGHUP means instead, for a daemon.</param>
    /// <param name="outer">Cancels as well.</param>
    internal Interruption(Action? onHangUp = null, CancellationToken outer = default)
    {
        _ending = CancellationTokenSource.CreateLinkedTokenSource(outer);
        _registrations =
        [
            On(PosixSignal.SIGTERM, _ending.Cancel),
            On(PosixSignal.SIGINT, _ending.Cancel),
            On(PosixSignal.SIGHUP, onHangUp ?? _ending.Cancel),
        ];
    }

    internal CancellationToken Token => _ending.Token;

    public void Dispose()
    {
        foreach (PosixSignalRegistration registration in _registrations)
        {
            registration.Dispose();
        }

        _ending.Dispose();
    }

    private static PosixSignalRegistration On(PosixSignal signal, Action act) => PosixSignalRegistration.Create(signal, context =>
    {
        context.Cancel = true;
        act();
    });
}
