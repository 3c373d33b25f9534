// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using Vmm.Devices.Pci;
using Vmm.Memory;

namespace Vmm.Devices.Display;

/// <summary>
/// Puts video memory where a BAR says, with dirty logging. RAM and firmware win where a guest moves it over them.
/// </summary>
public sealed class VideoMemoryMapper : IRamBarMapper
{
    private readonly Lock _gate = new();
    private readonly GuestMemory _memory;
    private readonly RamBlock _block;
    private RamMapping? _mapping;

    /// <summary>Makes a mapper; nothing is mapped yet.</summary>
    public VideoMemoryMapper(GuestMemory memory, RamBlock block)
    {
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentNullException.ThrowIfNull(block);
        _memory = memory;
        _block = block;
    }

    /// <inheritdoc/>
    public void Move(ulong? guestAddress)
    {
        lock (_gate)
        {
            _memory.Transaction(() =>
            {
                if (_mapping is { } old)
                {
                    _memory.Unmap(old);
                    _mapping = null;
                }

                if (guestAddress is { } start)
                {
                    _mapping = _memory.Map(
                        start, _block, 0, _block.LengthBytes, RamAccess.ReadWrite, PciFunction.BarPriority, logDirty: true);
                }
            });
        }
    }
}
