// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Xunit;

namespace Vmm.Core.Tests;

public sealed class StateTests
{
    [Fact]
    public void CpuState_RoundTrip_KeepsEveryField()
    {
        var state = new CpuState();
        state.Reset(false, 0x800F12);
        state.Gpr[15] = 0x123456789ABCDEF0;
        state.Msrs[0xC0000082] = 0xFFFFFFFF81000000;
        state.Segments[2] = new SegmentState { Selector = 0x2B, Base = 4, Limit = uint.MaxValue, Rights = 0xC0F3 };
        state.EventPending = true;
        state.EventVector = 14;
        state.LocalApic = new byte[1024];
        state.LocalApic[5] = 9;
        var writer = new StateWriter("cpu0");
        state.Save(writer);
        var copy = new CpuState();
        copy.Load(new StateReader("cpu0", writer.ToArray()));
        var again = new StateWriter("cpu0");
        copy.Save(again);
        again.ToArray().Should().Equal(writer.ToArray());
    }

    [Fact]
    public void Reader_Mutations_OnlyThrowStateException()
    {
        var writer = new StateWriter("x");
        writer.Write("a", 1);
        writer.WriteBytes("b", new byte[20]);
        byte[] good = writer.ToArray();
        var random = new Random(1);
        for (int i = 0; i < 20000; i++)
        {
            byte[] bad = good[..random.Next(1, good.Length + 1)];
            bad[random.Next(bad.Length)] = (byte)random.Next(256);
            try
            {
                var reader = new StateReader("x", bad);
                _ = reader.ReadUInt64("a");
                _ = reader.ReadBytes("b");
            }
            catch (StateException)
            {
            }
        }
    }

    [Fact]
    public void Reader_MissingField_NamesIt()
    {
        Action act = () => new StateReader("com1", []).ReadUInt64("ier");
        act.Should().Throw<StateException>().WithMessage("com1.ier*");
    }
}
