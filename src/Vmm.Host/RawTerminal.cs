// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using Microsoft.Win32.SafeHandles;
using Vmm.Host.Native;

namespace Vmm.Host;

// Theory. A guest's serial console on a terminal needs raw mode: every key goes to the guest, nothing is echoed or
// translated. A user whose terminal stays raw after the program is gone must type blind, so the old settings have to
// come back however the program ends: return, exception, exit, signal, crash of the runtime, SIGKILL.
//
// A process cannot clean up after its own SIGKILL, and signal handlers in a managed program cannot be relied on after a
// crash. So a watcher does it: a shell in a process group of its own that holds the terminal and the reading end of a
// pipe. It remembers the settings (`stty -g`), says that it is ready, and waits. An orderly end restores the settings
// here and tells the watcher to leave; any other end closes the pipe, and the watcher restores. It ignores the
// terminal's signals, SIGTTOU included, so it may set the terminal from the background.
//
// Where there is no shell or stty (a bare initramfs), the program goes on without a watcher and restores on orderly
// ends and on the signals that the runtime can observe. Stop and continue (SIGTSTP from outside, SIGCONT) put raw mode
// back on continue.

/// <summary>A terminal in raw mode for as long as this object lives. One per process and terminal.</summary>
public sealed unsafe class RawTerminal : IDisposable
{
    // No system's struct termios is larger.
    private const int TermiosBytes = 256;

    private readonly Lock _gate = new();
    private readonly byte[] _saved = new byte[TermiosBytes];
    private readonly int _fd;
    private readonly PosixSignalRegistration _onContinue;
    private readonly PosixSignalRegistration[] _onEnd = [];
    private Watcher? _watcher;
    private bool _restored;

    private RawTerminal(int fd)
    {
        _fd = fd;

        // SAFETY: the buffer is larger than any system's struct termios.
        fixed (byte* saved = _saved)
        {
            if (LibC.tcgetattr(fd, saved) != 0)
            {
                throw HostException.Last("read the terminal's settings");
            }
        }

        _watcher = Watcher.TryStart(fd);
        if (_watcher is null)
        {
            _onEnd =
            [
                PosixSignalRegistration.Create(PosixSignal.SIGINT, OnEnd),
                PosixSignalRegistration.Create(PosixSignal.SIGTERM, OnEnd),
                PosixSignalRegistration.Create(PosixSignal.SIGHUP, OnEnd),
                PosixSignalRegistration.Create(PosixSignal.SIGQUIT, OnEnd),
            ];
        }

#pragma warning disable CA1416 // not for Windows: nothing here is
        _onContinue = PosixSignalRegistration.Create(PosixSignal.SIGCONT, OnContinue);
#pragma warning restore CA1416
        AppDomain.CurrentDomain.ProcessExit += OnExit;
        ApplyRaw();
    }

    /// <summary>True while a watcher stands by; false means that a crash or SIGKILL would leave the terminal raw.</summary>
    public bool IsWatched => _watcher is not null;

    /// <summary>True when a descriptor is a terminal.</summary>
    public static bool IsTerminal(int fd) => LibC.isatty(fd) == 1;

    /// <summary>Puts a terminal into raw mode.</summary>
    /// <param name="fd">0 for standard input; it stays open while the object lives.</param>
    /// <exception cref="HostException">It is not a terminal.</exception>
    public static RawTerminal Enter(int fd) => new(fd);

    /// <summary>Size of a terminal in characters.</summary>
    /// <returns>False when the descriptor is not a terminal or does not know its size.</returns>
    public static bool TryGetSize(int fd, out int columns, out int rows)
    {
        // struct winsize: rows, columns, two pixel counts, 16 bits each.
        ushort* size = stackalloc ushort[4];
        bool known = Ioctl.Invoke(fd, OsAbi.Current.Termios.GetWindowSize, (nint)size) == 0 && size[1] != 0;
        rows = known ? size[0] : 0;
        columns = known ? size[1] : 0;
        return known;
    }

    /// <summary>Restores the settings. Any thread, any number of times.</summary>
    public void Dispose()
    {
        Restore();
        _onContinue.Dispose();
        foreach (PosixSignalRegistration registration in _onEnd)
        {
            registration.Dispose();
        }

        AppDomain.CurrentDomain.ProcessExit -= OnExit;
    }

    // What a SIGKILL would do: the pipe closes without a word.
    internal void LoseControlForTest() => _watcher!.Vanish();

    private void ApplyRaw()
    {
        TermiosAbi abi = OsAbi.Current.Termios;
        byte* raw = stackalloc byte[TermiosBytes];
        _saved.CopyTo(new Span<byte>(raw, TermiosBytes));

        // SAFETY: four flag words at the start, control characters within the buffer, on all three systems.
        uint* flags = (uint*)raw;
        flags[0] &= ~abi.RawInputClear;
        flags[1] &= ~abi.RawOutputClear;
        flags[2] = (flags[2] & ~abi.RawControlClear) | abi.RawControlSet;
        flags[3] &= ~abi.RawLocalClear;
        raw[abi.ControlCharsOffset + abi.MinIndex] = 1;
        raw[abi.ControlCharsOffset + abi.TimeIndex] = 0;
        _ = LibC.tcsetattr(_fd, abi.SetNow, raw);
    }

