// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using FluentAssertions;
using Vmm.Host;
using Xunit;

namespace Vmm.X86.Tests;

/// <summary>How code memory is divided, and the lists of branches that are linked in it.</summary>
public sealed unsafe class CodeArenaTests
{
    private const long Gigabyte = 1L << 30;

    [Theory]
    [InlineData(1, 24 * Gigabyte, 256 << 20)]
    [InlineData(7, 256 * Gigabyte, 256 << 20)]
    [InlineData(8, 256 * Gigabyte, 224 << 20)]
    [InlineData(64, 256 * Gigabyte, 28 << 20)]
    [InlineData(1, 2 * Gigabyte, 128 << 20)]
    [InlineData(4, 2 * Gigabyte, 32 << 20)]
    [InlineData(64, 1 * Gigabyte, 16 << 20)]
    [InlineData(0, 24 * Gigabyte, 256 << 20)]
    public void ArenaBytes_DividesCodeMemoryAndAPartOfTheHosts(int vcpus, long hostBytes, int expected)
    {
        SoftHypervisor.ArenaBytes(vcpus, hostBytes).Should().Be(expected);
    }

    [Fact]
    public void ArenaBytes_OfAsManyVcpusAsThereMayBe_FitTogether()
    {
        for (int vcpus = 1; vcpus <= 64; vcpus++)
        {
            long all = (long)vcpus * SoftHypervisor.ArenaBytes(vcpus, long.MaxValue / 2);
            all.Should().BeLessThanOrEqualTo(SoftHypervisor.CodeMemoryBytes - SoftHypervisor.ThunkBytes);
        }
    }

    [Fact]
    public void Arenas_DoNotOverlapAndComeBack()
    {
        using CodeMemory code = CodeMemory.TryCreate(SoftHypervisor.ThunkBytes + (64 << 20), out _)!;
        using var thunks = new ThunkCache(code);
        thunks.TryTakeArena(16 << 20, out byte* first, out long delta).Should().BeTrue();
        thunks.TryTakeArena(32 << 20, out byte* second, out _).Should().BeTrue();
        delta.Should().Be(code.ExecuteAddress - code.WriteAddress);
        ((nint)first).Should().Be(code.WriteAddress + SoftHypervisor.ThunkBytes);
        ((nint)second).Should().Be((nint)first + (16 << 20));
        thunks.TryTakeArena(32 << 20, out _, out _).Should().BeFalse("only 16 MiB are left");

        thunks.ReturnArena(second, 32 << 20);
        thunks.TryTakeArena(32 << 20, out byte* again, out _).Should().BeTrue();
        ((nint)again).Should().Be((nint)second);

        thunks.ReturnArena(again, 32 << 20);
        thunks.ReturnArena(first, 16 << 20);
        thunks.TryTakeArena(64 << 20, out byte* all, out _).Should().BeTrue("everything has come back");
        ((nint)all).Should().Be((nint)first);
    }

    [Fact]
    public void FarLinks_AreForgottenByPageAndOnlyThose()
    {
        const int sites = 3000;
        const int siteBytes = 64;
        const byte linked = 0x0F;
        var random = new Random(3);
        var code = (byte*)NativeMemory.AllocZeroed(sites * siteBytes);
        var blocks = default(BlockCache);
        blocks.BranchKeys = (BranchKey*)NativeMemory.AllocZeroed(BlockCache.Branches, BranchKey.SizeBytes);
        blocks.BranchPages = (ulong*)NativeMemory.AllocZeroed(BlockCache.BranchPageWords, sizeof(ulong));
        blocks.Jumps = (JumpEntry*)NativeMemory.AllocZeroed(
            BlockCache.Rows * BlockCache.RowEntries, (nuint)sizeof(JumpEntry));
        blocks.FarLinks = (FarLink*)NativeMemory.AllocZeroed(BlockCache.MaxFarLinks, (nuint)sizeof(FarLink));
        blocks.FarHeads = (int*)NativeMemory.AllocZeroed(BlockCache.FarLists, sizeof(int));
        var pages = new Dictionary<int, ulong>();
        for (int step = 0; step < 200_000; step++)
        {
            int index = random.Next(sites);
            byte* site = code + (index * siteBytes);
            if (random.Next(20) != 0)
            {
                // As CodeCache.LinkFar does; a site that is linked keeps its page.
                if (*site != linked)
                {
                    ulong page = (ulong)random.Next(5000) << 12;
                    blocks.AddBranchPage(page);
                    blocks.AddFar(site, page);
                    *site = linked;
                    pages[index] = page;
                }
            }
            else
            {
                ulong page = (ulong)random.Next(5000) << 12;
                blocks.ForgetPage(page);
                foreach (int gone in pages.Where(one => one.Value == page).Select(one => one.Key).ToArray())
                {
                    code[gone * siteBytes].Should().NotBe(linked);
                    pages.Remove(gone);
                }
            }

            if (step % 10_000 == 0)
            {
                Enumerable.Range(0, sites).Count(i => code[i * siteBytes] == linked).Should().Be(pages.Count);
            }
        }

        blocks.FarCount.Should().BeLessThanOrEqualTo(sites, "places in the lists are used again");
        blocks.UnlinkFar();
        Enumerable.Range(0, sites).Count(i => code[i * siteBytes] == linked).Should().Be(0);

        // More than there is room for: all others are unlinked.
        for (int i = 0; i <= BlockCache.MaxFarLinks; i++)
        {
            byte* site = code + (i % sites * siteBytes);
            *site = linked;
            blocks.AddFar(site, (ulong)i << 12);
        }

        blocks.FarCount.Should().Be(1);
        NativeMemory.Free(blocks.FarHeads);
        NativeMemory.Free(blocks.FarLinks);
        NativeMemory.Free(blocks.Jumps);
        NativeMemory.Free(blocks.BranchPages);
        NativeMemory.Free(blocks.BranchKeys);
        NativeMemory.Free(code);
    }
}
