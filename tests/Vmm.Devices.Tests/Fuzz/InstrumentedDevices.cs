// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Reflection;
using System.Runtime.InteropServices;
using System.Runtime.Loader;
using SharpFuzz;
using SharpFuzz.Common;

namespace Vmm.Devices.Tests.Fuzz;

/// <summary>
/// Vmm.Devices once more in this process, with a counter at every branch: a copy of the assembly is rewritten by SharpFuzz
/// and loaded, together with a second copy of these tests that is bound to it, beside the ordinary ones. The counters are
/// AFL's: 64 Ki bytes, indexed by the branch and the one before it. One run at a time.
/// </summary>
internal sealed class InstrumentedDevices : IDisposable
{
    private const int MapBytes = 1 << 16;

    private readonly Context _context;
    private readonly string _directory;
    private readonly nint _map = Marshal.AllocHGlobal(MapBytes);
    private readonly byte[] _counters = new byte[MapBytes];
    private readonly byte[] _seen = new byte[MapBytes];

    public InstrumentedDevices()
    {
        _directory = Directory.CreateTempSubdirectory("vmm-fuzz").FullName;
        string devices = Path.Combine(_directory, "Vmm.Devices.dll");
        File.Copy(typeof(Vmm.Devices.Net.E1000).Assembly.Location, devices);
        Fuzzer.Instrument(devices, _ => true, Options.Value);
        Marshal.Copy(_counters, 0, _map, MapBytes);
        typeof(Trace).GetField(nameof(Trace.SharedMem))!.SetValue(null, _map);
        _context = new Context(devices);
        Run = _context.LoadFromAssemblyPath(typeof(FuzzTargets).Assembly.Location)
            .GetType(typeof(FuzzTargets).FullName!, throwOnError: true)!
            .GetMethod(nameof(FuzzTargets.Run))!
            .CreateDelegate<Action<string, byte[]>>();
    }

    /// <summary><see cref="FuzzTargets.Run"/> of the copy.</summary>
    public Action<string, byte[]> Run { get; }

    /// <summary>Pairs of branches that were ever taken.</summary>
    public int Edges => MapBytes - _seen.AsSpan().Count((byte)0);

    /// <summary>Forgets all counts.</summary>
    public void Forget() => Array.Clear(_seen);

    /// <summary>Before an input.</summary>
    public void Clear()
    {
        Array.Clear(_counters);
        Marshal.Copy(_counters, 0, _map, MapBytes);
        Trace.PrevLocation = 0;
    }

    /// <summary>After an input: did it take a pair of branches that no input took, or one more often by a power of two?</summary>
    public bool TryLearn()
    {
        Marshal.Copy(_map, _counters, 0, MapBytes);
        bool isNew = false;
        for (int i = 0; i < MapBytes; i++)
        {
            if (_counters[i] != 0)
            {
                byte bit = (byte)(1 << Math.Min(7, (int)Math.Log2(_counters[i])));
                isNew |= (_seen[i] & bit) == 0;
                _seen[i] |= bit;
            }
        }

        return isNew;
    }

    public void Dispose()
    {
        // The instrumented code may still run on a thread that is ending: its map stays, and so does the context.
        Directory.Delete(_directory, recursive: true);
    }

    // Everything but the two assemblies comes from where the ordinary tests have it, so that types of Vmm.Core are the same.
    private sealed class Context(string devices) : AssemblyLoadContext("instrumented")
    {
        protected override Assembly? Load(AssemblyName assemblyName) => assemblyName.Name switch
        {
            "Vmm.Devices" => LoadFromAssemblyPath(devices),
            "Vmm.Devices.Tests" => LoadFromAssemblyPath(typeof(FuzzTargets).Assembly.Location),
            _ => null,
        };
    }
}
