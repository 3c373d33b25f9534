// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using FluentAssertions;
using Iced.Intel;
using Vmm.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.X86.Tests;

/// <summary>
/// Loops around an instruction that lies across two pages, while the second page is mapped elsewhere, taken away, written to
/// by everybody who can, or global or not in two address spaces. Translated and interpreted, the same is logged.
/// </summary>
public sealed class PageCrossingTests
{
    /// <summary>What the instruction is; each does something else for each second page.</summary>
    private const int Forms = 8;
    private const int Rounds = 6;

    [Theory]
    [MemberData(nameof(AllForms))]
    public void SecondPage_MappedElsewhereWithInvlpg_IsTheNewOneAtOnce(int form, int level)
    {
        using var guest = new Guest(form, translateAfter: 1);
        for (int i = 0; i < 3; i++)
        {
            guest.Map(0, 1, tail: 0).Invlpg(1).Run(level).Run(level).Map(0, 1, tail: 1).Invlpg(1).Run(level).Run(level);
        }

        guest.Finish();
        for (int i = 0; i < 12; i++)
        {
            guest.TakeResult().Should().Be(Result(form, (i / 2) & 1), "run {0}", i);
        }
    }

    [Theory]
    [MemberData(nameof(AllForms))]
    public void SecondPage_OfAnotherAddressSpace_IsThatOnes(int form, int level)
    {
        foreach (bool pcid in new[] { false, true })
        {
            using var guest = new Guest(form, translateAfter: 1, pcid: pcid, isFirstGlobal: true);
            guest.Map(1, 1, tail: 2).Map(1, 5, tail: 3).Map(0, 5, tail: 1);
            for (int i = 0; i < 4; i++)
            {
                guest.Run(level).Run(level, 4).Switch(1, keep: true).Run(level).Run(level, 4).Switch(0, keep: true);
            }

            guest.Finish();
            for (int i = 0; i < 16; i++)
            {
                int tail = (i & 3) switch { 0 => 0, 1 => 1, 2 => 2, _ => 3 };
                guest.TakeResult().Should().Be(Result(form, tail), "run {0}, PCID {1}", i, pcid);
            }
        }
    }

    // The address space's own translation may be used until it is left; what took its place in the tables is global.
    [Theory]
    [InlineData(1)]
    [InlineData(0)]
    public void Page_GlobalInItsTablesWhileAnOlderTranslationIsUsed_IsNewWhenTheAddressSpaceIsLeft(int page)
    {
        using var guest = new Guest(form: 0, translateAfter: 1, isFirstGlobal: page == 1);
        guest.Switch(0, keep: false);
        if (page == 0)
        {
            guest.Map(0, 1, tail: 0, Guest.Global).Map(1, 1, tail: 0, Guest.Global).Invlpg(1);
        }

        guest.Run(0).Run(0);
        if (page == 1)
        {
            guest.Map(0, 1, tail: 1, Guest.Global).Map(1, 1, tail: 1, Guest.Global);
        }
        else
        {
            guest.MapFirst(0, Guest.OtherFirst, Guest.Global).MapFirst(1, Guest.OtherFirst, Guest.Global);
        }

        guest.Run(0).Run(0).Run(0).Switch(1, keep: false).Run(0).Run(0).Finish();
        guest.TakeResult().Should().Be(Result(0, 0));
        guest.TakeResult().Should().Be(Result(0, 0));
        guest.Skip(3);
        ulong expected = page == 1 ? Result(0, 1) : Result(0, 0) + (Guest.OtherAdds * Rounds);
        guest.TakeResult().Should().Be(expected);
        guest.TakeResult().Should().Be(expected);
    }

    [Theory]
    [InlineData(0, 0, 0UL, 0x10UL)]
    [InlineData(3, 0, 0UL, 0x14UL)]
    [InlineData(0, 0, Guest.Present | Guest.User | Guest.NoExecute, 0x11UL)]
    [InlineData(3, 0, Guest.Present | Guest.User | Guest.NoExecute, 0x15UL)]
    [InlineData(3, 0, Guest.Present | Guest.Writable, 0x15UL)]
    [InlineData(3, 3, Guest.Present | Guest.Writable, 0x15UL)]
    public void SecondPage_NotToBeExecuted_FaultsThereWithTheInstructionsAddress(int level, int form, ulong bits, ulong error)
    {
        using var guest = new Guest(form, translateAfter: 1);
        for (int i = 0; i < 3; i++)
        {
            guest.MapRaw(0, 1, Guest.Tail(0) | Guest.Usual).Invlpg(1).Run(level).Run(level);
            guest.MapRaw(0, 1, Guest.Tail(0) | bits).Invlpg(1).Run(level).Run(level);
        }

        guest.Finish();
        for (int i = 0; i < 3; i++)
        {
            guest.TakeResult().Should().Be(Result(form, 0));
            guest.TakeResult().Should().Be(Result(form, 0));
            for (int fault = 0; fault < 2; fault++)
            {
                guest.TakeFault().Should().Be((Guest.At + 0x1000, error, guest.CrossingAt), "round {0}", i);
            }
        }
    }

