// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using System.Text.RegularExpressions;
using FluentAssertions;
using Xunit;

namespace Vmm.House.Tests;

/// <summary>Rules for every source file that a compiler does not check.</summary>
public sealed class SourceTests
{
    private const int MaxBinaryBytes = 64 << 10;
    private const int MaxColumns = 160;

    private static readonly string[] s_licensed = [".cs", ".c", ".h", ".S", ".d"];

    [Fact]
    public void Sources_BeginWithTheirLicence()
    {
        IEnumerable<string> offenders = Repository.Files
            .Where(file => s_licensed.Contains(Path.GetExtension(file), StringComparer.Ordinal))
            .Where(file => !FirstLine(file).Contains("SPDX-License-Identifier: ", StringComparison.Ordinal));

        offenders.Should().BeEmpty();
    }

    [Fact]
    public void Sources_OfCSharp_AreUnderTheHousesLicence()
    {
        IEnumerable<string> offenders = Repository.Files.Where(file => file.EndsWith(".cs", StringComparison.Ordinal))
            .Where(file => FirstLine(file) is not "// SPDX-License-Identifier: BSD-2-Clause");

        offenders.Should().BeEmpty();
    }

    [Fact]
    public void Sources_KeepToTheWidthOfThePage()
    {
        var offenders = new List<string>();
        foreach (string file in Repository.Files.Where(file => file.EndsWith(".cs", StringComparison.Ordinal) && !IsGenerated(file)))
        {
            string[] lines = File.ReadAllLines(Repository.Full(file));
            offenders.AddRange(Enumerable.Range(0, lines.Length).Where(i => lines[i].Length > MaxColumns).Select(i => $"{file}:{i + 1}"));
        }

        offenders.Should().BeEmpty();
    }

    [Fact]
    public void Binaries_AreSmall()
    {
        IEnumerable<string> offenders = Repository.Files.Where(file =>
        {
            var info = new FileInfo(Repository.Full(file));
            return info.LinkTarget is null && info.Length > MaxBinaryBytes && IsBinary(info);
        });

        offenders.Should().BeEmpty();
    }

    // A pointer that is pinned, made from a number, or allocated has an owner and a bound; the comment names them.
    [Fact]
    public void PointersThatAreMade_HaveASafetyComment()
    {
        var make = new Regex(@"\bfixed \(|\(\w+\*+\)[(a-z_0-9]|\bNativeMemory\.", RegexOptions.CultureInvariant, TimeSpan.FromSeconds(5));
        List<string> bare = Repository.Files
            .Where(file => file.StartsWith("src/", StringComparison.Ordinal) && file.EndsWith(".cs", StringComparison.Ordinal))
            .Where(file => Code(file).Any(line => make.IsMatch(line)))
            .Where(file => !Repository.Read(file).Contains("// SAFETY:", StringComparison.Ordinal))
            .ToList();
        List<string> debt = File.ReadAllLines(Repository.Full("tests/Vmm.House.Tests/safety-debt.txt"))
            .Where(line => line.Length > 0 && line[0] != '#').ToList();

        bare.Except(debt, StringComparer.Ordinal).Should().BeEmpty("new pointer code says why it is safe");
        debt.Except(bare, StringComparer.Ordinal).Should().BeEmpty("what is paid is struck off safety-debt.txt");
    }

    // The native program binds "libc" when it is linked, so what Linux's C library lacks must be imported by its file's name.
    [GnuLibraryFact]
    public void Imports_FromLibc_AreWhatLinuxHas()
    {
        var import = new Regex(
            @"\[LibraryImport\(""libc""(?<more>[^\]]*)\]\s*[\w ]*?\b(?<name>\w+)\(", RegexOptions.ExplicitCapture, TimeSpan.FromSeconds(5));
        nint library = NativeLibrary.Load(GnuLibraryFactAttribute.Name);
        var missing = new List<string>();
        int count = 0;
        foreach (string file in Repository.Files.Where(file => file.EndsWith(".cs", StringComparison.Ordinal)))
        {
            foreach (Match match in import.Matches(Repository.Read(file)))
            {
                Match entry = Regex.Match(match.Groups["more"].Value, @"EntryPoint = ""(?<entry>\w+)""", RegexOptions.None, TimeSpan.FromSeconds(5));
                string name = entry.Success ? entry.Groups["entry"].Value : match.Groups["name"].Value;
                count++;
                if (!NativeLibrary.TryGetExport(library, name, out _))
                {
                    missing.Add($"{file}: {name}");
                }
            }
        }

        count.Should().BeGreaterThan(50, "the pattern finds them");
        missing.Should().BeEmpty();
    }

