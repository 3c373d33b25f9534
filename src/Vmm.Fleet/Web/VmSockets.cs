// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Net.WebSockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Microsoft.AspNetCore.Http;
using Vmm.Config;
using Vmm.Fleet.Daemon;

namespace Vmm.Fleet.Web;

/// <summary>
/// WebSockets (RFC 6455) that carry the bytes of a VM's VNC or console socket, one binary message a piece. Where a VM
/// listens is read from its definition, never from what its process says: a process that a guest has taken over must not be
/// able to point the daemon at other services of the host.
/// </summary>
internal sealed class VmSockets
{
    private const int PieceBytes = 32 << 10;
    private readonly FleetDaemon _daemon;

    internal VmSockets(FleetDaemon daemon)
    {
        _daemon = daemon;
    }

    /// <summary>GET /ws/{name}/screen: RFB (RFC 6143) as the VM's VNC server speaks it.</summary>
    internal async Task ScreenAsync(HttpContext context)
    {
        if (await RunningAsync(context).ConfigureAwait(false) is not { } vm)
        {
            return;
        }

        using Socket? socket = await ConnectScreenAsync(vm, context.RequestAborted).ConfigureAwait(false);
        if (socket is null)
        {
            await HttpApi.WriteErrorAsync(context, 409, $"\"{vm.Name}\" has no screen that can be reached").ConfigureAwait(false);
            return;
        }

        using WebSocket web = await context.WebSockets.AcceptWebSocketAsync().ConfigureAwait(false);
        await JoinAsync(web, socket, context.RequestAborted).ConfigureAwait(false);
    }

    /// <summary>
    /// GET /ws/{name}/console?write=1&amp;force=1: first one text message, {"writer": true|false}, then bytes both ways.
    /// </summary>
    internal async Task ConsoleAsync(HttpContext context)
    {
        if (await RunningAsync(context).ConfigureAwait(false) is not { } vm)
        {
            return;
        }

        using Socket? socket = await UnixSockets.TryConnectAsync(_daemon.Paths.Of(vm.Name).Console, context.RequestAborted).ConfigureAwait(false);
        if (socket is null)
        {
            await HttpApi.WriteErrorAsync(context, 409, $"\"{vm.Name}\" has no console that can be reached").ConfigureAwait(false);
            return;
        }

        bool write = context.Request.Query["write"] == "1";
        bool force = context.Request.Query["force"] == "1";
        string hello = $"{{\"write\": {(write ? "true" : "false")}, \"force\": {(force ? "true" : "false")}, \"tail\": 65536}}\n";
        await socket.SendAsync(Encoding.ASCII.GetBytes(hello), context.RequestAborted).ConfigureAwait(false);
        string? answer = await ReadLineAsync(socket, context.RequestAborted).ConfigureAwait(false);
        if (answer is null)
        {
            await HttpApi.WriteErrorAsync(context, 409, $"\"{vm.Name}\" turned the console away; are there too many watchers?").ConfigureAwait(false);
            return;
        }

        using WebSocket web = await context.WebSockets.AcceptWebSocketAsync().ConfigureAwait(false);
        await web.SendAsync(Encoding.UTF8.GetBytes(answer), WebSocketMessageType.Text, endOfMessage: true, context.RequestAborted).ConfigureAwait(false);
        await JoinAsync(web, socket, context.RequestAborted).ConfigureAwait(false);
    }

    private async Task<VmStatus?> RunningAsync(HttpContext context)
    {
        string name = (string?)context.Request.RouteValues["name"] ?? string.Empty;
        if (!context.WebSockets.IsWebSocketRequest)
        {
            await HttpApi.WriteErrorAsync(context, 426, "this is a WebSocket").ConfigureAwait(false);
            return null;
        }

        if (_daemon.Supervisor.Find(name) is not { } vm)
        {
            await HttpApi.WriteErrorAsync(context, 404, $"no VM is called \"{name}\"").ConfigureAwait(false);
            return null;
        }

        if (vm.Phase is VmPhase.Running or VmPhase.Stopping)
        {
            return vm;
        }

        await HttpApi.WriteErrorAsync(context, 409, $"\"{name}\" is not running").ConfigureAwait(false);
        return null;
    }