    public enum Writer
    {
        Store,
        String,
        Device,
        OtherVcpu,
    }

    [Theory]
    [InlineData(Writer.Store, 1)]
    [InlineData(Writer.String, 1)]
    [InlineData(Writer.Device, 1)]
    [InlineData(Writer.Store, 2)]
    [InlineData(Writer.Device, 2)]
    [InlineData(Writer.OtherVcpu, 2)]
    public void SecondPage_WrittenTo_IsTheNewInstruction(Writer writer, int vcpus)
    {
        for (int form = 0; form < Forms; form++)
        {
            using var guest = new Guest(form, translateAfter: 1, vcpus: vcpus);
            using var other = new Guest(guest, 1);
            int runs = 0;
            for (int i = 0; i < 5; i++)
            {
                for (int level = 0; level <= 3; level += 3)
                {
                    guest.Run(level).Run(level);
                    int tail = ++runs & 3;
                    switch (writer)
                    {
                        case Writer.Store:
                            guest.Store(0, tail);
                            break;
                        case Writer.String:
                            guest.Copy(0, tail);
                            break;
                        case Writer.Device:
                            guest.Device(0, tail);
                            break;
                        default:
                            guest.Yield();
                            other.Store(0, tail).Yield();
                            break;
                    }
                }
            }

            other.End();
            guest.Finish(writer == Writer.OtherVcpu ? other : null);
            for (int i = 0; i < 20; i++)
            {
                guest.TakeResult().Should().Be(Result(form, (i / 2) & 3), "form {0}, run {1}", form, i);
            }
        }
    }

    // What it is for: the instruction is executed by generated code.
    [Theory]
    [InlineData(0, false)]
    [InlineData(3, false)]
    [InlineData(0, true)]
    [InlineData(3, true)]
    public void Loop_AroundTheInstruction_IsNotInterpreted(int level, bool fiveLevel)
    {
        using var guest = new Guest(form: 0, translateAfter: 2, isFirstGlobal: true, fiveLevel: fiveLevel);
        guest.Map(0, 1, tail: 0, Guest.Global).Invlpg(1);
        for (int i = 0; i < 100; i++)
        {
            guest.Run(level);
        }

        guest.Finish();
        for (int i = 0; i < 100; i++)
        {
            guest.TakeResult().Should().Be(Result(0, 0));
        }

        guest.Vm.Cpu.InterpretedCrossing.Should().BeInRange(1, 4);
    }

    // Without a global second page the kernel cannot: its branches have one tag in all address spaces.
    [Fact]
    public void Loop_OfTheKernelIntoAPageThatIsNotGlobal_IsInterpreted()
    {
        using var guest = new Guest(form: 0, translateAfter: 1, isFirstGlobal: true);
        guest.Run(0).Run(0).Finish();
        guest.TakeResult().Should().Be(Result(0, 0));
        guest.TakeResult().Should().Be(Result(0, 0));
        guest.Vm.Cpu.InterpretedCrossing.Should().BeGreaterThanOrEqualTo(2 * (Rounds - 1));
    }

    // More places than may be linked at a time, each in two pages in turn.
    [Fact]
    public void ManyPlaces_InMoreSpacesThanOneListHolds_AreRight()
    {
        using var guest = new Guest(form: 0, translateAfter: 1);
        guest.Map(0, 5, tail: 1);
        for (int i = 0; i < 2500; i++)
        {
            guest.Run(3).Run(3, 4);
        }

        guest.Finish();
        for (int i = 0; i < 5000; i++)
        {
            guest.TakeResult().Should().Be(Result(0, i & 1), "run {0}", i);
        }
    }

    public static TheoryData<int, bool, bool> Seeds()
    {
        var data = new TheoryData<int, bool, bool>();
        for (int seed = 1; seed <= 48; seed++)
        {
            data.Add(seed, (seed & 1) != 0, seed > 40);
        }

        return data;
    }

    public static TheoryData<int, int> AllForms()
    {
        var data = new TheoryData<int, int>();
        for (int form = 0; form < Forms; form++)
        {
            data.Add(form, 0);
            data.Add(form, 3);
        }

        return data;
    }

