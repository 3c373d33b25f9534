// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting;
using Microsoft.AspNetCore.Server.Kestrel.Core;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Hosting;
using Microsoft.Extensions.Logging;

namespace Vmm.Fleet.Daemon;

/// <summary>The daemon's interface on its Unix socket.</summary>
internal sealed class HttpServer : IAsyncDisposable
{
    private readonly WebApplication _application;
    private readonly string _path;

    internal HttpServer(FleetDaemon daemon)
    {
        _path = FleetPaths.CheckSocket(daemon.Paths.DaemonSocket);
        File.Delete(_path);
        _application = Build(options => options.ListenUnixSocket(_path));
        new HttpApi(daemon).Map(_application);
    }

    /// <summary>A web server with our limits that leaves signals and standard error to the daemon.</summary>
    internal static WebApplication Build(Action<KestrelServerOptions> listen)
    {
        WebApplicationBuilder builder = WebApplication.CreateSlimBuilder(new WebApplicationOptions { Args = [] });
        builder.Logging.ClearProviders();
        builder.Services.AddSingleton<IHostLifetime, NoLifetime>();
        builder.WebHost.ConfigureKestrel(options =>
        {
            options.AddServerHeader = false;
            options.Limits.MaxRequestBodySize = 1 << 20;
            options.Limits.MaxConcurrentConnections = 256;
            options.Limits.MaxConcurrentUpgradedConnections = 256;
            options.ConfigureEndpointDefaults(endpoint => endpoint.Protocols = HttpProtocols.Http1);
            listen(options);
        });
        return builder.Build();
    }

    internal Task StartAsync(CancellationToken cancellation) => _application.StartAsync(cancellation);

    public async ValueTask DisposeAsync()
    {
        await EndAsync(_application).ConfigureAwait(false);
        File.Delete(_path);
    }

    internal static async Task EndAsync(WebApplication application)
    {
        using var patience = new CancellationTokenSource(TimeSpan.FromSeconds(1));
        try
        {
            await application.StopAsync(patience.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            // Listeners of events stay until they are cut off.
        }

        await application.DisposeAsync().ConfigureAwait(false);
    }

    private sealed class NoLifetime : IHostLifetime
    {
        public Task WaitForStartAsync(CancellationToken cancellationToken) => Task.CompletedTask;

        public Task StopAsync(CancellationToken cancellationToken) => Task.CompletedTask;
    }
}
