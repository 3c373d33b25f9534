// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;

namespace Vmm.Host;

/// <summary>The operating system refused something. The message is one line: what was tried, on what, and why not.</summary>
public sealed class HostException : Exception
{
    /// <summary>Makes one from an error number of this system.</summary>
    /// <param name="what">What was tried, for example <c>open /dev/kvm</c>.</param>
    /// <param name="rawErrno">The number as the system gave it.</param>
    public HostException(string what, int rawErrno)
        : base($"{what}: {Describe(rawErrno)}")
    {
        RawErrno = rawErrno;
        Error = OsAbi.Current.ToErrno(rawErrno);
    }

    /// <summary>Makes one without an error number.</summary>
    public HostException(string message)
        : base(message)
    {
    }

    /// <summary>The error by name.</summary>
    public Errno Error { get; }

    /// <summary>The error as this system numbers it; 0 when there is none.</summary>
    public int RawErrno { get; }

    /// <summary>The system's words for one of its error numbers.</summary>
    public static string Describe(int rawErrno) => Marshal.GetPInvokeErrorMessage(rawErrno);

    internal static HostException Last(string what) => new(what, Marshal.GetLastPInvokeError());
}
