// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Firmware;
using Vmm.Host;
using Vmm.Machine.Boot;
using Vmm.Memory;

namespace Vmm.Machine;

/// <summary>
/// The file behind UEFI variables: made from the firmware's template when it does not exist, locked against a second VM,
/// and written as the guest changes the flash chip. What was written survives the death of this process at once and a
/// power cut once the last write is a second old.
/// </summary>
internal sealed class VariableStore : IFlashStore, IDisposable
{
    private const int SyncDelayMs = 1000;
    private const long MaximumBytes = 4 << 20;

    private readonly BlockFile _file;
    private readonly Timer _sync;
    private long _errors;

    private VariableStore(BlockFile file, RamBlock content)
    {
        _file = file;
        Content = content;
        _sync = new Timer(_ => _file.Sync());
    }

    /// <summary>The chip's bytes.</summary>
    public RamBlock Content { get; }

    /// <summary>Writes that the host refused; the guest has the variables all the same until it ends.</summary>
    public long Errors => Interlocked.Read(ref _errors);

    /// <summary>Opens the store.</summary>
    /// <param name="path">The file.</param>
    /// <param name="template">What a new one holds; null when there is no template, so that it must exist.</param>
    /// <exception cref="BootException">It cannot be made, opened or used, or another VM has it.</exception>
    public static VariableStore Open(string path, byte[]? template)
    {
        try
        {
            Create(path, template);
            BlockFile file = BlockFile.Open(path, readOnly: false);
            try
            {
                file.Lock();
                return new VariableStore(file, Read(file));
            }
            catch
            {
                file.Dispose();
                throw;
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new BootException($"boot: vars: {e.Message}", isMissingInput: e is FileNotFoundException);
        }
    }

    /// <inheritdoc/>
    public void Write(long offsetBytes, ReadOnlySpan<byte> content)
    {
        if (_file.Write(offsetBytes, content) != BlockStatus.Ok)
        {
            Interlocked.Increment(ref _errors);
        }

        _sync.Change(SyncDelayMs, Timeout.Infinite);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _sync.Dispose();
        _ = _file.Sync();
        _file.Dispose();
        Content.Dispose();
    }

    // Under another name first: a VM that dies here leaves no half of a store.
    private static void Create(string path, byte[]? template)
    {
        if (File.Exists(path))
        {
            return;
        }

        if (template is null)
        {
            throw new FileNotFoundException($"{path} does not exist, and the firmware has no template of it beside it");
        }

        if (Path.GetDirectoryName(path) is { Length: > 0 } directory)
        {
            Directory.CreateDirectory(directory);
        }

        string next = path + ".new";
        File.WriteAllBytes(next, template);
        File.Move(next, path, overwrite: true);
    }

    private static RamBlock Read(BlockFile file)
    {
        long length = file.Length;
        if (length is < FlashChip.EraseBlockBytes or > MaximumBytes || length % FlashChip.EraseBlockBytes != 0)
        {
            throw new BootException(
                $"boot: vars: {file.Path} has {length} bytes; a variable store is a multiple of 4 KiB up to 4 MiB");
        }

        byte[] bytes = new byte[length];
        if (file.Read(0, bytes) != BlockStatus.Ok)
        {
            throw new BootException($"boot: vars: {file.Path}: {file.LastError}");
        }

        var content = new RamBlock("uefi-vars", HostMemory.Allocate(length), (ulong)length);
        _ = content.TryWrite(0, bytes, out _);
        return content;
    }
}
