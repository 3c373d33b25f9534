// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;

namespace Vmm.Host;

/// <summary>Keeps a descriptor open for the length of a call, so that a concurrent Dispose cannot hand its number on.</summary>
internal readonly ref struct HeldHandle : IDisposable
{
    private readonly SafeHandle _handle;
    private readonly bool _added;

    internal HeldHandle(SafeHandle handle)
    {
        _handle = handle;
        _handle.DangerousAddRef(ref _added);
        Fd = (int)handle.DangerousGetHandle();
    }

    internal int Fd { get; }

    public void Dispose()
    {
        if (_added)
        {
            _handle.DangerousRelease();
        }
    }
}
