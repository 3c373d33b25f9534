// SPDX-License-Identifier: BSD-2-Clause
using System.Collections.Generic;

namespace Vmm.Core;

/// <summary>One count of a driver.</summary>
/// <param name="Name">Lower-case words with dashes, for example <c>blocks-translated</c>.</param>
/// <param name="Value">The count since the VM was made, over all its vCPUs.</param>
/// <param name="Of">What <paramref name="Value"/> is a part of, to be shown as a share; 0: it is no part of anything.</param>
public readonly record struct VmStatistic(string Name, long Value, long Of = 0);

/// <summary>Implemented by an <see cref="IVm"/> whose driver counts what it does.</summary>
public interface IVmStatistics
{
    /// <summary>
    /// The counts, in an order for people. Any thread, until the VM is disposed; while vCPUs run, counts may be some
    /// instructions old and need not fit each other.
    /// </summary>
    IReadOnlyList<VmStatistic> ReadStatistics();
}
