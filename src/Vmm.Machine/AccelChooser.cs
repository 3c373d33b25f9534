// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Core;
using Vmm.Host;
using Vmm.Kvm;
using Vmm.X86;

namespace Vmm.Machine;

/// <summary>No driver of those that were asked for can be used (exit status 69). One line says why for each.</summary>
public sealed class NoDriverException : Exception
{
    /// <summary>Makes one.</summary>
    public NoDriverException(string message)
        : base(message)
    {
    }
}

/// <summary>A driver and why it was taken.</summary>
/// <param name="Hypervisor">The driver; the caller owns it.</param>
/// <param name="Reason">One line for people.</param>
public sealed record AccelChoice(IHypervisor Hypervisor, string Reason);

/// <summary>Chooses the driver of virtual processors for a definition's <c>accel:</c>.</summary>
public static class AccelChooser
{
    /// <summary>Tries the names in order; "auto" prefers a fast /dev/kvm, then the software CPU.</summary>
    /// <exception cref="NoDriverException">None works.</exception>
    public static AccelChoice Choose(IReadOnlyList<string> accel)
    {
        ArgumentNullException.ThrowIfNull(accel);
        var failures = new List<string>();
        foreach (string name in accel)
        {
            AccelChoice? choice = name switch
            {
                "kvm" => TryKvm(failures, mustBeFast: false),
                "soft" => OpenSoft("the software CPU, as asked"),
                "auto" => Auto(failures),
                _ => null,
            };
            if (choice is not null)
            {
                return choice;
            }
        }

        throw new NoDriverException($"no driver usable: {string.Join("; ", failures)}; see `vmctl doctor`");
    }

    private static AccelChoice Auto(List<string> failures)
    {
        if (TryKvm(failures, mustBeFast: true) is { } kvm)
        {
            return kvm;
        }

        return OpenSoft($"the software CPU, because {string.Join("; ", failures)}");
    }

    private static AccelChoice? TryKvm(List<string> failures, bool mustBeFast)
    {
        try
        {
            KvmSystem kvm = KvmSystem.Open(measureSpeed: mustBeFast);
            if (mustBeFast && !kvm.Capabilities.FastKernelCode)
            {
                kvm.Dispose();
                failures.Add("/dev/kvm emulates guest kernel code here (no VMX or SVM behind it)");
                return null;
            }

            return new AccelChoice(kvm, "/dev/kvm");
        }
        catch (HypervisorException e)
        {
            failures.Add(e.Message);
            return null;
        }
    }

    private static AccelChoice OpenSoft(string why)
    {
        CodeMemory? code = CodeMemory.TryCreate(SoftHypervisor.CodeMemoryBytes, out string? refusal);
        var soft = new SoftHypervisor(code, refusal);
        return new AccelChoice(soft, soft.Restriction is null ? why : $"{why} ({soft.Restriction})");
    }
}
