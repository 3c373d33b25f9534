// SPDX-License-Identifier: BSD-2-Clause
using System.Threading;
using Vmm.Config;
using Vmm.Core;
using Vmm.Devices.Legacy;

namespace Vmm.Machine;

/// <summary>
/// What devices ask of the machine as a whole: reset, power-off, the debug-exit port. Requests come on vCPU threads in the
/// middle of a port access; they only set the result. Bound to its machine after that is made.
/// </summary>
internal sealed class SystemControl(WatchdogAction watchdog) : ISystemControl
{
    private Machine? _machine;
    private IVm? _vm;
    private volatile bool _isA20Closed;

    /// <inheritdoc/>
    public bool IsA20Open => !_isA20Closed;

    /// <summary>Says whose requests these are.</summary>
    public void Bind(Machine machine) => _machine = machine;

    /// <summary>Says whose address lines these are; before the first reset.</summary>
    public void Bind(IVm vm) => _vm = vm;

    /// <inheritdoc/>
    public void Request(SystemRequest request, string source)
    {
        if (request == SystemRequest.WatchdogExpired && watchdog == WatchdogAction.Pause)
        {
            // Pausing waits for vCPUs and the clock, and this is one of their threads.
            ThreadPool.QueueUserWorkItem(static machine => machine?.Pause(), _machine, preferLocal: false);
            return;
        }

        MachineResult? result = request switch
        {
            SystemRequest.Reset or SystemRequest.ProcessorReset => MachineResult.For(StopReason.Reset, $"reset by {source}"),
            SystemRequest.PowerOff or SystemRequest.GuestShutdown => MachineResult.For(
                StopReason.PowerOff, $"powered off by {source}"),
            SystemRequest.GuestPanicked => MachineResult.For(StopReason.Error, "the guest panicked"),
            SystemRequest.WatchdogExpired => watchdog switch
            {
                WatchdogAction.Reset => MachineResult.For(StopReason.Reset, "the watchdog expired"),
                WatchdogAction.Poweroff => MachineResult.For(StopReason.PowerOff, "the watchdog expired"),
                _ => null,
            },
            _ => null,
        };
        if (result is not null)
        {
            _machine?.Stop(result);
        }
    }

    /// <inheritdoc/>
    public void Exit(int status) => _machine?.Stop(new MachineResult(StopReason.DebugExit, status & 0xFF, null));

    /// <inheritdoc/>
    public void SetA20(bool isOpen)
    {
        _isA20Closed = !isOpen;
        _vm?.SetA20(isOpen);
    }
}