    [Theory]
    [MemberData(nameof(Seeds))]
    public void RandomScript_Translated_LogsWhatTheInterpreterLogs(int seed, bool counts, bool deterministic)
    {
        using Guest translated = Make(seed, 1 + (seed % 3), counts, deterministic);
        using Guest interpreted = Make(seed, 0, counts, deterministic);
        translated.Finish();
        interpreted.Finish();
        Same(translated, interpreted);
        if (counts || deterministic)
        {
            translated.Vm.Cpu.InstructionsRetired.Should().Be(interpreted.Vm.Cpu.InstructionsRetired);
        }
    }

    [Theory]
    [InlineData(101)]
    [InlineData(102)]
    [InlineData(103)]
    [InlineData(104)]
    [InlineData(105)]
    [InlineData(106)]
    [InlineData(107)]
    [InlineData(108)]
    public void RandomScripts_OfTwoVcpus_LogWhatTheInterpreterLogs(int seed)
    {
        using Guest translated = MakePair(seed, 1, out Guest second);
        using Guest interpreted = MakePair(seed, 0, out Guest reference);
        translated.Finish(second);
        interpreted.Finish(reference);
        Same(translated, interpreted);
    }

    // One changes the instruction and then a number; the other reads the number, serializes and must not meet an older
    // instruction: one across two pages, and one in the same page, to which generated code goes without a look at requests.
    // At the same time, on two threads.
    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public async Task Instruction_WrittenToWhileAnotherVcpuLoops_IsNeverOlderThanWhatThatHasSeen(bool crosses)
    {
        const uint last = 400;
        ulong patched = crosses ? Guest.Tail(0) : 0x20800;
        const ulong number = 0x48000;
        using var guest = new Guest(form: 0, translateAfter: 1, vcpus: 2, isFirstGlobal: true);
        TestVm vm = guest.Vm;
        vm.Assemble(0x20000, 64, a =>
        {
            Label again = a.CreateLabel();
            Label old = a.CreateLabel();
            a.xor(ebp, ebp);
            a.Label(ref again);

            // Longer than the other one needs from its request to its number.
            for (int i = 0; i < 400; i++)
            {
                a.imul(r9, r9);
            }

            a.mov(edi, __dword_ptr[number]);
            a.xor(eax, eax);
            a.cpuid();
            a.xor(eax, eax);
            if (crosses)
            {
                a.mov(rsi, (long)Guest.At + 0xFFE);
                a.call(rsi);
            }
            else
            {
                a.call(patched - 1);
            }

            a.inc(ebp);
            a.cmp(eax, edi);
            a.jb(old);
            a.cmp(edi, last);
            a.jb(again);
            a.xor(edi, edi);
            a.hlt();
            a.Label(ref old);
            a.hlt();
        });
        vm.Assemble(0x21000, 64, a =>
        {
            Label again = a.CreateLabel();
            Label wait = a.CreateLabel();
            a.xor(eax, eax);
            a.Label(ref again);
            a.inc(eax);
            a.mov(__dword_ptr[patched], eax);
            a.mov(__dword_ptr[number], eax);
            a.mov(ecx, 1_000_000);
            a.Label(ref wait);
            a.dec(ecx);
            a.jne(wait);
            a.cmp(eax, last);
            a.jb(again);
            a.hlt();
        });

        // ADD EAX, imm32, in two encodings, and RET.
        vm.Write16(Guest.First + 0xFFE, 0xC081);
        vm.Memory[0x207FF] = 0x05;
        vm.Write64(patched, 0xC3UL << 32);
        guest.ShareTail();
        CpuState state = vm.State;
        state.Rip = 0x21000;
        vm.Vcpus[1].WriteState(state);
        state.Rip = 0x20000;
        state.Gpr[4] = 0x9C000;
        vm.Vcpus[0].WriteState(state);
        var exits = new VcpuExit[2];
        var kinds = new ExitKind[2];
        Task[] tasks =
        [
            Task.Factory.StartNew(
                () => kinds[0] = vm.Vcpus[0].Run(ref exits[0]), CancellationToken.None, TaskCreationOptions.LongRunning,
                TaskScheduler.Default),
            Task.Factory.StartNew(
                () => kinds[1] = vm.Vcpus[1].Run(ref exits[1]), CancellationToken.None, TaskCreationOptions.LongRunning,
                TaskScheduler.Default),
        ];
        await Task.WhenAll(tasks).WaitAsync(TimeSpan.FromMinutes(1));
        kinds.Should().OnlyContain(kind => kind == ExitKind.Halted);
        vm.Vcpus[0].ReadState(state);
        state.Gpr[7].Should().Be(0, "of {0} rounds none met an older instruction than EDI says", state.Gpr[5]);
    }

