// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting.Server;
using Microsoft.AspNetCore.Hosting.Server.Features;
using Microsoft.AspNetCore.Http;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Fleet.Daemon;

namespace Vmm.Fleet.Web;

// Theory. The daemon's Unix socket is guarded by the file system; a TCP port is open to every program of the host, to
// every page that a browser of the host shows, and to whoever the network lets in. So the web page
//
//   - is off unless `vmctl daemon --web` asks for it, and listens on loopback unless told otherwise;
//   - wants a token: 256 random bits in a file that only the daemon's user can read. `vmctl web` prints an address with the
//     token behind "#", which browsers do not send; the page trades it at POST /session for a cookie that scripts cannot
//     read (HttpOnly) and that other sites cannot use (SameSite=Strict). Programs send "Authorization: Bearer TOKEN".
//     The cookie's value is an HMAC of the token, so a new daemon accepts it and a new token ends all sessions;
//   - takes no request whose Host is not the one that it listens on (a name that an attacker points at 127.0.0.1), and
//     no change or WebSocket whose Origin is another site's;
//   - gives only its own files and scripts a chance to run (Content-Security-Policy).
//
// Without the token there are the page's own files, which hold nothing, and POST /session. Behind it are the same routes as
// on the Unix socket, and two kinds of WebSocket that carry bytes: /ws/NAME/screen (VNC) and /ws/NAME/console.
// There is no TLS here: for a network, put a proxy in front that has it.

/// <summary>What the web page is told.</summary>
/// <param name="EndPoint">Where it listens; port 0 takes any.</param>
/// <param name="TokenFile">Holds the token; made when it is not there.</param>
/// <param name="AddressFile">Gets the address that it listens on while it does.</param>
public sealed record WebOptions(IPEndPoint EndPoint, string TokenFile, string AddressFile);

/// <summary>Serves the web page and the interface behind it over TCP; see the head of this file.</summary>
internal sealed class WebServer : IAsyncDisposable
{
    private const string CookieName = "vmm";
    private const int TokenBytes = 32;

    private const string Policy =
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self'; "
        + "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

    private readonly FleetDaemon _daemon;
    private readonly WebOptions _options;
    private readonly WebApplication _application;
    private readonly byte[] _token;
    private readonly string _cookie;
    private readonly VmSockets _sockets;

    /// <summary>Makes one and its token.</summary>
    /// <exception cref="IOException">The token cannot be kept.</exception>
    internal WebServer(FleetDaemon daemon, WebOptions options)
    {
        _daemon = daemon;
        _options = options;
        _token = Encoding.ASCII.GetBytes(ReadOrMakeToken(options.TokenFile));
        _cookie = Convert.ToHexStringLower(HMACSHA256.HashData(_token, "vmm session"u8));
        _sockets = new VmSockets(daemon);
        _application = HttpServer.Build(kestrel => kestrel.Listen(options.EndPoint));
        _application.UseWebSockets();
        _application.Use(GuardAsync);
        foreach (string path in WebFiles.Paths)
        {
            _application.MapGet(path, context => WebFiles.SendAsync(context, path));
        }

        _application.MapPost("/session", OpenSessionAsync);
        _application.MapPost("/session/end", context =>
        {
            context.Response.Cookies.Delete(CookieName);
            return HttpApi.WriteJsonAsync(context, 200, static _ => { });
        });
        new HttpApi(daemon).Map(_application);
        _application.MapGet("/ws/{name}/screen", _sockets.ScreenAsync);
        _application.MapGet("/ws/{name}/console", _sockets.ConsoleAsync);
    }

    /// <summary>Reads a token; makes one that only this user can read when there is none.</summary>
    /// <exception cref="IOException">The file cannot be read or made, or holds no token.</exception>
    internal static string ReadOrMakeToken(string path)
    {
        if (!File.Exists(path))
        {
            string made = Convert.ToHexStringLower(RandomNumberGenerator.GetBytes(TokenBytes));
            var options = new FileStreamOptions
            {
                Mode = FileMode.CreateNew,
                Access = FileAccess.Write,
                UnixCreateMode = UnixFileMode.UserRead | UnixFileMode.UserWrite,
            };
            using var file = new FileStream(path, options);
            file.Write(Encoding.ASCII.GetBytes(made + "\n"));
            return made;
        }

        string token = File.ReadAllText(path).Trim();
        return token.Length >= 2 * TokenBytes ? token : throw new IOException($"{path}: holds no token; remove it and a new one is made");
    }

