// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using FluentAssertions;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Host.Tests;

/// <summary>
/// The calls that only FreeBSD and illumos have, made to a small library of C in their place (tests/abi/other_systems.c): that
/// they are the right ones with the right arguments. Where one of these systems is, SandboxTests runs the real ones.
/// </summary>
public sealed unsafe class OtherSystemsTests
{
    private static readonly Lazy<nint> s_library = new(() => Build());

    [CompilerFact("stdio.h")]
    public void GiveUp_OnFreeBsd_TakesNoNewPrivilegesAndIsNotTraced()
    {
        Clear();
        HostProcess.TryGiveUpProcesses(HostSystem.FreeBsd).Should().BeTrue();
        Record().Should().Be("no new privileges;not traced;");
    }

    [CompilerFact("stdio.h")]
    public void GiveUp_OnIllumos_LeavesBasicWithoutOtherProcesses()
    {
        const string Left = "basic,!proc_exec,!proc_fork,!proc_info,!proc_session,!file_link_any";
        Clear();
        HostProcess.TryGiveUpProcesses(HostSystem.Illumos).Should().BeTrue();
        Record().Should().Be($"Permitted={Left};Limit={Left};");
    }

    [CompilerTheory("stdio.h")]
    [InlineData(HostSystem.FreeBsd, 1, true, "thread on 0x2;")]
    [InlineData(HostSystem.FreeBsd, 5, false, "thread on 0x20;")]
    [InlineData(HostSystem.FreeBsd, 1000, false, "")]
    [InlineData(HostSystem.Illumos, 1, true, "lwp on 1;")]
    [InlineData(HostSystem.Illumos, 5, false, "lwp on 5;")]
    public void Pin_AsksForTheProcessor(HostSystem system, int processor, bool isThere, string asked)
    {
        Clear();
        HostProcess.TryPinThread(processor, system).Should().Be(isThere);
        Record().Should().Be(asked);
    }

    private static void Clear() =>
        ((delegate* unmanaged<void>)NativeLibrary.GetExport(s_library.Value, "other_systems_clear"))();

    private static string? Record() => Marshal.PtrToStringUTF8(
        ((delegate* unmanaged<nint>)NativeLibrary.GetExport(s_library.Value, "other_systems_record"))());

    private static nint Build([CallerFilePath] string here = "")
    {
        string source = Path.Combine(Path.GetDirectoryName(here)!, "..", "abi", "other_systems.c");
        string directory = Directory.CreateTempSubdirectory("vmm-other-").FullName;
        string file = Path.Combine(directory, "other_systems.so");
        CProgram.Execute("cc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", file, source);
        nint library = NativeLibrary.Load(file);
        Directory.Delete(directory, recursive: true);
        NativeLibrary.SetDllImportResolver(
            typeof(HostProcess).Assembly, (name, _, _) => name is "libc.so.7" or "libc.so.1" ? library : 0);
        return library;
    }
}