    private static void Same(Guest translated, Guest interpreted)
    {
        translated.Results.Should().Equal(interpreted.Results);
        translated.Vm.State.Gpr.Should().Equal(interpreted.Vm.State.Gpr);
        translated.Vm.Memory.SequenceEqual(interpreted.Vm.Memory).Should().BeTrue();
        translated.Vm.Cpu.Translator!.Blocks.Should().BePositive();
        translated.Vm.MarginsAreIntact.Should().BeTrue();
    }

    // What is done obeys the rules: tables that change are followed by INVLPG here, and by a MOV to CR3 that flushes in the
    // other address space; global pages are the same in both.
    private static Guest Make(int seed, int translateAfter, bool counts, bool deterministic)
    {
        var random = new Random(seed);
        bool pcid = random.Next(2) != 0;
        bool shares = random.Next(3) == 0;
        var guest = new Guest(
            random.Next(Forms), translateAfter, pcid: pcid, isFirstGlobal: shares || random.Next(2) != 0,
            fiveLevel: random.Next(4) == 0, counts: counts, deterministic: deterministic);
        int space = 0;
        bool[] stale = [true, true];
        for (int i = 0; i < 300; i++)
        {
            int level = random.Next(2) * 3;
            int page = random.Next(2) * 4;
            switch (random.Next(16))
            {
                case < 8:
                    guest.Run(level, page);
                    break;
                case 8 or 9:
                    ulong bits = Bits(random);
                    int tail = random.Next(Guest.Tails);
                    bool global = shares && random.Next(3) != 0;
                    guest.Map(space, page + 1, tail, bits, global);
                    if (shares)
                    {
                        guest.Map(1 - space, page + 1, tail, bits, global);
                    }

                    guest.Invlpg(page + 1);
                    stale[1 - space] |= shares;
                    break;
                case 10 when !shares:
                    guest.Map(1 - space, page + 1, random.Next(Guest.Tails), Bits(random));
                    stale[1 - space] = true;
                    break;
                case 11 or 12:
                    space ^= random.Next(4) != 0 ? 1 : 0;
                    guest.Switch(space, keep: !stale[space] && random.Next(4) != 0);
                    stale[space] = false;
                    break;
                case 13:
                    guest.Store(random.Next(Guest.Tails), random.Next(Guest.Tails));
                    break;
                case 14:
                    guest.Device(random.Next(Guest.Tails), random.Next(Guest.Tails));
                    break;
                default:
                    guest.TouchFirst();
                    break;
            }
        }

        return guest;
    }

    private static Guest MakePair(int seed, int translateAfter, out Guest second)
    {
        var random = new Random(seed);
        var first = new Guest(random.Next(Forms), translateAfter, vcpus: 2, isFirstGlobal: random.Next(2) != 0);
        second = new Guest(first, 1);
        Guest[] guests = [first, second];
        second.Switch(1, keep: false);
        int[] invlpg = [-1, -1];
        for (int round = 0; round < 60; round++)
        {
            for (int me = 0; me < 2; me++)
            {
                if (invlpg[me] >= 0)
                {
                    guests[me].Invlpg(invlpg[me]);
                    invlpg[me] = -1;
                }

                for (int i = random.Next(1, 8); i > 0; i--)
                {
                    int page = random.Next(2) * 4;
                    switch (random.Next(10))
                    {
                        case < 6:
                            guests[me].Run(random.Next(2) * 3, page);
                            break;
                        case 6:
                            guests[me].Map(me, page + 1, random.Next(Guest.Tails), Bits(random)).Invlpg(page + 1);
                            break;
                        case 7:
                            guests[me].Device(random.Next(Guest.Tails), random.Next(Guest.Tails));
                            break;
                        default:
                            guests[me].Store(random.Next(Guest.Tails), random.Next(Guest.Tails));
                            break;
                    }
                }

                // The other's tables, last: it is told when it runs next.
                if (random.Next(3) == 0)
                {
                    int page = (random.Next(2) * 4) + 1;
                    guests[me].Map(1 - me, page, random.Next(Guest.Tails), Bits(random));
                    invlpg[1 - me] = page;
                }

                guests[me].Yield();
            }
        }

        second.End();
        return first;
    }

    private static ulong Bits(Random random) => random.Next(8) switch
    {
        0 => 0,
        1 => Guest.Present | Guest.User | Guest.NoExecute,
        2 => Guest.Present | Guest.Writable,
        _ => Guest.Usual,
    };

