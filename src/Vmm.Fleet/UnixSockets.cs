// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;

namespace Vmm.Fleet;

/// <summary>Unix stream sockets by path.</summary>
public static class UnixSockets
{
    /// <summary>Listens; a file that a dead process left is replaced.</summary>
    /// <exception cref="IOException">The path cannot be bound.</exception>
    public static Socket Listen(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        FleetPaths.CheckSocket(path);
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            File.Delete(path);
            socket.Bind(new UnixDomainSocketEndPoint(path));
            socket.Listen(16);
            return socket;
        }
        catch (SocketException failure)
        {
            socket.Dispose();
            throw new IOException($"{path}: {failure.Message}", failure);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>Connects, or gives null when nobody listens there.</summary>
    /// <exception cref="OperationCanceledException">The token was cancelled.</exception>
    public static async Task<Socket?> TryConnectAsync(string path, CancellationToken cancellation)
    {
        ArgumentNullException.ThrowIfNull(path);
        if (!File.Exists(path) || System.Text.Encoding.UTF8.GetByteCount(path) > 107)
        {
            return null;
        }

        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            await socket.ConnectAsync(new UnixDomainSocketEndPoint(path), cancellation).ConfigureAwait(false);
            return socket;
        }
        catch (SocketException)
        {
            socket.Dispose();
            return null;
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }
}