    internal async Task StartAsync(CancellationToken cancellation)
    {
        await _application.StartAsync(cancellation).ConfigureAwait(false);
        VmProcess.WriteWhole(_options.AddressFile, Address() + "\n");
    }

    /// <summary>Where it listens, such as http://127.0.0.1:7117; with the port that port 0 became.</summary>
    internal string Address()
    {
        ICollection<string>? addresses = _application.Services.GetRequiredService<IServer>().Features.Get<IServerAddressesFeature>()?.Addresses;
        foreach (string address in addresses ?? [])
        {
            return address;
        }

        return "http://" + _options.EndPoint;
    }

    public async ValueTask DisposeAsync()
    {
        File.Delete(_options.AddressFile);
        await HttpServer.EndAsync(_application).ConfigureAwait(false);
    }

    // Before everything else: who asks, from where, and for what.
    private Task GuardAsync(HttpContext context, RequestDelegate next)
    {
        IHeaderDictionary headers = context.Response.Headers;
        headers.ContentSecurityPolicy = Policy;
        headers.XContentTypeOptions = "nosniff";
        headers["Referrer-Policy"] = "no-referrer";
        headers["Cross-Origin-Resource-Policy"] = "same-origin";
        HttpRequest request = context.Request;
        if (IPAddress.IsLoopback(_options.EndPoint.Address) && !IsLoopbackName(request.Host.Host))
        {
            return HttpApi.WriteErrorAsync(context, 421, $"this is not \"{request.Host.Host}\"");
        }

        bool isHarmless = HttpMethods.IsGet(request.Method) && !context.WebSockets.IsWebSocketRequest;
        string? origin = request.Headers.Origin;
        if (!isHarmless && origin is not null && !string.Equals(origin, $"{request.Scheme}://{request.Host}", StringComparison.OrdinalIgnoreCase))
        {
            return HttpApi.WriteErrorAsync(context, 403, "another site asks this");
        }

        bool isOpen = request.Path == "/session" || WebFiles.Has(request.Path);
        return isOpen || IsKnown(request)
            ? next(context)
            : HttpApi.WriteErrorAsync(context, 401, "the token is missing or wrong; \"vmctl web\" prints an address that has it");
    }

    private static bool IsLoopbackName(string host) =>
        host is "localhost" || (IPAddress.TryParse(host.Trim('[', ']'), out IPAddress? address) && IPAddress.IsLoopback(address));

    private bool IsKnown(HttpRequest request)
    {
        string? bearer = request.Headers.Authorization;
        if (bearer is not null && bearer.StartsWith("Bearer ", StringComparison.OrdinalIgnoreCase))
        {
            return IsToken(bearer["Bearer ".Length..].Trim());
        }

        return request.Cookies[CookieName] is { } cookie
            && CryptographicOperations.FixedTimeEquals(Encoding.UTF8.GetBytes(cookie), Encoding.ASCII.GetBytes(_cookie));
    }

    private bool IsToken(string text) => CryptographicOperations.FixedTimeEquals(Encoding.UTF8.GetBytes(text), _token);

    // The body is the token alone.
    private async Task OpenSessionAsync(HttpContext context)
    {
        var buffer = new byte[256];
        int count = await context.Request.Body.ReadAtLeastAsync(buffer, buffer.Length, throwOnEndOfStream: false, context.RequestAborted).ConfigureAwait(false);
        if (!IsToken(Encoding.UTF8.GetString(buffer, 0, count).Trim()))
        {
            await HttpApi.WriteErrorAsync(context, 401, "that is not the token; \"vmctl web\" prints an address that has it").ConfigureAwait(false);
            return;
        }

        context.Response.Cookies.Append(CookieName, _cookie, new CookieOptions
        {
            HttpOnly = true,
            SameSite = SameSiteMode.Strict,
            Path = "/",
            IsEssential = true,
        });
        await HttpApi.WriteJsonAsync(context, 200, static _ => { }).ConfigureAwait(false);
    }
}