    // RBX when the loop is done.
    private static ulong Result(int form, int tail)
    {
        ulong eachRound = form switch
        {
            0 => (ulong)Guest.Immediate(tail),
            1 or 4 => (ulong)tail + 1,
            2 => (ulong)Guest.Immediate(tail),
            _ => 0,
        };
        switch (form)
        {
            case 3 or 7:
                return 17UL + (ulong)(((tail & 1) == 0 ? 17 : 16) * (Rounds - 1));
            case 5:
                // XMM0 adds up.
                return (ulong)(7 * (tail + 1) * Rounds * (Rounds + 1) / 2);
            case 6:
                // CF is 1 for the last two rounds.
                return ((ulong)Guest.Immediate(tail) * Rounds) + 2;
            default:
                return eachRound * Rounds;
        }
    }

    /// <summary>
    /// A VM with two address spaces, a loop across two pages of each (twice: pages 0 and 1, 4 and 5) and a program that takes
    /// what it does from a script.
    /// </summary>
    private sealed class Guest : IDisposable
    {
        public const ulong At = 0x40000000;
        public const ulong Present = 1;
        public const ulong Writable = 2;
        public const ulong User = 4;
        public const ulong Global = 0x100 | Usual;
        public const ulong NoExecute = 1UL << 63;
        public const ulong Usual = Present | Writable | User;
        public const int Tails = 4;
        public const ulong First = 0x100000;

        /// <summary>Another first page, whose loop adds this in each round.</summary>
        public const ulong OtherFirst = 0x180000;
        public const ulong OtherAdds = 0x1000000;

        private const ulong Scripts = 0x200000;
        private const ulong Logs = 0x300000;
        private const ulong PerVcpu = 0x80000;
        private const ulong Descriptor = 0x47000;
        private const ulong Second = TestVm.PageTables + 0x4000;
        private const int DataAt = 0x40000;
        private const byte CallVector = 0x80;
        private const int DevicePort = 0x80;
        private const int YieldPort = 0x81;

        private readonly ulong[] _roots = new ulong[2];

        // The vCPU that runs, for all scripts of a VM.
        private readonly int[] _running = new int[1];
        private readonly bool _owns;
        private readonly int _index;
        private readonly int _crossing;
        private readonly byte[][] _heads = new byte[Tails][];
        private ulong _scriptEnd;
        private ulong _log;

        public Guest(
            int form, int translateAfter, bool pcid = false, bool isFirstGlobal = false, bool fiveLevel = false,
            bool counts = false, bool deterministic = false, int vcpus = 1)
        {
            _owns = true;
            Vm = new TestVm(
                translateAfter: translateAfter, vcpus: vcpus, countInstructions: counts, deterministic: deterministic);
            Vm.Ports.Map(DevicePort, new ActingPort(() => WriteAsDevice(Vm)));
            Vm.Ports.Map(YieldPort, new ActingPort(() => Vm.Vcpus[_running[0]].Kick()));
            Vm.EnterLong(0, fiveLevel);
            Pcid = pcid;
            Tables(fiveLevel, isFirstGlobal);
            Handlers();
            _crossing = form switch
            {
                1 or 4 or 7 => 0xFFF,
                5 => 0xFFC,
                _ => 0xFFE,
            };
            Loop(form, First, 0);
            Loop(form, OtherFirst, OtherAdds);
            _scriptEnd = Scripts;
            _log = Logs;
        }

        /// <summary>The script of another vCPU of the same VM.</summary>
        public Guest(Guest other, int index)
        {
            Vm = other.Vm;
            Pcid = other.Pcid;
            _roots = other._roots;
            _running = other._running;
            _heads = other._heads;
            _crossing = other._crossing;
            Entry = other.Entry;
            _index = index;
            _scriptEnd = Scripts + (PerVcpu * (ulong)index);
            _log = Logs + (PerVcpu * (ulong)index);
        }

        public TestVm Vm { get; }

        public bool Pcid { get; }

        public ulong Entry { get; private set; }

        public ulong CrossingAt => At + (ulong)_crossing;

        /// <summary>What was logged.</summary>
        public ulong[] Results
        {
            get
            {
                var all = new ulong[PerVcpu / sizeof(ulong)];
                for (int i = 0; i < all.Length; i++)
                {
                    all[i] = Vm.Read64(Logs + (PerVcpu * (ulong)_index) + ((ulong)i * 8));
                }

                return all;
            }
        }

        public static ulong Tail(int number) => 0x110000 + ((ulong)number * 0x3000);

        public static int Immediate(int tail) => 0x40 | ((tail + 3) << 8);

        public Guest Run(int level, int page = 0) => Add(level == 0 ? 1UL : 2, Entry + ((ulong)page << 12), 0);

        public Guest Map(int space, int page, int tail, ulong bits = Usual, bool global = false) =>
            MapRaw(space, page, Tail(tail) | bits | (global ? 0x100UL : 0));

