// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Text;
using FluentAssertions;
using Xunit;

namespace Vmctl.Tests;

/// <summary>cu(1): a tilde is an escape only as the first key of a line.</summary>
public sealed class ConsoleEscapeTests
{
    [Theory]
    [InlineData("abc", "abc", "")]
    [InlineData("~.", "", "L")]
    [InlineData("a\r~.", "a\r", "L")]
    [InlineData("a\n~.", "a\n", "L")]
    [InlineData("a~.", "a~.", "")]
    [InlineData("\r~~.", "\r~.", "")]
    [InlineData("\r~~\r~.", "\r~\r", "L")]
    [InlineData("\r~x", "\r~x", "")]
    [InlineData("\r~\r~.", "\r~\r", "L")]
    [InlineData("~?", "", "H")]
    [InlineData("~?~.", "", "HL")]
    [InlineData("~", "", "")]
    [InlineData("ls ~/\r", "ls ~/\r", "")]
    public void Keys_MeanWhatCuTakesThemFor(string typed, string forGuest, string actions)
    {
        // Whatever the pieces in which a terminal delivers them.
        for (int piece = 1; piece <= typed.Length; piece++)
        {
            var (guest, seen) = Feed(typed, piece);
            guest.Should().Be(forGuest);
            seen.Should().Be(actions);
        }
    }

    [Fact]
    public void RandomKeys_NeverOverflowTheOutput()
    {
        var random = new Random(7);
        var escape = new ConsoleEscape();
        ReadOnlySpan<byte> alphabet = "~.?\r\nx"u8;
        for (int round = 0; round < 100_000; round++)
        {
            var input = new byte[random.Next(0, 5)];
            for (int i = 0; i < input.Length; i++)
            {
                input[i] = alphabet[random.Next(alphabet.Length)];
            }

            var output = new byte[ConsoleEscape.MaxOutput(input.Length)];
            escape.Filter(input, output, out int written, out int consumed);
            written.Should().BeLessThanOrEqualTo(output.Length);
            consumed.Should().BeLessThanOrEqualTo(input.Length);
        }
    }

    private static (string Guest, string Actions) Feed(string typed, int piece)
    {
        var escape = new ConsoleEscape();
        var guest = new StringBuilder();
        var actions = new StringBuilder();
        byte[] keys = Encoding.ASCII.GetBytes(typed);
        for (int at = 0; at < keys.Length;)
        {
            ReadOnlySpan<byte> input = keys.AsSpan(at, Math.Min(piece, keys.Length - at));
            var output = new byte[ConsoleEscape.MaxOutput(input.Length)];
            EscapeAction action = escape.Filter(input, output, out int written, out int consumed);
            guest.Append(Encoding.ASCII.GetString(output, 0, written));
            at += consumed;
            if (action != EscapeAction.None)
            {
                actions.Append(action == EscapeAction.Leave ? 'L' : 'H');
                if (action == EscapeAction.Leave)
                {
                    break;
                }
            }
        }

        return (guest.ToString(), actions.ToString());
    }
}