    private void Restore()
    {
        lock (_gate)
        {
            if (_restored)
            {
                return;
            }

            _restored = true;

            // SAFETY: as read by tcgetattr.
            fixed (byte* saved = _saved)
            {
                _ = LibC.tcsetattr(_fd, OsAbi.Current.Termios.SetNow, saved);
            }

            _watcher?.Leave();
            _watcher = null;
        }
    }

    private void OnExit(object? sender, EventArgs arguments) => Restore();

    // The signal's own action follows: these handlers do not cancel it.
    private void OnEnd(PosixSignalContext context) => Restore();

    private void OnContinue(PosixSignalContext context)
    {
        lock (_gate)
        {
            if (!_restored)
            {
                ApplyRaw();
            }
        }
    }

    private sealed class Watcher
    {
        private const string Script =
            "trap '' HUP INT QUIT TERM TTOU TTIN TSTP; s=$(stty -g <&2 2>/dev/null) || exit 1; echo; "
            + "read -r x || stty \"$s\" <&2 2>/dev/null";

        // The shell needs a few milliseconds; a machine that needs longer than this goes on without a watcher.
        private const int ReadyTimeoutMs = 2000;

        private readonly SafeFileHandle _control;
        private readonly int _pid;

        private Watcher(SafeFileHandle control, int pid)
        {
            _control = control;
            _pid = pid;
        }

        internal static Watcher? TryStart(int terminal)
        {
            using var ready = new HostPipe();
            using var control = new HostPipe();
            int readyFd = (int)ready.Writer.DangerousGetHandle();
            int controlFd = (int)control.Reader.DangerousGetHandle();
            if (readyFd < 3 || controlFd < 3)
            {
                return null;
            }

            int pid = Spawn(terminal, controlFd, readyFd);
            ready.Writer.Dispose();
            if (pid <= 0)
            {
                return null;
            }

            Span<byte> answer = stackalloc byte[1];
            bool isReady = PollLoop.WaitReadable(ready.Reader, ReadyTimeoutMs)
                && FileIo.ReadStream(ready.Reader, answer).Bytes == 1;

            // The writing end must outlive this method: its closing is the news of our death.
            var keep = new SafeFileHandle(control.Writer.DangerousGetHandle(), ownsHandle: true);
            control.Writer.SetHandleAsInvalid();
            var watcher = new Watcher(keep, pid);
            if (isReady)
            {
                return watcher;
            }

            watcher.Leave();
            return null;
        }

        internal void Leave()
        {
            _ = FileIo.WriteStream(_control, "\n"u8);
            _control.Dispose();
            _ = LibC.waitpid(_pid, null, 0);
        }

        internal void Vanish() => _control.Dispose();

        private static int Spawn(int terminal, int control, int ready)
        {
            const short SetProcessGroup = 2;
            const int OpaqueBytes = 1024;
            byte* actions = stackalloc byte[OpaqueBytes];
            byte* attributes = stackalloc byte[OpaqueBytes];
            byte[] shell = Encoding.UTF8.GetBytes("/bin/sh\0");
            byte[] option = Encoding.UTF8.GetBytes("-c\0");
            byte[] script = Encoding.UTF8.GetBytes(Script + "\0");
            byte[] path = Encoding.UTF8.GetBytes("PATH=/usr/bin:/bin:/usr/sbin:/sbin\0");
            int pid = 0;

            // SAFETY: all strings are zero-terminated and pinned; the opaque objects fit (the largest is 336 bytes).
            fixed (byte* shellText = shell, optionText = option, scriptText = script, pathText = path)
            {
                byte** arguments = stackalloc byte*[] { shellText, optionText, scriptText, null };
                byte** environment = stackalloc byte*[] { pathText, null };
                _ = LibC.posix_spawn_file_actions_init(actions);
                _ = LibC.posix_spawn_file_actions_adddup2(actions, terminal, 2);
                _ = LibC.posix_spawn_file_actions_adddup2(actions, control, 0);
                _ = LibC.posix_spawn_file_actions_adddup2(actions, ready, 1);
                _ = LibC.posix_spawnattr_init(attributes);
                _ = LibC.posix_spawnattr_setflags(attributes, SetProcessGroup);
                _ = LibC.posix_spawnattr_setpgroup(attributes, 0);
                int error = LibC.posix_spawn(&pid, shellText, actions, attributes, arguments, environment);
                _ = LibC.posix_spawn_file_actions_destroy(actions);
                _ = LibC.posix_spawnattr_destroy(attributes);
                return error == 0 ? pid : -1;
            }
        }
    }
}
