// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Reflection;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using FluentAssertions;
using Vmm.Kvm.Abi;
using Vmm.TestKit;

namespace Vmm.Kvm.Tests;

/// <summary>C# declarations against the system's own header, by way of a compiled C program.</summary>
public sealed class KvmAbiTests
{
    [CompilerFact("linux/kvm.h", "linux-libc-dev")]
    public void Declarations_EverySizeOffsetAndNumber_EqualsTheHeader()
    {
        SortedDictionary<string, ulong> expected = CProgram.CompileAndRun("kvm_abi.c");
        var actual = new SortedDictionary<string, ulong>(StringComparer.Ordinal);
        foreach (Type type in typeof(KvmAbi).Assembly.GetTypes().Where(t => string.Equals(t.Namespace, "Vmm.Kvm.Abi", StringComparison.Ordinal)))
        {
            if (type.IsValueType && !type.IsNested && !IsPart(type))
            {
                actual[$"size {type.Name}"] = (ulong)SizeOf(type);
                AddOffsets(actual, type, type.Name, 0);
            }
        }

        foreach (FieldInfo field in typeof(KvmAbi).GetFields(BindingFlags.Static | BindingFlags.NonPublic))
        {
            if (field.Name.StartsWith("KVM_", StringComparison.Ordinal))
            {
                actual[$"number {field.Name}"] = Convert.ToUInt64(field.GetRawConstantValue(), CultureInfo.InvariantCulture);
            }
        }

        actual.Count.Should().BeGreaterThan(300);
        actual.Should().Equal(expected);
    }

    // Members of unions and anonymous structures have C# types of their own that C has no name for.
    private static bool IsPart(Type type) =>
        type.Name.StartsWith("kvm_run_", StringComparison.Ordinal)
        || type.Name.StartsWith("kvm_vcpu_events_", StringComparison.Ordinal);

    private static void AddOffsets(SortedDictionary<string, ulong> into, Type type, string path, ulong at)
    {
        foreach (FieldInfo field in type.GetFields(BindingFlags.Instance | BindingFlags.NonPublic | BindingFlags.Public))
        {
            ulong offset = at + (ulong)Marshal.OffsetOf(type, field.Name);
            string name = $"{path}.{field.Name}";
            into[$"offset {name}"] = offset;
            if (IsPart(field.FieldType))
            {
                AddOffsets(into, field.FieldType, name, offset);
            }
        }
    }

    private static int SizeOf(Type type) => (int)typeof(Unsafe).GetMethod(nameof(Unsafe.SizeOf))!
        .MakeGenericMethod(type).Invoke(null, null)!;
}
