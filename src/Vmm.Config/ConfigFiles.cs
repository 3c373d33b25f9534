// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Text;

namespace Vmm.Config;

/// <summary>
/// Reads definitions. All methods are pure but for reading the files they are told to read; any thread. Every failure
/// is a <see cref="ConfigException"/> that carries all errors found, each with its place.
/// </summary>
public static class ConfigFiles
{
    /// <summary>Largest file of definitions in bytes.</summary>
    public const int MaxFileBytes = 4 << 20;

    /// <summary>Most definitions in one fleet.</summary>
    public const int MaxMachines = 10_000;

    /// <summary>Reads a file that defines exactly one VM.</summary>
    /// <exception cref="ConfigException">It cannot be read, is wrong, or defines none or several.</exception>
    public static MachineSpec LoadMachine(string path)
    {
        FleetSpec fleet = LoadFile(path);
        if (fleet.Machines.Count == 1)
        {
            return fleet.Machines[0];
        }

        throw ConfigException.Single(
            new SourcePosition(path, 0, 0),
            $"defines {fleet.Machines.Count} VMs where one is needed; name one as {path}#NAME");
    }

    /// <summary>Reads <c>FILE</c> with one VM or <c>FILE#NAME</c> with several, as commands accept it.</summary>
    /// <exception cref="ConfigException">It cannot be read, is wrong, or has no such VM.</exception>
    public static MachineSpec LoadNamed(string reference)
    {
        ArgumentNullException.ThrowIfNull(reference);
        int hash = reference.LastIndexOf('#');
        if (hash < 0 || File.Exists(reference))
        {
            return LoadMachine(reference);
        }

        string path = reference[..hash];
        string name = reference[(hash + 1)..];
        FleetSpec fleet = LoadFile(path);
        var names = new List<string>();
        foreach (MachineSpec machine in fleet.Machines)
        {
            if (string.Equals(machine.Name, name, StringComparison.Ordinal))
            {
                return machine;
            }

            names.Add(machine.Name);
        }

        throw ConfigException.Single(
            new SourcePosition(path, 0, 0),
            $"no VM is called \"{MapReader.Printable(name)}\"{Suggestion.Ending(name, names)}");
    }

    /// <summary>Reads a file of one or several VMs.</summary>
    /// <exception cref="ConfigException">It cannot be read or is wrong.</exception>
    public static FleetSpec LoadFile(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        string text = ReadText(path);
        return Parse(text, path, Path.GetDirectoryName(Path.GetFullPath(path)) ?? "/");
    }

    /// <summary>Reads every <c>*.yaml</c> and <c>*.yml</c> of a directory, in order of name, as one fleet.</summary>
    /// <exception cref="ConfigException">One of them is wrong, or two VMs share a name.</exception>
    public static FleetSpec LoadDirectory(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        var errors = new List<Diagnostic>();
        var machines = new List<MachineSpec>();
        FleetSpec settings = new() { Machines = [] };
        foreach (string file in ListDirectory(path))
        {
            try
            {
                FleetSpec part = ParseUnchecked(ReadText(file), file, Path.GetFullPath(path), null);
                machines.AddRange(part.Machines);
                settings = Combine(settings, part);
            }
            catch (ConfigException wrong)
            {
                errors.AddRange(wrong.Diagnostics);
            }
        }

        if (errors.Count == 0)
        {
            FleetOrder.Check(machines, errors);
        }

        return errors.Count == 0 ? settings with { Machines = machines } : throw new ConfigException(errors);
    }

    /// <summary>The files that <see cref="LoadDirectory"/> reads, in its order.</summary>
    /// <exception cref="ConfigException">The directory cannot be read.</exception>
    public static IReadOnlyList<string> ListDirectory(string path)
    {
        try
        {
            var files = new List<string>();
            foreach (string file in Directory.EnumerateFiles(path))
            {
                string name = Path.GetFileName(file);
                bool isYaml = name.EndsWith(".yaml", StringComparison.Ordinal) || name.EndsWith(".yml", StringComparison.Ordinal);
                if (isYaml && name[0] != '.')
                {
                    files.Add(file);
                }
            }

            files.Sort(StringComparer.Ordinal);
            return files;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw Unreadable(path, failure);
        }
    }

    /// <summary>Reads definitions from text.</summary>
    /// <param name="text">YAML.</param>
    /// <param name="file">Name for error messages.</param>
    /// <param name="baseDirectory">What relative paths are relative to.</param>
    /// <exception cref="ConfigException">They are wrong.</exception>
    public static FleetSpec Parse(string text, string file, string baseDirectory)
    {
        FleetSpec fleet = ParseUnchecked(text, file, baseDirectory, null);
        var errors = new List<Diagnostic>();
        FleetOrder.Check(fleet.Machines, errors);
        return errors.Count == 0 ? fleet : throw new ConfigException(errors);
    }

