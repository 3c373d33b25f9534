// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text.RegularExpressions;
using FluentAssertions;
using Vmm.Host.Sandbox;
using Vmm.TestKit;
using Xunit;

namespace Vmm.Host.Tests;

/// <summary>Sandboxes from inside: what must fail, fails; what must work, works. See <see cref="SandboxProbe"/>.</summary>
public sealed class SandboxTests : IDisposable
{
    private const string Header = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h";

    private const int KilledBySystemCall = 128 + 31;

    private readonly string _directory = Directory.CreateTempSubdirectory("vmm-sandbox-").FullName;

    public void Dispose() => Directory.Delete(_directory, recursive: true);

    // What the Linuxulator answers (EINVAL), and a kernel without the call (ENOSYS), in words that say what it means.
    [LinuxTheory]
    [InlineData(22, "this kernel has no seccomp filters (FreeBSD's Linuxulator has none)")]
    [InlineData(38, "this kernel has no seccomp filters (FreeBSD's Linuxulator has none)")]
    [InlineData(13, "seccomp: Permission denied")]
    public void Filter_Refused_SaysWhatIsMissing(int rawErrno, string words) =>
        SystemCallFilter.Explain(rawErrno).Should().Be(words);

    // A small interpreter of the BPF that we write, run over every number: the list is the filter, and nothing else is.
    [Fact]
    public void Filter_EveryNumber_HasItsVerdict()
    {
        BpfInstruction[] code = SystemCallFilter.Assemble(ownProcess: 77);
        Dictionary<uint, string> names = SystemCallFilter.Known.ToDictionary(call => call.Number, call => call.Name);
        names.Should().HaveCount(SystemCallFilter.Known.Count, "no number stands twice");
        for (uint number = 0; number < 1000; number++)
        {
            uint verdict = Judge(code, number);
            if (!names.ContainsKey(number))
            {
                verdict.Should().Be(0x00050001, "{0} is unknown", number);
            }
        }

        Judge(code, 0).Should().Be(0x7FFF0000, "read");
        Judge(code, 59).Should().Be(0x80000000, "execve");
        Judge(code, 435).Should().Be(0x00050026, "clone3");
        Judge(code, 0x4000_0000).Should().Be(0x80000000, "x32");
        Judge(code, 0, arch: 0x40000003).Should().Be(0x80000000, "i386");
        Judge(code, 16, second: 0xAE80).Should().Be(0x7FFF0000, "KVM_RUN");
        Judge(code, 16, second: 0x5401).Should().Be(0x7FFF0000, "TCGETS");
        Judge(code, 16, second: 0x5412).Should().Be(0x00050001, "TIOCSTI");
        Judge(code, 56, first: 0x3D0F00).Should().Be(0x7FFF0000, "a thread");
        Judge(code, 56, first: 0x1200011).Should().Be(0x00050001, "a process");
        Judge(code, 62, first: 77).Should().Be(0x7FFF0000, "a signal to oneself");
        Judge(code, 62, first: 1).Should().Be(0x00050001, "a signal to another");
        Judge(code, 41, first: 2).Should().Be(0x7FFF0000, "AF_INET");
        Judge(code, 41, first: 16).Should().Be(0x00050001, "AF_NETLINK");
        Judge(code, 302, third: 0).Should().Be(0x7FFF0000, "limits are read");
        Judge(code, 302, third: 0x7FFF_0000_0000).Should().Be(0x00050001, "limits are set");
    }

    [LinuxFact(Header)]
    public void Numbers_AgreeWithTheSystemsHeader()
    {
        var define = new Regex(@"^#define __NR_(?<name>\w+) (?<number>\d+)$", RegexOptions.ExplicitCapture, TimeSpan.FromSeconds(1));
        Dictionary<string, uint> header = File.ReadLines(Header).Select(line => define.Match(line)).Where(match => match.Success)
            .ToDictionary(match => match.Groups["name"].Value, match => uint.Parse(match.Groups["number"].Value, CultureInfo.InvariantCulture));

        foreach ((string name, uint number) in SystemCallFilter.Known)
        {
            header.Should().Contain(name, number);
        }
    }

    [Theory]
    [InlineData("nothing")]
    [InlineData("threads")]
    [InlineData("files")]
    [InlineData("sockets")]
    [InlineData("names")]
    [InlineData("code")]
    [InlineData("collect")]
    public void Calls_ThatAVmNeeds_Work(string what)
    {
        Probe(out int status, "calls", what).Should().Be("works");
        status.Should().Be(0);
    }

    [LinuxFact("/dev/kvm")]
    public void Calls_OfKvm_Work()
    {
        Probe(out _, "calls", "kvm").Should().Be("works");
    }

    [Theory]
    [InlineData("execve")]
    [InlineData("start")]
    [InlineData("syscall", "101")]
    [InlineData("syscall", "105", "0")]
    [InlineData("syscall", "165")]
    [InlineData("syscall", "272", "0")]
    [InlineData("syscall", "310")]
    [InlineData("syscall", "321")]
    [InlineData("syscall", "57")]
    public void Calls_OfAProcessInForeignHands_EndIt(params string[] what)
    {
        Probe(out int status, ["calls", .. what]).Should().BeEmpty();
        status.Should().Be(KilledBySystemCall);
    }

