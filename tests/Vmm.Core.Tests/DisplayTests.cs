// SPDX-License-Identifier: BSD-2-Clause
using System;
using FluentAssertions;
using Xunit;

namespace Vmm.Core.Tests;

public sealed class DisplayTests
{
    [Fact]
    public void CodePage437_EachCode_HasOneCharacter()
    {
        CodePage437.ToChar((byte)'A').Should().Be('A');
        CodePage437.ToChar(0x01).Should().Be('☺');
        CodePage437.ToChar(0x7F).Should().Be('⌂');
        CodePage437.ToChar(0x80).Should().Be('Ç');
        CodePage437.ToChar(0xC4).Should().Be('─');
        CodePage437.ToChar(0xDB).Should().Be('█');
        CodePage437.ToChar(0xE1).Should().Be('ß');
        CodePage437.ToChar(0xFE).Should().Be('■');
        CodePage437.ToChar(0xFF).Should().NotBe('■');
    }

    [Fact]
    public void HidKeys_ThroughSet1_ComeBack()
    {
        int keys = 0;
        foreach (HidKey key in Enum.GetValues<HidKey>())
        {
            int code = HidKeys.ToSet1(key);
            if (key is HidKey.None or HidKey.NonUsHash)
            {
                continue;
            }

            HidKeys.FromSet1(code).Should().Be(key);
            keys++;
        }

        keys.Should().BeGreaterThan(110);
    }

    [Fact]
    public void Frame_WhenTheSizeStays_KeepsItsPixels()
    {
        var frame = new DisplayFrame();
        frame.Begin(4, 2);
        frame.SizeChanged.Should().BeTrue();
        frame.Pixels[7] = 5;
        frame.Begin(4, 2);
        frame.SizeChanged.Should().BeFalse();
        frame.Pixels[7].Should().Be(5);
        frame.Begin(8, 2);
        frame.Pixels.Should().HaveCount(16).And.OnlyContain(p => p == 0);
    }
}
