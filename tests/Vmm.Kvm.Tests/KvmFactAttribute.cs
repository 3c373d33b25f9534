// SPDX-License-Identifier: BSD-2-Clause
using System;
using Xunit;

namespace Vmm.Kvm.Tests;

/// <summary>Why tests that need a working KVM cannot run here; null when they can.</summary>
internal static class KvmHost
{
    internal static string? WhyNot { get; } = FindOut();

    internal static string? WhyNoReadOnlyMemory { get; } = Lacks(
        static system => system.Capabilities.ReadOnlyMemory, "this KVM has no read-only memory (KVM_CAP_READONLY_MEM)");

    internal static string? WhyNoDoorbells { get; } = Lacks(
        static system => system.Probed.IoEventFd, "this KVM signals no descriptors (KVM_CAP_IOEVENTFD)");

    private static string? Lacks(Func<KvmSystem, bool> has, string what)
    {
        if (WhyNot is not null)
        {
            return WhyNot;
        }

        using KvmSystem system = KvmSystem.Open(measureSpeed: false);
        return has(system) ? null : what;
    }

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

/// <summary>A test that needs memory which the guest cannot write.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class KvmReadOnlyMemoryFactAttribute : FactAttribute
{
    public KvmReadOnlyMemoryFactAttribute() => Skip = KvmHost.WhyNoReadOnlyMemory;
}

/// <summary>A test that needs accesses that signal a descriptor.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class KvmDoorbellFactAttribute : FactAttribute
{
    public KvmDoorbellFactAttribute() => Skip = KvmHost.WhyNoDoorbells;
}

/// <summary>A theory that needs a working KVM.</summary>
[AttributeUsage(AttributeTargets.Method)]
public sealed class KvmTheoryAttribute : TheoryAttribute
{
    public KvmTheoryAttribute() => Skip = KvmHost.WhyNot;
}
