// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net.Http;
using System.Net.Sockets;
using System.Text.Json;
using System.Threading;
using System.Threading.Tasks;

namespace Vmm.Fleet;

/// <summary>What the daemon answered.</summary>
/// <param name="Status">HTTP status: 200, 404 no such VM, 409 wrong state, 422 wrong definitions.</param>
/// <param name="Body">The JSON.</param>
public sealed record FleetAnswer(int Status, JsonElement Body)
{
    /// <summary>It was done.</summary>
    public bool IsOk => Status is >= 200 and < 300;

    /// <summary>The daemon's line for people when it was not.</summary>
    public string Error => Body.ValueKind == JsonValueKind.Object && Body.TryGetProperty("error", out JsonElement text)
        ? text.GetString() ?? string.Empty
        : "the daemon gave no reason";
}

/// <summary>The daemon's HTTP interface from the other side. Thread-safe.</summary>
public sealed class FleetClient : IDisposable
{
    private readonly HttpClient _http;

    /// <summary>Makes one; nothing is connected yet.</summary>
    /// <param name="socket">Path of the daemon's socket.</param>
    public FleetClient(string socket)
    {
        SocketPath = socket;
#pragma warning disable CA2000 // the client owns the handler
        var handler = new SocketsHttpHandler
        {
            UseProxy = false,
            ConnectCallback = async (_, cancellation) =>
            {
                Socket connection = await UnixSockets.TryConnectAsync(socket, cancellation).ConfigureAwait(false)
                    ?? throw new IOException($"no daemon listens on {socket}");
                return new NetworkStream(connection, ownsSocket: true);
            },
        };
#pragma warning restore CA2000
        _http = new HttpClient(handler) { BaseAddress = new Uri("http://localhost"), Timeout = Timeout.InfiniteTimeSpan };
    }

    /// <summary>Path of the daemon's socket.</summary>
    public string SocketPath { get; }

    /// <summary>True when a daemon answers.</summary>
    public async Task<bool> IsUpAsync(CancellationToken cancellation)
    {
        using Socket? socket = await UnixSockets.TryConnectAsync(SocketPath, cancellation).ConfigureAwait(false);
        return socket is not null;
    }

    /// <summary>Asks or tells the daemon something.</summary>
    /// <param name="isPost">POST, otherwise GET.</param>
    /// <param name="path">Such as /v1/vms.</param>
    /// <param name="cancellation">Gives up.</param>
    /// <exception cref="IOException">No daemon answers.</exception>
    public async Task<FleetAnswer> CallAsync(bool isPost, string path, CancellationToken cancellation)
    {
        try
        {
            using var request = new HttpRequestMessage(isPost ? HttpMethod.Post : HttpMethod.Get, path);
            using HttpResponseMessage response = await _http.SendAsync(request, cancellation).ConfigureAwait(false);
            string text = await response.Content.ReadAsStringAsync(cancellation).ConfigureAwait(false);
            using JsonDocument document = JsonDocument.Parse(text.Length == 0 ? "{}" : text);
            return new FleetAnswer((int)response.StatusCode, document.RootElement.Clone());
        }
        catch (HttpRequestException failure)
        {
            throw new IOException($"no daemon answers on {SocketPath}", failure);
        }
        catch (JsonException failure)
        {
            throw new IOException($"what answers on {SocketPath} is not the daemon", failure);
        }
    }

    /// <summary>Events as JSON texts, until cancelled or the daemon ends.</summary>
    /// <exception cref="IOException">No daemon answers.</exception>
    public async IAsyncEnumerable<string> EventsAsync(
        [System.Runtime.CompilerServices.EnumeratorCancellation] CancellationToken cancellation)
    {
        Stream stream;
        try
        {
            stream = await _http.GetStreamAsync(new Uri("/v1/events", UriKind.Relative), cancellation).ConfigureAwait(false);
        }
        catch (HttpRequestException failure)
        {
            throw new IOException($"no daemon answers on {SocketPath}", failure);
        }

        using var reader = new StreamReader(stream);
        while (await reader.ReadLineAsync(cancellation).ConfigureAwait(false) is { } line)
        {
            if (line.StartsWith("data: ", StringComparison.Ordinal))
            {
                yield return line["data: ".Length..];
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _http.Dispose();
}