    [Fact]
    public void Files_NameNoMachineOfTheirMaking()
    {
        // Written in halves so that this file passes its own test.
        string[] banned = ["/wo" + "rk/", "/root" + "/.", "/home" + "/user"];
        IEnumerable<string> offenders = Repository.Files
            .Where(file => !IsBinary(new FileInfo(Repository.Full(file))))
            .Where(file => banned.Any(word => Repository.Read(file).Contains(word, StringComparison.Ordinal)));

        offenders.Should().BeEmpty();
    }

    [Fact]
    public void Todos_CarryTheNumberOfAnIssue()
    {
        var bare = new Regex(@"//.*\b(TODO|FIXME|XXX)\b(?!.*#\d)", RegexOptions.ExplicitCapture, TimeSpan.FromSeconds(5));
        IEnumerable<string> offenders = Repository.Files
            .Where(file => file.EndsWith(".cs", StringComparison.Ordinal) && !file.EndsWith("SourceTests.cs", StringComparison.Ordinal))
            .Where(file => bare.IsMatch(Repository.Read(file)));

        offenders.Should().BeEmpty();
    }

    private static IEnumerable<string> Code(string file) => File.ReadLines(Repository.Full(file))
        .Where(line => !line.TrimStart().StartsWith("//", StringComparison.Ordinal));

    private static string FirstLine(string file) => File.ReadLines(Repository.Full(file)).FirstOrDefault() ?? string.Empty;

    private static bool IsGenerated(string file) => file.EndsWith(".g.cs", StringComparison.Ordinal);

    private static bool IsBinary(FileInfo file)
    {
        using FileStream stream = file.OpenRead();
        var head = new byte[8192];
        int count = stream.ReadAtLeast(head, head.Length, throwOnEndOfStream: false);
        return head.AsSpan(0, count).Contains((byte)0);
    }

    /// <summary>A test that reads Linux's C library; skipped, with the reason, where that is not installed.</summary>
    [AttributeUsage(AttributeTargets.Method)]
    private sealed class GnuLibraryFactAttribute : FactAttribute
    {
        internal const string Name = "libc.so.6";

        public GnuLibraryFactAttribute() => Skip = NativeLibrary.TryLoad(Name, out _) ? null : $"there is no {Name} here";
    }
}

/// <summary>What README tells people to type is there.</summary>
public sealed class ReadmeTests
{
    [Fact]
    public void Commands_OfMake_AreTargets()
    {
        HashSet<string> targets = Targets();
        List<string> named = Matches(@"^\s*(\$ )?make (?<word>[a-z][a-z0-9-]*)\b|`make (?<word>[a-z][a-z0-9-]*)").Distinct(StringComparer.Ordinal).ToList();

        named.Should().NotBeEmpty();
        named.Except(targets, StringComparer.Ordinal).Should().BeEmpty();
    }

    [Fact]
    public void Files_ThatAreLinked_Exist()
    {
        IEnumerable<string> links = Matches(@"\]\((?<word>[A-Za-z0-9_./-]+)\)");

        links.Where(link => !File.Exists(Repository.Full(link)) && !Directory.Exists(Repository.Full(link))).Should().BeEmpty();
    }

    [Fact]
    public void Makefile_DeclaresEveryTargetPhony()
    {
        string makefile = Repository.Read("Makefile");
        const RegexOptions Options = RegexOptions.Multiline | RegexOptions.ExplicitCapture;
        Match phony = Regex.Match(makefile, @"^\.PHONY:(?<names>([^\n\\]|\\\n)*)", Options, TimeSpan.FromSeconds(5));
        string[] declared = phony.Groups["names"].Value.Replace("\\\n", " ", StringComparison.Ordinal)
            .Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries);

        Targets().Should().BeEquivalentTo(declared);
    }

    private static HashSet<string> Targets()
    {
        var targets = new HashSet<string>(StringComparer.Ordinal);
        MatchCollection lines = Regex.Matches(
            Repository.Read("Makefile"), @"^(?<names>[a-z][a-z0-9 -]*):(?!=)", RegexOptions.Multiline | RegexOptions.ExplicitCapture, TimeSpan.FromSeconds(5));
        foreach (Match line in lines)
        {
            targets.UnionWith(line.Groups["names"].Value.Split(' ', StringSplitOptions.RemoveEmptyEntries));
        }

        return targets;
    }

    private static List<string> Matches(string pattern)
    {
        const RegexOptions Options = RegexOptions.ExplicitCapture | RegexOptions.Multiline;
        return Regex.Matches(Repository.Read("README.md"), pattern, Options, TimeSpan.FromSeconds(5))
            .Select(match => match.Groups["word"].Value).ToList();
    }
}