        public Guest MapRaw(int space, int page, ulong entry) => Add(3, LeafTable(space) + ((ulong)page * 8), entry);

        public Guest MapFirst(int space, ulong frame, ulong bits) => MapRaw(space, 0, frame | bits);

        public Guest Invlpg(int page) => Add(4, At + ((ulong)page << 12), 0);

        public Guest Switch(int space, bool keep) =>
            Add(5, _roots[space] | (Pcid ? (ulong)space + 1 : 0UL) | (keep && Pcid ? 1UL << 63 : 0UL), 0);

        /// <summary>Makes a second page what another one was in the beginning.</summary>
        public Guest Store(int tail, int from) => Add(3, Tail(tail), Head(from));

        public Guest Copy(int tail, int from)
        {
            Vm.Write64(Scripts - 0x1000 + ((ulong)from * 8), Head(from));
            return Add(6, Tail(tail), Scripts - 0x1000 + ((ulong)from * 8));
        }

        public Guest Device(int tail, int from) =>
            Add(3, Descriptor, Tail(tail)).Add(3, Descriptor + 8, Head(from)).Add(7, 0, 0);

        /// <summary>Writes to the first page what is there.</summary>
        public Guest TouchFirst()
        {
            ulong at = First + (Entry & 0xFFF);
            return Add(3, at, Vm.Read64(at));
        }

        public Guest Yield() => Add(8, 0, 0);

        public Guest End() => Add(0, 0, 0);

        public Guest Skip(int results)
        {
            _log += (ulong)results * 16;
            return this;
        }

        public ulong TakeResult()
        {
            Vm.Read64(_log).Should().NotBe(ulong.MaxValue, "no fault was logged");
            _log += 16;
            return Vm.Read64(_log - 8);
        }

        public (ulong Address, ulong Error, ulong Rip) TakeFault()
        {
            Vm.Read64(_log).Should().Be(ulong.MaxValue, "a fault was logged");
            _log += 40;
            return (Vm.Read64(_log - 32), Vm.Read64(_log - 24), Vm.Read64(_log - 16));
        }

        public void ShareTail() => Vm.Write64(LeafTable(0) + 8, Tail(0) | Global);

        /// <summary>Runs the script to its end; with another vCPU's, in turns from one Yield to the next.</summary>
        public void Finish(Guest? other = null)
        {
            End();
            Enter();
            other?.Enter();
            bool mine = true;
            bool others = other is not null;
            while (mine || others)
            {
                mine = mine && GoOn();
                others = others && other!.GoOn();
            }
        }

        public void Dispose()
        {
            if (_owns)
            {
                Vm.Dispose();
            }
        }

        private bool GoOn()
        {
            _running[0] = _index;
            ExitKind kind = Vm.Continue(_index);
            kind.Should().BeOneOf(ExitKind.Halted, ExitKind.Interrupted);
            return kind == ExitKind.Interrupted;
        }

        private void Enter()
        {
            CpuState state = Vm.State;
            state.Rip = TestVm.CodeAt;
            state.Cr3 = _roots[0] | (Pcid ? 1UL : 0);
            state.Cr4 |= Pcid ? Cr4.PcidE : 0;
            state.Gpr[13] = TestVm.StackTop - (ulong)(_index * 0x4000) - 0x2000;
            state.Gpr[14] = Logs + (PerVcpu * (ulong)_index);
            state.Gpr[15] = Scripts + (PerVcpu * (ulong)_index);
            Vm.Vcpus[_index].WriteState(state);
        }

        private static ulong LeafTable(int space) => Second + (space == 0 ? 0x3000UL : 0x5000);

        private ulong Head(int tail) => BinaryPrimitives.ReadUInt64LittleEndian(_heads[tail]);

        private Guest Add(ulong what, ulong first, ulong second)
        {
            Vm.Write64(_scriptEnd, what);
            Vm.Write64(_scriptEnd + 8, first);
            Vm.Write64(_scriptEnd + 16, second);
            _scriptEnd += 24;
            return this;
        }

        private static void WriteAsDevice(TestVm vm)
        {
            ulong at = vm.Read64(Descriptor);
            vm.Write64(at, vm.Read64(Descriptor + 8));
            vm.Vm.NotifyCodeWritten(at, 8);
        }

