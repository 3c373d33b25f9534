// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Reflection;
using System.Threading.Tasks;
using Microsoft.AspNetCore.Http;

namespace Vmm.Fleet.Web;

/// <summary>
/// The page's own files, inside the program: what Web/page holds under "/", and, when they were there at build time
/// (Web/fetch brings them), noVNC under "/novnc/" and xterm.js under "/xterm/" with their licences.
/// </summary>
internal static class WebFiles
{
    private const string Prefix = "web/";
    private static readonly Dictionary<string, string> s_resources = Find();

    /// <summary>Paths of the files, such as /app.js.</summary>
    internal static IEnumerable<string> Paths => s_resources.Keys;

    /// <summary>The screen's and the console's scripts are inside.</summary>
    internal static bool HasViewers => s_resources.ContainsKey("/novnc/core/rfb.js") && s_resources.ContainsKey("/xterm/lib/xterm.mjs");

    /// <summary>A file of that path is inside.</summary>
    internal static bool Has(string? path) => path is not null && s_resources.ContainsKey(path);

    /// <summary>Answers with a file.</summary>
    internal static async Task SendAsync(HttpContext context, string path)
    {
        using Stream file = typeof(WebFiles).Assembly.GetManifestResourceStream(s_resources[path])!;
        context.Response.ContentType = Path.GetExtension(path) switch
        {
            "" or ".html" => "text/html; charset=utf-8",
            ".js" or ".mjs" => "text/javascript; charset=utf-8",
            ".css" => "text/css; charset=utf-8",
            ".svg" => "image/svg+xml",
            _ => "text/plain; charset=utf-8",
        };
        context.Response.ContentLength = file.Length;
        context.Response.Headers.CacheControl = "no-cache";
        await file.CopyToAsync(context.Response.Body, context.RequestAborted).ConfigureAwait(false);
    }

    private static Dictionary<string, string> Find()
    {
        Assembly assembly = typeof(WebFiles).Assembly;
        var found = new Dictionary<string, string>(StringComparer.Ordinal);
        foreach (string name in assembly.GetManifestResourceNames())
        {
            if (name.StartsWith(Prefix, StringComparison.Ordinal))
            {
                found["/" + name[Prefix.Length..].Replace('\\', '/')] = name;
            }
        }

        if (found.TryGetValue("/index.html", out string? index))
        {
            found["/"] = index;
        }

        return found;
    }
}