    private async Task<Socket?> ConnectScreenAsync(VmStatus vm, CancellationToken cancellation)
    {
        DisplaySpec display = (vm.Running ?? vm.Spec).Display;
        if (display.VncAddress is not { } address)
        {
            return await UnixSockets.TryConnectAsync(display.VncSocket ?? _daemon.Paths.Of(vm.Name).Screen, cancellation).ConfigureAwait(false);
        }

        if (!IPEndPoint.TryParse(address.Replace("localhost", "127.0.0.1", StringComparison.Ordinal), out IPEndPoint? end))
        {
            return null;
        }

        // A server on all addresses is found on loopback.
        IPAddress host = end.Address.Equals(IPAddress.Any) ? IPAddress.Loopback
            : end.Address.Equals(IPAddress.IPv6Any) ? IPAddress.IPv6Loopback
            : end.Address;
        var socket = new Socket(host.AddressFamily, SocketType.Stream, ProtocolType.Tcp) { NoDelay = true };
        try
        {
            await socket.ConnectAsync(new IPEndPoint(host, end.Port), cancellation).ConfigureAwait(false);
            return socket;
        }
        catch (SocketException)
        {
            socket.Dispose();
            return null;
        }
    }

    // Byte by byte up to the line feed: what follows is the console's.
    private static async Task<string?> ReadLineAsync(Socket socket, CancellationToken cancellation)
    {
        var line = new StringBuilder();
        var one = new byte[1];
        while (line.Length < 1000 && await socket.ReceiveAsync(one, cancellation).ConfigureAwait(false) == 1)
        {
            if (one[0] == '\n')
            {
                return line.ToString();
            }

            line.Append((char)one[0]);
        }

        return null;
    }

    // Bytes both ways until either side ends.
    private static async Task JoinAsync(WebSocket web, Socket socket, CancellationToken cancellation)
    {
        using var over = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        Task toVm = ToVmAsync(web, socket, over.Token);
        Task toBrowser = ToBrowserAsync(web, socket, over.Token);
        Task first = await Task.WhenAny(toVm, toBrowser).ConfigureAwait(false);
        if (first == toBrowser && web.State == WebSocketState.Open)
        {
            using var patience = new CancellationTokenSource(TimeSpan.FromSeconds(1));
            try
            {
                await web.CloseOutputAsync(WebSocketCloseStatus.NormalClosure, "the VM has ended", patience.Token).ConfigureAwait(false);
            }
            catch (Exception gone) when (gone is WebSocketException or OperationCanceledException or IOException)
            {
                // Then it knows already.
            }
        }

        await over.CancelAsync().ConfigureAwait(false);
        socket.Dispose();
        await Task.WhenAll(toVm, toBrowser).ConfigureAwait(false);
    }

    private static async Task ToVmAsync(WebSocket web, Socket socket, CancellationToken cancellation)
    {
        var buffer = new byte[PieceBytes];
        try
        {
            while (true)
            {
                ValueWebSocketReceiveResult got = await web.ReceiveAsync(buffer.AsMemory(), cancellation).ConfigureAwait(false);
                if (got.MessageType == WebSocketMessageType.Close)
                {
                    return;
                }

                for (int sent = 0; sent < got.Count;)
                {
                    sent += await socket.SendAsync(buffer.AsMemory(sent, got.Count - sent), cancellation).ConfigureAwait(false);
                }
            }
        }
        catch (Exception end) when (IsEnd(end))
        {
            // Either side has left.
        }
    }

    private static async Task ToBrowserAsync(WebSocket web, Socket socket, CancellationToken cancellation)
    {
        var buffer = new byte[PieceBytes];
        try
        {
            while (await socket.ReceiveAsync(buffer, cancellation).ConfigureAwait(false) is > 0 and int count)
            {
                await web.SendAsync(buffer.AsMemory(0, count), WebSocketMessageType.Binary, endOfMessage: true, cancellation).ConfigureAwait(false);
            }
        }
        catch (Exception end) when (IsEnd(end))
        {
            // Either side has left.
        }
    }

    private static bool IsEnd(Exception failure) =>
        failure is WebSocketException or SocketException or OperationCanceledException or ObjectDisposedException or IOException;
}