        private void Tables(bool fiveLevel, bool isFirstGlobal)
        {
            ulong shared = TestVm.PageTables + 0x2000;
            for (uint i = 0; i < 512; i++)
            {
                Vm.Write64(shared + (i * 8), ((ulong)i << 21) | 0x80 | Usual);
            }

            // The first address space has EnterLong's tables, the second those behind them.
            Vm.Write64(Second, (Second + 0x1000) | Usual);
            Vm.Write64(Second + 0x1000, shared | Usual);
            Vm.Write64(TestVm.PageTables + 0x1000 + 8, (Second + 0x2000) | Usual);
            Vm.Write64(Second + 0x1000 + 8, (Second + 0x4000) | Usual);
            Vm.Write64(Second + 0x2000, LeafTable(0) | Usual);
            Vm.Write64(Second + 0x4000, LeafTable(1) | Usual);
            _roots[0] = Vm.State.Cr3;
            _roots[1] = Second;
            if (fiveLevel)
            {
                _roots[1] = Second + 0x6000;
                Vm.Write64(_roots[1], Second | Usual);
            }

            for (int space = 0; space < 2; space++)
            {
                for (ulong page = 0; page <= 4; page += 4)
                {
                    Vm.Write64(LeafTable(space) + (page * 8), First | (isFirstGlobal ? Global : Usual));
                    Vm.Write64(LeafTable(space) + (page * 8) + 8, Tail(0) | Usual);
                }
            }
        }

        private void Handlers()
        {
            const ulong call = TestVm.CodeAt + 0x800;
            const ulong fault = TestVm.CodeAt + 0x900;
            Vm.Assemble(TestVm.CodeAt, 64, a =>
            {
                Label[] labels = new Label[8];
                for (int i = 0; i < labels.Length; i++)
                {
                    labels[i] = a.CreateLabel();
                }

                Label next = a.CreateLabel();
                a.Label(ref next);
                a.mov(rsp, r13);
                a.mov(rax, __[r15]);
                a.mov(rdx, __[r15 + 8]);
                a.mov(rbp, __[r15 + 16]);
                a.add(r15, 24);
                for (int i = 0; i < labels.Length; i++)
                {
                    a.cmp(eax, i + 1);
                    a.je(labels[i]);
                }

                a.hlt();
                a.Label(ref labels[0]);
                a.jmp(rdx);
                a.Label(ref labels[1]);
                a.lea(rax, __[r13 - 0x1000]);
                a.push(0x23);
                a.push(rax);
                a.push(0x3002);
                a.push(0x2B);
                a.push(rdx);
                a.iretq();
                a.Label(ref labels[2]);
                a.mov(__[rdx], rbp);
                a.jmp(next);
                a.Label(ref labels[3]);
                a.invlpg(__byte_ptr[rdx]);
                a.jmp(next);
                a.Label(ref labels[4]);
                a.mov(cr3, rdx);
                a.jmp(next);
                a.Label(ref labels[5]);
                a.mov(rsi, rbp);
                a.mov(rdi, rdx);
                a.mov(ecx, 8);
                a.rep.movsb();
                a.jmp(next);
                a.Label(ref labels[6]);
                a.@out(DevicePort, al);
                a.jmp(next);
                a.Label(ref labels[7]);
                a.@out(YieldPort, al);
                a.jmp(next);
            }).Should().BeLessThan(0x800);
            Vm.Assemble(call, 64, a =>
            {
                a.mov(__[r14], rax);
                a.mov(__[r14 + 8], rbx);
                a.add(r14, 16);
                a.jmp(TestVm.CodeAt);
            });
            Vm.Assemble(fault, 64, a =>
            {
                a.mov(rcx, -1L);
                a.mov(__[r14], rcx);
                a.mov(rcx, cr2);
                a.mov(__[r14 + 8], rcx);
                a.pop(__qword_ptr[r14 + 16]);
                a.pop(__qword_ptr[r14 + 24]);
                a.mov(__[r14 + 32], rbx);
                a.add(r14, 40);
                a.jmp(TestVm.CodeAt);
            });
            Vm.Write64(TestVm.IdtAt + (CallVector * 16), (call & 0xFFFF) | (8UL << 16) | (0xEEUL << 40) | ((call >> 16) << 48));
            Vm.Write64(TestVm.IdtAt + (14 * 16), (fault & 0xFFFF) | (8UL << 16) | (0x8EUL << 40) | ((fault >> 16) << 48));
        }

