// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;

namespace Vmm.Config;

/// <summary>Start order of a fleet from <c>after:</c> and <c>requires:</c>. Pure functions; any thread.</summary>
public static class FleetOrder
{
    /// <summary>The machines so that each stands behind everything it waits for; file order where that leaves a choice.</summary>
    /// <exception cref="ConfigException">A name is unknown or given twice, or the waits form a circle.</exception>
    public static IReadOnlyList<MachineSpec> Sort(IReadOnlyList<MachineSpec> machines)
    {
        ArgumentNullException.ThrowIfNull(machines);
        var errors = new List<Diagnostic>();
        List<MachineSpec> sorted = Check(machines, errors);
        return errors.Count == 0 ? sorted : throw new ConfigException(errors);
    }

    internal static List<MachineSpec> Check(IReadOnlyList<MachineSpec> machines, List<Diagnostic> errors)
    {
        var byName = new Dictionary<string, MachineSpec>(machines.Count, StringComparer.Ordinal);
        foreach (MachineSpec machine in machines)
        {
            if (!byName.TryAdd(machine.Name, machine))
            {
                errors.Add(new Diagnostic(
                    machine.Source.Find("name"),
                    $"a VM called \"{machine.Name}\" is already defined at {byName[machine.Name].Source.Find("name")}"));
            }
        }

        // A definition on its own may wait for VMs that other files define: judged only where a set is given.
        if (machines.Count > 1)
        {
            foreach (MachineSpec machine in machines)
            {
                CheckNames(machine, "after", machine.After, byName, errors);
                CheckNames(machine, "requires", machine.Requires, byName, errors);
            }
        }

        var sorted = new List<MachineSpec>(machines.Count);
        var state = new Dictionary<string, bool>(StringComparer.Ordinal);
        foreach (MachineSpec machine in machines)
        {
            Visit(machine, byName, state, sorted, errors);
        }

        return sorted;
    }

    private static void CheckNames(
        MachineSpec machine, string key, IReadOnlyList<string> names, Dictionary<string, MachineSpec> known, List<Diagnostic> errors)
    {
        for (int i = 0; i < names.Count; i++)
        {
            if (!known.ContainsKey(names[i]))
            {
                errors.Add(new Diagnostic(
                    machine.Source.Find($"{key}[{i}]"),
                    $"\"{key}\" names \"{names[i]}\", which is not defined{Suggestion.Ending(names[i], known.Keys)}"));
            }
        }
    }

    // Depth-first with an explicit stack: a chain of thousands of VMs must not exhaust the thread's.
    private static void Visit(
        MachineSpec root,
        Dictionary<string, MachineSpec> byName,
        Dictionary<string, bool> done,
        List<MachineSpec> sorted,
        List<Diagnostic> errors)
    {
        if (done.ContainsKey(root.Name))
        {
            return;
        }

        var stack = new List<(MachineSpec Machine, int Next)> { (root, 0) };
        done[root.Name] = false;
        while (stack.Count > 0)
        {
            (MachineSpec machine, int next) = stack[^1];
            int waits = machine.After.Count + machine.Requires.Count;
            if (next == waits)
            {
                done[machine.Name] = true;
                sorted.Add(machine);
                stack.RemoveAt(stack.Count - 1);
                continue;
            }

            stack[^1] = (machine, next + 1);
            string name = next < machine.After.Count ? machine.After[next] : machine.Requires[next - machine.After.Count];
            if (!byName.TryGetValue(name, out MachineSpec? other))
            {
                continue;
            }

            if (!done.TryGetValue(name, out bool finished))
            {
                done[name] = false;
                stack.Add((other, 0));
            }
            else if (!finished)
            {
                int from = stack.FindIndex(entry => string.Equals(entry.Machine.Name, name, StringComparison.Ordinal));
                var circle = new List<string>();
                for (int i = from; i < stack.Count; i++)
                {
                    circle.Add(stack[i].Machine.Name);
                }

                circle.Add(name);
                string key = next < machine.After.Count ? "after" : "requires";
                errors.Add(new Diagnostic(machine.Source.Find(key), "VMs wait for each other: " + string.Join(" -> ", circle)));
                return;
            }
        }
    }
}
