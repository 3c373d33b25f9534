// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Threading;
using FluentAssertions;
using Vmm.Core;
using Xunit;

namespace Vmm.X86.Tests;

/// <summary>
/// Random bytes as code in every mode: Run never throws or fails, and nothing outside guest memory changes (the
/// neighbours of guest RAM are checked by <see cref="TestVm"/>'s poisoned margins). VMM_TORTURE_INSTRUCTIONS asks for that
/// many instructions in each mode instead of a few rounds (tests/fuzz/guest).
/// </summary>
public sealed class TortureTests
{
    [Theory]
    [InlineData("real", 1)]
    [InlineData("protected", 2)]
    [InlineData("virtual8086", 3)]
    [InlineData("long", 4)]
    [InlineData("user", 5)]
    [InlineData("compatibility", 6)]
    [InlineData("paged", 7)]
    [InlineData("traced", 8)]
    public void RandomCode_AnyMode_NeverFails(string mode, int seed)
    {
        const int Rounds = 60;
        _ = long.TryParse(Environment.GetEnvironmentVariable("VMM_TORTURE_INSTRUCTIONS"), out long wanted);
        int turns = wanted > 0 ? 200 : 3;
        var random = new Random(seed);
        using var vm = new TestVm(1 << 20);
        for (int round = 0; round < Rounds || vm.Cpu.InstructionsRetired < wanted; round++)
        {
            // Everything is random but what the mode needs; code covers most of the first half of memory.
            vm.Memory.Clear();
            random.NextBytes(vm.Memory[..0x40000]);
            Prepare(vm, mode, random);
            for (int i = 0; i < 16; i++)
            {
                if (random.Next(3) == 0)
                {
                    vm.State.Gpr[i] = (ulong)random.NextInt64();
                }
                else if (i != 4)
                {
                    vm.State.Gpr[i] = (ulong)random.Next(1 << 20);
                }
            }

            vm.Cpu.WriteState(vm.State);
            using var timer = new Timer(_ => vm.Cpu.Kick(), null, 20, 20);
            var exit = default(VcpuExit);
            for (int turn = 0; turn < turns; turn++)
            {
                if (turn >= 3)
                {
                    // On from somewhere else, in whatever mode the guest has got itself into.
                    vm.Cpu.ReadState(vm.State);
                    vm.State.Rip = (ulong)random.Next(0x30000);
                    vm.State.Gpr[random.Next(16)] = (ulong)random.Next(1 << 20);
                    vm.State.Rflags |= 0x200;
                    vm.State.Activity = ActivityState.Running;
                    vm.Cpu.WriteState(vm.State);
                }


                ExitKind kind = vm.Cpu.Run(ref exit);
                kind.Should().NotBe(ExitKind.Failed, "round {0} of {1}: {2}", round, mode, exit.Detail);
                if (kind is ExitKind.Shutdown)
                {
                    break;
                }

                vm.Port.Vectors.Enqueue(random.Next(256));
                vm.Port.Nmi = random.Next(4) == 0;
            }

            vm.Port.Vectors.Clear();
            vm.MarginsAreIntact.Should().BeTrue("round {0} of {1}", round, mode);
        }
    }

    private static void Prepare(TestVm vm, string mode, Random random)
    {
        switch (mode)
        {
            case "real":
                vm.EnterReal();
                break;
            case "protected":
                vm.EnterProtected();
                break;
            case "virtual8086":
                vm.EnterProtected();
                vm.State.Rflags = 0x20002 | (random.Next(2) == 0 ? 0x3000UL : 0);
                vm.State.Tr = new SegmentState { Selector = 0x40, Base = TestVm.TssAt, Limit = 0x67, Rights = 0x8B };
                vm.Write32(TestVm.TssAt + 4, 0x9F000);
                vm.Write32(TestVm.TssAt + 8, 0x10);
                for (int i = 0; i < 6; i++)
                {
                    vm.State.Segments[i] = new SegmentState
                    {
                        Selector = 0x1000,
                        Base = 0x10000,
                        Limit = 0xFFFF,
                        Rights = 0xF3,
                    };
                }

                vm.State.Rip = 0;
                break;
            case "long":
                vm.EnterLong();
                break;
            case "user":
                vm.EnterLong(3);
                break;
            case "compatibility":
                vm.EnterLong();
                vm.State.Segments[1] = new SegmentState { Selector = 0x18, Limit = uint.MaxValue, Rights = 0xC09B };
                break;
            case "paged":
                vm.EnterLong();

                // Page tables and descriptor tables get damaged, too.
                for (int i = 0; i < 4; i++)
                {
                    int at = random.Next(0x3000);
                    vm.Memory[(int)TestVm.PageTables + at] ^= (byte)random.Next(256);
                }

                random.NextBytes(vm.Memory.Slice((int)TestVm.GdtAt + 0x50, 0x30));
                random.NextBytes(vm.Memory.Slice((int)TestVm.IdtAt, 0x400));
                break;
            default:
                vm.EnterLong();
                vm.State.Rflags |= 0x100;
                vm.State.Debug[0] = TestVm.CodeAt + 0x10;
                vm.State.Debug[1] = 0x2000;
                vm.State.Debug[5] = 0x400 | 0x3 | 0xC | (3UL << 20);
                break;
        }

        vm.State.Gpr[4] = TestVm.StackTop - 64;
    }
}