        // In the first page the beginning of the loop; in each second page the rest, all the same but for the end of the
        // instruction.
        private void Loop(int form, ulong first, ulong adds)
        {
            const ulong behind = At + 0x1000;
            byte[] prefix = Prefix(form, adds, 0, out _);
            ulong start = CrossingAt - (ulong)prefix.Length;
            prefix = Prefix(form, adds, start, out ulong again);
            prefix.Length.Should().Be((int)(CrossingAt - start));
            if (first == First)
            {
                Entry = start + (form == 7 ? 2UL : 0);
            }

            // Both have their entry at the same place.
            prefix.CopyTo(Vm.Memory[(int)(first + (start & 0xFFF))..]);
            byte[] opcode = form switch
            {
                0 => [0xB8, 0x40],
                1 or 7 => [0xE9],
                2 => [0xC7, 0x07],
                3 => [0x0F, 0x85],
                4 => [0xE8],
                5 => [0x66, 0x0F, 0xFE, 0x05],
                _ => [0x81, 0xD3],
            };
            opcode.CopyTo(Vm.Memory[(int)(first + (ulong)_crossing)..]);
            if (first != First)
            {
                // The tails are those of the other.
                return;
            }

            for (int tail = 0; tail < Tails; tail++)
            {
                Span<byte> memory = Vm.Memory.Slice((int)Tail(tail), 0x1000);
                var rest = new byte[4];
                int skipped = form == 0 ? 1 : 0;
                int length = 4 - skipped;
                ulong end = behind + (ulong)length;
                int value = form switch
                {
                    0 or 2 or 6 => Immediate(tail),
                    1 => 0x20 + (tail * 0x20) - 4,
                    3 or 7 => (int)(again + ((tail & 1) == 0 ? 0UL : 4) - end),
                    4 => 0x100 + (tail * 0x20) - 4,
                    _ => 0x200 + (tail * 16) - 4,
                };
                BinaryPrimitives.WriteInt32LittleEndian(rest, value);
                rest.AsSpan(skipped).CopyTo(memory);
                Suffix(form, again, end).CopyTo(memory[length..]);
                for (int i = 0; i < Tails; i++)
                {
                    int number = i + 1;
                    ulong body = behind + 0x20 + ((ulong)i * 0x20);
                    byte[] code = [.. Assemble(body, a => a.mov(eax, number)), .. Common(again, body + 5)];
                    code.Length.Should().BeLessThanOrEqualTo(0x20);
                    code.CopyTo(memory[(0x20 + (i * 0x20))..]);
                    Assemble(0, a =>
                    {
                        a.mov(eax, number);
                        a.ret();
                    }).CopyTo(memory[(0x100 + (i * 0x20))..]);
                    BinaryPrimitives.WriteInt32LittleEndian(memory[(0x200 + (i * 16))..], 7 * number);
                }

                _heads[tail] = memory[..8].ToArray();
            }
        }

        private static byte[] Prefix(int form, ulong adds, ulong start, out ulong again)
        {
            byte[] before = Assemble(start, a =>
            {
                if (form == 7)
                {
                    // The loop ends here: nothing but the instruction's end is in the second page.
                    a.@int(CallVector);
                }

                a.xor(ebx, ebx);
                a.mov(edi, DataAt);
                a.pxor(xmm0, xmm0);
                a.mov(ecx, Rounds);
            });
            again = start + (ulong)before.Length;
            byte[] loop = Assemble(again, a =>
            {
                a.add(rbx, form is 3 or 7 ? 1 : 0);
                if (form is 3 or 7)
                {
                    a.add(rbx, 16);
                    a.dec(ecx);
                    if (form == 7)
                    {
                        a.je(start);
                    }
                }
                else
                {
                    // As long in both first pages.
                    a.db(0x48, 0x81, 0xC3);
                    a.dd((uint)adds);
                    a.cmp(ecx, 3);
                }
            });
            return [.. before, .. loop];
        }

        private static byte[] Suffix(int form, ulong again, ulong at)
        {
            byte[] special = form switch
            {
                2 => Assemble(at, a => a.mov(eax, __dword_ptr[rdi])),
                3 => Assemble(at, a => a.@int(CallVector)),
                5 => Assemble(at, a => a.movd(eax, xmm0)),
                6 => Assemble(at, a => a.mov(eax, 0)),
                _ => [],
            };
            return [.. special, .. Common(again, at + (ulong)special.Length)];
        }

        private static byte[] Common(ulong again, ulong at) => Assemble(at, a =>
        {
            a.add(rbx, rax);
            a.dec(ecx);
            a.jne(again);
            a.@int(CallVector);
        });

        private static byte[] Assemble(ulong at, Action<Assembler> program)
        {
            var assembler = new Assembler(64);
            program(assembler);
            using var stream = new MemoryStream();
            assembler.Assemble(new StreamCodeWriter(stream), at);
            return stream.ToArray();
        }

        private sealed class ActingPort(Action act) : IRegisterWindow
        {
            public uint Length => 1;

            public ulong Read(uint offset, AccessWidth width) => 0;

            public void Write(uint offset, AccessWidth width, ulong value) => act();
        }
    }
}
