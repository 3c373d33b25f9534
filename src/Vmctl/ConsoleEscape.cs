// SPDX-License-Identifier: BSD-2-Clause
using System;

namespace Vmctl;

/// <summary>What the keys of a user mean for the console as such.</summary>
internal enum EscapeAction
{
    /// <summary>Nothing: the bytes are for the guest.</summary>
    None,

    /// <summary><c>~.</c>: leave.</summary>
    Leave,

    /// <summary><c>~?</c>: list the escapes.</summary>
    Help,
}

/// <summary>
/// Finds cu(1)'s escapes in what a user types. A tilde counts only as the first key of a line: at the start, after a
/// carriage return or a line feed. <c>~~</c> is one tilde for the guest; a tilde followed by anything else is sent as it
/// is, together with what follows. A tilde at a line's start is held back until the next key says what it was.
/// Not thread-safe: one reader.
/// </summary>
internal sealed class ConsoleEscape
{
    private bool _atLineStart = true;
    private bool _tildeHeld;

    /// <summary>What <c>~?</c> shows.</summary>
    internal static ReadOnlySpan<byte> HelpText => "\r\n~.  leave\r\n~~  one tilde\r\n~?  this list\r\n(all at the start of a line)\r\n"u8;

    /// <summary>Most bytes that <see cref="Filter"/> writes for <paramref name="inputBytes"/> bytes.</summary>
    internal static int MaxOutput(int inputBytes) => inputBytes + 1;

    /// <summary>Takes input and gives what the guest gets.</summary>
    /// <param name="input">As typed.</param>
    /// <param name="output">At least <see cref="MaxOutput"/> of the input's length.</param>
    /// <param name="written">Bytes for the guest.</param>
    /// <param name="consumed">Bytes of input that were used; less than all when an action interrupts.</param>
    /// <returns>What to do before the rest of the input is given again.</returns>
    internal EscapeAction Filter(ReadOnlySpan<byte> input, Span<byte> output, out int written, out int consumed)
    {
        written = 0;
        for (consumed = 0; consumed < input.Length;)
        {
            byte key = input[consumed++];
            if (_tildeHeld)
            {
                _tildeHeld = false;
                switch (key)
                {
                    case (byte)'.':
                        return EscapeAction.Leave;
                    case (byte)'?':
                        _atLineStart = true;
                        return EscapeAction.Help;
                    case (byte)'~':
                        break;
                    default:
                        output[written++] = (byte)'~';
                        break;
                }
            }
            else if (_atLineStart && key == (byte)'~')
            {
                _tildeHeld = true;
                _atLineStart = false;
                continue;
            }

            output[written++] = key;
            _atLineStart = key is (byte)'\r' or (byte)'\n';
        }

        return EscapeAction.None;
    }
}