    [Theory]
    [InlineData("error 1", "syscall", "425", "1")]
    [InlineData("error 1", "syscall", "41", "16", "3")]
    [InlineData("error 1", "syscall", "41", "17", "3")]
    [InlineData("error 1", "syscall", "16", "0", "21522")]
    [InlineData("error 1", "syscall", "62", "1", "0")]
    [InlineData("error 1", "syscall", "157", "4", "1")]
    [InlineData("error 38", "syscall", "435", "0", "0")]
    public void Calls_ThatAreNotOnTheList_AreRefused(string answer, params string[] what)
    {
        Probe(out int status, ["calls", .. what]).Should().Be(answer);
        status.Should().Be(0);
    }

    [LandlockFact]
    public void Files_ThatWereNamed_AreThere_AndOthersAreNot()
    {
        string read = Make("read"), written = Make("written"), secret = Make("secret");
        string own = Directory.CreateDirectory(Path.Combine(_directory, "own")).FullName;
        string[] rules = ["Execute=/usr", "Execute=/lib", "Execute=/lib64", "Read=/proc", "Read=/sys", "Read=/etc/ld.so.cache", "Write=/dev",
            "Execute=" + AppContext.BaseDirectory, "Execute=" + DotnetRoot(), "Read=" + read, "Write=" + written, "Own=" + own];
        string Inside(params string[] what) => Probe(out _, ["files", .. rules, "--", .. what]);
        Inside("nothing").Should().Be("works");
        Inside("read", read).Should().Be("works");
        Inside("write", read).Should().StartWith("refused: ");
        Inside("write", written).Should().Be("works");
        Inside("read", written).Should().Be("works");
        Inside("read", secret).Should().StartWith("refused: ");
        Inside("read", "/etc/passwd").Should().StartWith("refused: ");
        Inside("make", own).Should().Be("works");
        Inside("make", _directory).Should().StartWith("refused: ");
        Inside("remove", secret).Should().StartWith("refused: ");
        Inside("signal", Environment.ProcessId.ToString(CultureInfo.InvariantCulture)).Should().BeOneOf("error 1", "works");
        File.Exists(secret).Should().BeTrue();
    }

    private static string DotnetRoot() =>
        Path.GetFullPath(Path.Combine(System.Runtime.InteropServices.RuntimeEnvironment.GetRuntimeDirectory(), "../../.."));

    private static string Probe(out int status, params string[] words)
    {
        var start = new ProcessStartInfo(Path.Combine(DotnetRoot(), "dotnet"), [typeof(SandboxTests).Assembly.Location, .. words])
        {
            RedirectStandardOutput = true,
            UseShellExecute = false,
        };
        start.Environment["DOTNET_EnableDiagnostics"] = "0";
        using Process process = Process.Start(start)!;
        string output = process.StandardOutput.ReadToEnd().Trim();
        process.WaitForExit(60_000).Should().BeTrue();
        status = process.ExitCode;
        return output;
    }

    private string Make(string name)
    {
        string path = Path.Combine(_directory, name);
        File.WriteAllText(path, name);
        return path;
    }

    // Classic BPF as seccomp runs it: struct seccomp_data is number, arch, instruction pointer, six arguments.
    private static uint Judge(BpfInstruction[] code, uint number, ulong first = 0, ulong second = 0, ulong third = 0, uint arch = 0xC000003E)
    {
        var data = new byte[64];
        BitConverter.TryWriteBytes(data.AsSpan(0), number);
        BitConverter.TryWriteBytes(data.AsSpan(4), arch);
        BitConverter.TryWriteBytes(data.AsSpan(16), first);
        BitConverter.TryWriteBytes(data.AsSpan(24), second);
        BitConverter.TryWriteBytes(data.AsSpan(32), third);
        uint accumulator = 0;
        for (int at = 0; ; at++)
        {
            BpfInstruction instruction = code[at];
            uint k = instruction.Constant;
            switch (instruction.Code)
            {
                case 0x20:
                    accumulator = BitConverter.ToUInt32(data, (int)k);
                    break;
                case 0x54:
                    accumulator &= k;
                    break;
                case 0x05:
                    at += (int)k;
                    break;
                case 0x15:
                    at += accumulator == k ? instruction.JumpTrue : instruction.JumpFalse;
                    break;
                case 0x35:
                    at += accumulator >= k ? instruction.JumpTrue : instruction.JumpFalse;
                    break;
                case 0x06:
                    return k;
                default:
                    throw new InvalidOperationException($"0x{instruction.Code:x}");
            }
        }
    }

    /// <summary>A test of the sandbox of files; skipped, with the reason, where this host has none.</summary>
    [AttributeUsage(AttributeTargets.Method)]
    private sealed class LandlockFactAttribute : FactAttribute
    {
        public LandlockFactAttribute()
        {
            // Without rules the process inside cannot even start; what counts is whether it was shut in.
            string answer = Probe(out _, "files", "--", "nothing");
            Skip = answer.StartsWith("no sandbox: ", StringComparison.Ordinal) ? answer : null;
        }
    }
}
