// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using Vmm.Backends.Char;
using Vmm.Config;
using Vmm.Core;
using Vmm.Host;

namespace Vmm.Machine;

/// <summary>
/// Makes the host ends of serial ports and consoles. Behind each stands a multiplexer with a log of the last output, so that
/// people can look and type from elsewhere whatever the definition says.
/// </summary>
internal sealed class CharFactory(ICharBackend? stdio, Func<string, string>? logFile) : IDisposable
{
    private readonly Dictionary<string, CharMultiplexer> _ends = new(StringComparer.Ordinal);
    private PollLoop? _loop;
    private bool _stdioTaken;

    /// <summary>All ends by device ("com1").</summary>
    public IReadOnlyDictionary<string, CharMultiplexer> Ends => _ends;

    private PollLoop Loop => _loop ??= new PollLoop("char");

    /// <summary>Makes the end of a device.</summary>
    public ICharBackend Make(string device, CharSpec spec)
    {
        string? log = spec.Kind == CharKind.Log ? logFile?.Invoke(device) : null;
        var end = new CharMultiplexer(new CharLog(log), Open(spec));
        _ends.Add(device, end);
        return end;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (CharMultiplexer end in _ends.Values)
        {
            end.Dispose();
        }

        _loop?.Dispose();
    }

    private ICharBackend? Open(CharSpec spec)
    {
        switch (spec.Kind)
        {
            case CharKind.Stdio when !_stdioTaken:
                _stdioTaken = true;
                return stdio;
            case CharKind.Pty:
                return new PtyCharBackend(Loop);
            case CharKind.Unix:
                return new UnixSocketCharBackend(Loop, spec.Path!);
            case CharKind.File:
                return new FileCharBackend(spec.Path!);
            default:
                return null;
        }
    }
}
