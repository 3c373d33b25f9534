// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. Between chips and controllers there is only wire: several chips on one input (wired OR), and one wire to
// several inputs (ISA IRQ 4 goes to the 8259 and to the I/O APIC). These classes are that wire. Each OR has a lock of
// its own, so that the level that it drives is the OR of what its inputs last said, in that order.

/// <summary>A wire that calls a delegate.</summary>
public sealed class DelegateLine : IIrqLine
{
    private readonly Action<bool> _set;

    /// <summary>Makes one.</summary>
    public DelegateLine(Action<bool> set) => _set = set;

    /// <inheritdoc/>
    public void Set(bool asserted) => _set(asserted);
}

/// <summary>A wire to nowhere.</summary>
public sealed class UnconnectedLine : IIrqLine
{
    private UnconnectedLine()
    {
    }

    /// <summary>The only one; it has no state.</summary>
    public static UnconnectedLine Instance { get; } = new();

    /// <inheritdoc/>
    public void Set(bool asserted)
    {
    }
}

/// <summary>One wire to several inputs.</summary>
public sealed class FanoutLine : IIrqLine
{
    private readonly IIrqLine[] _targets;

    /// <summary>Makes one.</summary>
    public FanoutLine(params IIrqLine[] targets) => _targets = targets;

    /// <inheritdoc/>
    public void Set(bool asserted)
    {
        foreach (IIrqLine target in _targets)
        {
            target.Set(asserted);
        }
    }
}

/// <summary>Several outputs on one wire: it is asserted while any of them is.</summary>
public sealed class SharedLine
{
    private readonly Lock _gate = new();
    private readonly List<Input> _inputs = [];
    private readonly IIrqLine _target;
    private int _asserted;

    /// <summary>Makes one without inputs.</summary>
    public SharedLine(IIrqLine target) => _target = target;

    /// <summary>Adds an output to the wire. Before the machine runs.</summary>
    public IIrqLine AddInput()
    {
        var input = new Input(this);
        _inputs.Add(input);
        return input;
    }

    private sealed class Input : IIrqLine
    {
        private readonly SharedLine _owner;
        private bool _level;

        public Input(SharedLine owner) => _owner = owner;

        public void Set(bool asserted)
        {
            lock (_owner._gate)
            {
                if (_level == asserted)
                {
                    return;
                }

                _level = asserted;
                _owner._asserted += asserted ? 1 : -1;
                _owner._target.Set(_owner._asserted > 0);
            }
        }
    }
}
