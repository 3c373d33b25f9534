// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;

namespace Vmm.Backends.CloudInit;

/// <summary>What a guest's first boot is told (cloud-init's NoCloud data source).</summary>
public sealed record CloudInitOptions
{
    /// <summary>Host name.</summary>
    public required string HostName { get; init; }

    /// <summary>Public keys of the default user, as in authorized_keys.</summary>
    public IReadOnlyList<string> SshKeys { get; init; } = [];

    /// <summary>user-data as it is; null for an empty cloud-config.</summary>
    public byte[]? UserData { get; init; }

    /// <summary>network-config as it is; null to let the guest use DHCP.</summary>
    public byte[]? Network { get; init; }
}

/// <summary>
/// Makes the seed CD: volume "cidata" with meta-data, user-data and perhaps network-config. The instance identifier
/// follows from the content, so that a changed definition is a new instance to cloud-init and an unchanged one is not.
/// </summary>
public static class CloudInitSeed
{
    private const string EmptyUserData = "#cloud-config\n{}\n";

    // The content alone decides about the bytes: a fixed time, the one that CDs cannot be older than.
    private static readonly DateTimeOffset s_time = new(1980, 1, 1, 0, 0, 0, TimeSpan.Zero);

    /// <summary>Makes the image.</summary>
    public static byte[] Build(CloudInitOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        byte[] userData = options.UserData ?? Encoding.UTF8.GetBytes(EmptyUserData);
        var files = new List<IsoFile>
        {
            new("meta-data", Encoding.UTF8.GetBytes(MetaData(options, userData))),
            new("user-data", userData),
        };
        if (options.Network is { } network)
        {
            files.Add(new IsoFile("network-config", network));
        }

        return IsoImage.Build("cidata", files, s_time);
    }

    private static string MetaData(CloudInitOptions options, byte[] userData)
    {
        // Strings in JSON's quotes are YAML (YAML 1.2 §7.3.1), whatever is in them.
        var text = new StringBuilder();
        text.Append(CultureInfo.InvariantCulture, $"local-hostname: {Quote(options.HostName)}\n");
        if (options.SshKeys.Count > 0)
        {
            text.Append("public-keys:\n");
            foreach (string key in options.SshKeys)
            {
                text.Append(CultureInfo.InvariantCulture, $"  - {Quote(key.Trim())}\n");
            }
        }

        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        hash.AppendData(Encoding.UTF8.GetBytes(text.ToString()));
        hash.AppendData(userData);
        hash.AppendData(options.Network ?? []);
        string digest = Convert.ToHexStringLower(hash.GetHashAndReset())[..16];
        return string.Create(CultureInfo.InvariantCulture, $"instance-id: \"i-{digest}\"\n{text}");
    }

    private static string Quote(string text) => $"\"{JsonEncodedText.Encode(text)}\"";
}
