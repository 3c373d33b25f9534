// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Reflection;
using Xunit;

namespace Vmm.Kvm.Tests;

/// <summary>
/// Runs the tests of this assembly that need a KVM without a test host and prints TAP. The test hosts (tests/hosts) run
/// it inside small machines that have VMX or SVM but no room for a test runner: <c>dotnet Vmm.Kvm.Tests.dll [NAME]</c>.
/// </summary>
internal static class TapProgram
{
    private static int Main(string[] arguments)
    {
        if (KvmHost.WhyNot is { } reason)
        {
            Console.WriteLine($"not ok - kvm: {reason}");
            return 1;
        }

        int number = 0;
        int failures = 0;
        foreach ((MethodInfo method, object?[] values) in Cases())
        {
            string name = $"{method.Name}{(values.Length > 0 ? $"({string.Join(", ", values)})" : string.Empty)}";
            if (arguments.Length > 0 && !name.Contains(arguments[0], StringComparison.Ordinal))
            {
                continue;
            }

            string outcome = "ok";
            try
            {
                object? target = Activator.CreateInstance(method.DeclaringType!);
                method.Invoke(target, values);
                (target as IDisposable)?.Dispose();
            }
            catch (TargetInvocationException exception)
            {
                outcome = "not ok";
                failures++;
                string message = exception.InnerException!.Message.ReplaceLineEndings(" ");
                Console.WriteLine($"# {message[..Math.Min(message.Length, 500)]}");
            }

            Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{outcome} {++number} - {name}"));
        }

        return failures == 0 ? 0 : 1;
    }

    private static IEnumerable<(MethodInfo Method, object?[] Values)> Cases()
    {
        foreach (MethodInfo method in typeof(TapProgram).Assembly.GetTypes().SelectMany(type => type.GetMethods()))
        {
            if (method.GetCustomAttribute<KvmFactAttribute>() is not null)
            {
                yield return (method, []);
            }
            else if (method.GetCustomAttribute<KvmTheoryAttribute>() is not null)
            {
                foreach (InlineDataAttribute data in method.GetCustomAttributes<InlineDataAttribute>())
                {
                    yield return (method, data.GetData(method).Single());
                }
            }
        }
    }
}
