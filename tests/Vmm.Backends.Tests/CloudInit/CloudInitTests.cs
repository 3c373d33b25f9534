// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Diagnostics;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using FluentAssertions;
using Vmm.Backends.CloudInit;
using Vmm.Core;
using Xunit;

namespace Vmm.Backends.Tests.CloudInit;

public sealed class CloudInitTests
{
    private static readonly CloudInitOptions s_options = new()
    {
        HostName = "web1",
        SshKeys = ["ssh-ed25519 AAAA\"quoted\" me@example\n"],
        UserData = Encoding.UTF8.GetBytes("#cloud-config\npackages: [nginx]\n"),
        Network = Encoding.UTF8.GetBytes("version: 2\n"),
    };

    [Fact]
    public void Seed_SameInput_SameBytes_OtherInput_OtherInstance()
    {
        CloudInitSeed.Build(s_options).Should().Equal(CloudInitSeed.Build(s_options));
        string one = Extract(CloudInitSeed.Build(s_options), "meta-data");
        string two = Extract(CloudInitSeed.Build(s_options with { UserData = null }), "meta-data");
        one.Split('\n')[0].Should().StartWith("instance-id: \"i-").And.NotBe(two.Split('\n')[0]);
        one.Should().Contain("local-hostname: \"web1\"");
        one.Should().Contain("public-keys:\n  - \"ssh-ed25519 AAAA\\u0022quoted\\u0022 me@example\"\n");
        Extract(CloudInitSeed.Build(s_options with { UserData = null }), "user-data").Should().StartWith("#cloud-config\n");
    }

    // Three readers that we did not write: isoinfo for each name space, xorriso for the whole tree.
    [Theory]
    [InlineData("-R", "/user-data")]
    [InlineData("-J", "/user-data")]
    [InlineData("", "/USER_DAT.;1")]
    public void Image_ReadByIsoinfo_HasTheFiles(string names, string path)
    {
        using var file = new TemporaryImage(CloudInitSeed.Build(s_options));
        Run("isoinfo", $"-i {file.Path} {names} -x {path}").Should().Be("#cloud-config\npackages: [nginx]\n");
        string listing = Run("isoinfo", $"-i {file.Path} {names} -f");
        listing.Split('\n', StringSplitOptions.RemoveEmptyEntries).Should().HaveCount(3);
        string about = Run("isoinfo", $"-d -i {file.Path}");
        about.Should().Contain("Volume id: cidata").And.Contain("Rock Ridge signatures version 1 found")
            .And.Contain("Joliet with UCS level 3 found");
    }

    [Fact]
    public void Image_ReadByXorriso_IsSound()
    {
        using var file = new TemporaryImage(CloudInitSeed.Build(s_options));
        string found = Run("xorriso", $"-indev {file.Path} -find / -exec lsdl --");
        found.Should().Contain("'/meta-data'").And.Contain("'/network-config'").And.Contain("-r--r--r--");
    }

    [Fact]
    public void Image_ManyFiles_CrossSectors()
    {
        var files = new IsoFile[100];
        for (int i = 0; i < files.Length; i++)
        {
            files[i] = new IsoFile($"a-file-with-a-rather-long-name-{i:d3}.text", new byte[i]);
        }

        using var image = new TemporaryImage(IsoImage.Build("many", files, DateTimeOffset.UnixEpoch));
        Run("isoinfo", $"-i {image.Path} -R -f").Split('\n', StringSplitOptions.RemoveEmptyEntries).Should().HaveCount(100);
        Run("isoinfo", $"-i {image.Path} -J -f").Split('\n', StringSplitOptions.RemoveEmptyEntries).Should().HaveCount(100);
        Run("isoinfo", $"-i {image.Path} -f").Should().Contain("/A_FILE_W.TEX;1").And.Contain("/A_FILE99.TEX;1");
    }

    [Theory]
    [InlineData("")]
    [InlineData("a/b")]
    [InlineData("näme")]
    public void Image_BadName_IsRefused(string name)
    {
        Action build = () => IsoImage.Build("v", [new IsoFile(name, default)], DateTimeOffset.UnixEpoch);
        build.Should().Throw<ArgumentException>();
    }

    [Fact]
    public void MemoryDisk_ReadsSlicesAndBuffers_RefusesTheRest()
    {
        byte[] image = CloudInitSeed.Build(s_options);
        using var disk = new MemoryBlockBackend(image);
        disk.LengthBytes.Should().Be(image.Length);
        byte[] pinned = GC.AllocateArray<byte>(4096, pinned: true);
        nint address = Marshal.UnsafeAddrOfPinnedArrayElement(pinned, 0);
        var request = new Request
        {
            OffsetBytes = 32768,
            LengthBytes = 4096,
            Slices = [new GuestSlice(address, 1000), new GuestSlice(address + 1000, 3096)],
            SliceCount = 2,
        };
        Execute(disk, request).Should().Be(BlockStatus.Ok);
        pinned.Should().Equal(image.AsSpan(32768, 4096).ToArray());
        request.SliceCount = 0;
        request.Buffer = new byte[4096];
        Execute(disk, request).Should().Be(BlockStatus.Ok);
        request.Buffer.Span.SequenceEqual(pinned).Should().BeTrue();
        request.OffsetBytes = image.Length;
        Execute(disk, request).Should().Be(BlockStatus.Refused);
        request.OffsetBytes = 0;
        request.Operation = BlockOperation.Write;
        Execute(disk, request).Should().Be(BlockStatus.Refused);
    }

    private static BlockStatus Execute(MemoryBlockBackend disk, Request request)
    {
        request.Done.Reset();
        disk.Submit(request);
        disk.Drain();
        request.Done.Wait(10_000).Should().BeTrue();
        return request.Status;
    }

    private static string Extract(byte[] image, string name)
    {
        using var file = new TemporaryImage(image);
        return Run("isoinfo", $"-i {file.Path} -R -x /{name}");
    }

    private static string Run(string program, string arguments)
    {
        var start = new ProcessStartInfo(program, arguments)
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            UseShellExecute = false,
        };
        using Process process = Process.Start(start)!;
        process.ErrorDataReceived += (_, _) => { };
        process.BeginErrorReadLine();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit(20_000).Should().BeTrue();
        process.ExitCode.Should().Be(0);
        return output;
    }

    private sealed class Request : BlockRequest
    {
        public ManualResetEventSlim Done { get; } = new();

        public BlockStatus Status { get; private set; }

        public override void Complete(BlockStatus status)
        {
            Status = status;
            Done.Set();
        }
    }

    private sealed class TemporaryImage : IDisposable
    {
        public TemporaryImage(byte[] content)
        {
            Path = System.IO.Path.GetTempFileName();
            File.WriteAllBytes(Path, content);
        }

        public string Path { get; }

        public void Dispose() => File.Delete(Path);
    }
}