    internal static FleetSpec ParseUnchecked(string text, string file, string baseDirectory, SortedSet<string>? catalog)
    {
        ArgumentNullException.ThrowIfNull(text);
        var errors = new List<Diagnostic>();
        var machines = new List<MachineSpec>();
        FleetSpec settings = new() { Machines = [] };
        foreach (YamlNode document in YamlTree.Load(text, file))
        {
            if (document.IsNull)
            {
                continue;
            }

            if (document.Kind != YamlKind.Mapping)
            {
                errors.Add(new Diagnostic(document.At, "a definition is a set of keys, beginning with \"name:\""));
                continue;
            }

            if (document.Entries.Exists(entry => entry.Key.Text is "vms"))
            {
                settings = Combine(settings, FleetParser.Parse(document, baseDirectory, errors, machines, catalog));
            }
            else
            {
                machines.Add(MachineParser.Parse(new ParseContext(baseDirectory, errors, catalog), document));
            }

            if (machines.Count > MaxMachines)
            {
                errors.Add(new Diagnostic(document.At, $"more than {MaxMachines} VMs"));
                break;
            }
        }

        if (machines.Count == 0 && errors.Count == 0)
        {
            errors.Add(new Diagnostic(new SourcePosition(file, 1, 1), "defines no VM"));
        }

        return errors.Count == 0 ? settings with { Machines = machines } : throw new ConfigException(errors);
    }

    internal static ConfigException Unreadable(string path, Exception failure)
    {
        string why = failure switch
        {
            FileNotFoundException or DirectoryNotFoundException => "no such file or directory",
            UnauthorizedAccessException when Directory.Exists(path) => "is a directory, not a file",
            UnauthorizedAccessException => "permission denied",
            _ => failure.Message.ReplaceLineEndings(" "),
        };
        return ConfigException.Single(new SourcePosition(path, 0, 0), why, ConfigFailure.NoInput);
    }

    private static FleetSpec Combine(FleetSpec a, FleetSpec b)
    {
        var plain = new FleetSpec { Machines = [] };
        return a with
        {
            StartParallel = b.StartParallel ?? a.StartParallel,
            StartDelay = b.StartDelay != plain.StartDelay ? b.StartDelay : a.StartDelay,
            StopTimeout = b.StopTimeout != plain.StopTimeout ? b.StopTimeout : a.StopTimeout,
        };
    }

    private static string ReadText(string path)
    {
        byte[] bytes;
        try
        {
            using var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, 1);
            using var copy = new MemoryStream();
            var buffer = new byte[16_384];
            int count;
            while ((count = stream.Read(buffer)) > 0)
            {
                copy.Write(buffer, 0, count);
                if (copy.Length > MaxFileBytes)
                {
                    throw ConfigException.Single(new SourcePosition(path, 0, 0), $"is larger than {MaxFileBytes >> 20} MiB");
                }
            }

            bytes = copy.ToArray();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or ArgumentException or NotSupportedException)
        {
            throw Unreadable(path, failure);
        }

        try
        {
            var strict = new UTF8Encoding(false, throwOnInvalidBytes: true);
            ReadOnlySpan<byte> text = bytes;
            return strict.GetString(text.StartsWith("\uFEFF"u8) ? text[3..] : text);
        }
        catch (DecoderFallbackException)
        {
            throw ConfigException.Single(new SourcePosition(path, 0, 0), "is not UTF-8 text");
        }
    }
}

/// <summary>Reads the mapping of a fleet file: <c>vms:</c> and how they start and stop.</summary>
internal static class FleetParser
{
    internal static FleetSpec Parse(
        YamlNode document, string baseDirectory, List<Diagnostic> errors, List<MachineSpec> machines, SortedSet<string>? catalog)
    {
        var context = new ParseContext(baseDirectory, errors, catalog is null ? null : []);
        var map = new MapReader(context, document, string.Empty);
        foreach ((YamlNode item, _) in map.List("vms", ConfigFiles.MaxMachines))
        {
            if (item.Kind == YamlKind.Mapping)
            {
                machines.Add(MachineParser.Parse(new ParseContext(baseDirectory, errors, catalog), item));
            }
            else
            {
                context.Error(item.At, "\"vms\" takes a list of definitions, each beginning with \"name:\"");
            }
        }

        int? parallel = null;
        TimeSpan delay = TimeSpan.Zero;
        if (map.Map("start", "{parallel: 2, delay: 1s}") is { } start)
        {
            int given = (int)start.Integer("parallel", -1, 0, 1000);
            parallel = given < 0 ? null : given;
            delay = start.Duration("delay", TimeSpan.Zero);
            start.Finish();
        }

        TimeSpan stop = map.Duration("stop-timeout", TimeSpan.FromMinutes(3));
        map.Take("shared");
        map.Finish();
        foreach (string key in context.Catalog ?? [])
        {
            catalog!.Add("fleet:" + key);
        }

        return new FleetSpec { Machines = [], StartParallel = parallel, StartDelay = delay, StopTimeout = stop };
    }
}
