// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Memory;

/// <summary>
/// One byte per 4 KiB page of a RAM block, in unmanaged memory beside it, shared by the software CPU, DMA and
/// everyone who wants to know what was written. Writers of guest RAM set <see cref="Written"/> after the data; a
/// consumer clears its own bit with an atomic AND before it reads the data, so that nothing is missed.
/// </summary>
[Flags]
public enum PageFlags : byte
{
    /// <summary>Nothing.</summary>
    None = 0,

    /// <summary>Written since the display looked.</summary>
    DirtyDisplay = 1 << 0,

    /// <summary>Written since a snapshot or migration looked.</summary>
    DirtySnapshot = 1 << 1,

    /// <summary>The software CPU holds decoded code of this page; whoever writes it must report the write.</summary>
    Code = 1 << 7,

    /// <summary>What a write sets.</summary>
    Written = DirtyDisplay | DirtySnapshot,
}
