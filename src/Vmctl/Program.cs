// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Text;
using System.Threading.Tasks;

namespace Vmctl;

/// <summary>Entry point.</summary>
internal static class Program
{
    private static async Task<int> Main(string[] arguments)
    {
        // One buffered writer each, UTF-8 without a mark; flushed by the context whatever happens.
        var encoding = new UTF8Encoding(encoderShouldEmitUTF8Identifier: false);
        await using var output = new StreamWriter(Console.OpenStandardOutput(), encoding, 4096);
        await using var error = new StreamWriter(Console.OpenStandardError(), encoding, 256) { AutoFlush = true };
        return await CommandLine.InvokeAsync(arguments, new CommandContext(output, error)).ConfigureAwait(false);
    }
}
