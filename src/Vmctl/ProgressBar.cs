// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Globalization;

namespace Vmctl;

/// <summary>A bar on standard error for work that takes longer than half a second, where that is a terminal.</summary>
internal sealed class ProgressBar : IProgress<double>, IDisposable
{
    private const int Cells = 40;
    private readonly long _start = System.Diagnostics.Stopwatch.GetTimestamp();
    private readonly CommandContext _context;
    private readonly string _what;
    private int _shown = -1;

    internal ProgressBar(CommandContext context, string what)
    {
        _context = context;
        _what = what.Length > 30 ? what[..30] : what;
    }

    public void Report(double value)
    {
        int percent = (int)(Math.Clamp(value, 0, 1) * 100);
        bool isLong = System.Diagnostics.Stopwatch.GetElapsedTime(_start) > TimeSpan.FromMilliseconds(500);
        if (!_context.IsErrorTerminal || percent == _shown || (_shown < 0 && !isLong))
        {
            return;
        }

        _shown = percent;
        int full = percent * Cells / 100;
        _context.Error.Write(string.Create(
            CultureInfo.InvariantCulture, $"\r{_what} [{new string('#', full)}{new string('.', Cells - full)}] {percent,3}%"));
    }

    /// <summary>Takes the bar away.</summary>
    public void Dispose()
    {
        if (_shown >= 0)
        {
            _context.Error.Write("\r\u001b[K");
        }
    }
}
