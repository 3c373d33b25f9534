// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;

namespace Vmm.Host;

/// <summary>
/// Random numbers of the host's kernel, by getentropy(3), which the three systems have. The base library would ask OpenSSL,
/// which a small host may not have. Thread-safe.
/// </summary>
public static unsafe partial class HostRandom
{
    private const int MostPerCall = 256; // getentropy(3)

    /// <summary>Fills a buffer.</summary>
    /// <exception cref="HostException">The kernel has none, which a system that has booted never says.</exception>
    public static void Fill(Span<byte> into)
    {
        while (into.Length > 0)
        {
            Span<byte> part = into[..Math.Min(into.Length, MostPerCall)];

            // SAFETY: the part is pinned and its own length is passed.
            fixed (byte* first = part)
            {
                if (getentropy(first, (nuint)part.Length) != 0)
                {
                    throw HostException.Last("getentropy");
                }
            }

            into = into[part.Length..];
        }
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial int getentropy(byte* buffer, nuint length);
}
