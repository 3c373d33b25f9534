// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Vmm.Core;

namespace Vmm.Host;

// Theory. Executable memory without a page that is writable and executable: an anonymous file is mapped twice, once
// read-write and once read-execute. Hardened hosts may forbid one step or the other (SELinux execmem and execmod, PaX,
// vm.memfd_noexec=2, a noexec /dev/shm, FreeBSD's kern.elf64.allow_wx has no say here because no mapping is W and X).
// TryCreate reports that as a reason, never as an exception: the software CPU then runs with a smaller CPU model.
//
// The anonymous file is memfd_create where libc has it (Linux, FreeBSD 13, illumos since 2024), otherwise an unlinked
// temporary file. Pages are committed on first use, so a generous length costs address space only.

/// <summary>An <see cref="ICodeMemory"/> from two mappings of one anonymous file.</summary>
public sealed partial class CodeMemory : ICodeMemory
{
    private const int ProtRead = 1;
    private const int ProtWrite = 2;
    private const int ProtExec = 4;
    private const int MapShared = 1;
    private const uint MfdCloexec = 1;
    private const uint MfdExec = 0x10;

    private CodeMemory(nint write, nint execute, int lengthBytes)
    {
        WriteAddress = write;
        ExecuteAddress = execute;
        LengthBytes = lengthBytes;
    }

    /// <inheritdoc/>
    public nint WriteAddress { get; private set; }

    /// <inheritdoc/>
    public nint ExecuteAddress { get; private set; }

    /// <inheritdoc/>
    public int LengthBytes { get; }

    /// <summary>Maps code memory.</summary>
    /// <param name="lengthBytes">Length, a positive multiple of 4096.</param>
    /// <param name="reason">Null on success; otherwise one line that says what the host forbids.</param>
    /// <returns>The memory, or null.</returns>
    public static CodeMemory? TryCreate(int lengthBytes, out string? reason)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(lengthBytes);
        ArgumentOutOfRangeException.ThrowIfNotEqual(lengthBytes, lengthBytes & ~4095);
        using SafeFileHandle? file = Open(lengthBytes, out reason);
        if (file is null)
        {
            return null;
        }

        nint length = lengthBytes;
        nint write = Map(0, length, ProtRead | ProtWrite, MapShared, file, 0);
        if (write == -1)
        {
            reason = $"mapping generated code for writing failed: {Marshal.GetLastPInvokeErrorMessage()}";
            return null;
        }

        nint execute = Map(0, length, ProtRead | ProtExec, MapShared, file, 0);
        if (execute == -1)
        {
            reason = $"this host forbids executable shared memory: {Marshal.GetLastPInvokeErrorMessage()}";
            _ = Unmap(write, length);
            return null;
        }

        reason = null;
        return new CodeMemory(write, execute, lengthBytes);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (WriteAddress != 0)
        {
            _ = Unmap(ExecuteAddress, LengthBytes);
            _ = Unmap(WriteAddress, LengthBytes);
            WriteAddress = 0;
            ExecuteAddress = 0;
        }
    }

    private static SafeFileHandle? Open(int lengthBytes, out string? reason)
    {
        SafeFileHandle? file = OpenMemfd() ?? OpenTemporary();
        reason = null;
        if (file is null)
        {
            reason = "no anonymous file for generated code (memfd_create and the temporary directory both failed)";
            return null;
        }

        try
        {
            RandomAccess.SetLength(file, lengthBytes);
            return file;
        }
        catch (IOException e)
        {
            reason = $"sizing the file for generated code failed: {e.Message}";
            file.Dispose();
            return null;
        }
    }

    private static SafeFileHandle? OpenMemfd()
    {
        try
        {
            // MFD_EXEC is Linux 6.3's word for what was always meant; older kernels refuse the unknown flag.
            int fd = MemfdCreate("vmm-code", MfdCloexec | MfdExec);
            if (fd < 0)
            {
                fd = MemfdCreate("vmm-code", MfdCloexec);
            }

            return fd < 0 ? null : new SafeFileHandle(fd, ownsHandle: true);
        }
        catch (EntryPointNotFoundException)
        {
            return null;
        }
    }

    private static SafeFileHandle? OpenTemporary()
    {
        try
        {
            string path = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());
            return File.OpenHandle(
                path, FileMode.CreateNew, FileAccess.ReadWrite, FileShare.None, FileOptions.DeleteOnClose);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    [LibraryImport("libc", EntryPoint = "memfd_create", SetLastError = true,
        StringMarshalling = StringMarshalling.Utf8)]
    private static partial int MemfdCreate(string name, uint flags);

    [LibraryImport("libc", EntryPoint = "mmap", SetLastError = true)]
    private static partial nint Map(nint address, nint length, int protection, int flags, SafeFileHandle file, nint at);

    [LibraryImport("libc", EntryPoint = "munmap", SetLastError = true)]
    private static partial int Unmap(nint address, nint length);
}
