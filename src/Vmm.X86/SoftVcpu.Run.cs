// SPDX-License-Identifier: BSD-2-Clause
using Vmm.Core;

namespace Vmm.X86;

public sealed unsafe partial class SoftVcpu
{
    /// <inheritdoc/>
    public ExitKind Run(ref VcpuExit exit) => ExitKind.Failed;
}
