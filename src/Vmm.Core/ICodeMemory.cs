// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmm.Core;

/// <summary>
/// Memory for machine code that this process generates, mapped twice so that no page is ever writable and executable
/// at one address (W^X): bytes are written through <see cref="WriteAddress"/> and run at <see cref="ExecuteAddress"/>,
/// both at the same offset. x86 keeps instruction fetch coherent with writes through another linear address once the
/// writer has executed a serialising or any taken branch to bytes that were never fetched before (SDM 3A 9.1.3); users
/// therefore write code before they publish its address and never change published bytes in place.
/// Implemented by Vmm.Host, which alone may ask the operating system for executable pages. Owned by one holder.
/// </summary>
public interface ICodeMemory : IDisposable
{
    /// <summary>First byte of the writable alias.</summary>
    nint WriteAddress { get; }

    /// <summary>First byte of the executable alias.</summary>
    nint ExecuteAddress { get; }

    /// <summary>Length in bytes of both aliases, a multiple of the page size.</summary>
    int LengthBytes { get; }
}
