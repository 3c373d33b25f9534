// SPDX-License-Identifier: BSD-2-Clause
using System;
using Xunit;

namespace Vmm.Kvm.Tests;

/// <summary>Why tests that need a working KVM cannot run here; null when they can.</summary>
internal static class KvmHost
{
    internal static string? WhyNot { get; } = FindOut();

    private static string? FindOut()
    {
        KvmDiagnosis diagnosis = KvmProbe.Diagnose();
        return diagnosis.IsUsable ? null : diagnosis.Summary;
    }
}

/// <summary>A test that needs a working KVM; reported as skipped, with the reason, where there is none.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class KvmFactAttribute : FactAttribute
{
    public KvmFactAttribute() => Skip = KvmHost.WhyNot;
}

/// <summary>A theory that needs a working KVM.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class KvmTheoryAttribute : TheoryAttribute
{
    public KvmTheoryAttribute() => Skip = KvmHost.WhyNot;
}
