// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Reflection;
using FluentAssertions;
using Vmm.TestKit;

namespace Vmm.Host.Tests;

/// <summary>OsAbi against the running system's own headers, by way of a compiled C program.</summary>
public sealed class OsAbiTests
{
    // What no header says: which system it is, what the program makes of it, and the kernel's side of KVM.
    private static readonly string[] s_own =
        [nameof(OsAbi.System), nameof(OsAbi.HasMemfd), nameof(OsAbi.KernelSignalSetBytes), nameof(OsAbi.IoctlTunnelRequest)];

    [CompilerFact("termios.h")]
    public void Current_EveryNumber_EqualsTheHeaders()
    {
        SortedDictionary<string, ulong> headers = CProgram.CompileAndRun("os_abi.c");
        var declared = new SortedDictionary<string, ulong>(StringComparer.Ordinal);
        Add(declared, "", OsAbi.Current);
        foreach (string line in headers.Keys.Where(key => key.StartsWith("errno ", StringComparison.Ordinal)))
        {
            string name = OsAbi.Current.ToErrno((int)headers[line]).ToString();
            declared[$"errno {name}"] = headers[line];
        }

        headers.Keys.Count(key => key.StartsWith("errno ", StringComparison.Ordinal))
            .Should().Be(Enum.GetNames<Errno>().Length - 2, "every named error but None and Other is compared");
        declared.Should().Equal(headers);
    }

    private static void Add(SortedDictionary<string, ulong> into, string prefix, object abi)
    {
        foreach (PropertyInfo property in abi.GetType().GetProperties(BindingFlags.Instance | BindingFlags.Public))
        {
            object value = property.GetValue(abi)!;
            if (value is FileLockAbi or TermiosAbi)
            {
                Add(into, $"{property.Name}.", value);
            }
            else if (!s_own.Contains(property.Name, StringComparer.Ordinal))
            {
                into[$"number {prefix}{property.Name}"] = Convert.ToUInt64(value, CultureInfo.InvariantCulture);
            }
        }
    }
}
