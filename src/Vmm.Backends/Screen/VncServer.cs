// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Security;
using System.Net.Sockets;
using System.Security.Authentication;
using System.Security.Cryptography;
using System.Security.Cryptography.X509Certificates;
using System.Text;
using System.Threading;
using Vmm.Backends.Char;
using Vmm.Core;

namespace Vmm.Backends.Screen;

// Theory. A screen over the network for any number of viewers: RFB 3.8 (RFC 6143) with the extensions that viewers of
// today use. Each viewer has two threads, one that reads its messages and one that sends; the sending thread owns a
// frame of its own, so a slow viewer slows nobody else. Nothing is done while no viewer waits for an update: the card is
// asked for its picture at most 30 times a second, and only then.
//
// A viewer's first bytes tell what it is. Viewers of RFB wait for the server to speak; a browser sends an HTTP request
// (a WebSocket, RFC 6455), and a TLS greeting is a browser with wss:. So the server listens a moment before it greets.
//
// Security. Without a password the server is for loopback and Unix sockets, which is where a definition puts it unless it
// says otherwise. With a certificate only VeNCrypt is offered (X509None or X509Vnc), so that nobody is talked down to
// plain text. A failed password costs two seconds. Pages of other origins are refused.

/// <summary>What a VNC server is to do.</summary>
public sealed record VncOptions
{
    /// <summary>Name shown by viewers.</summary>
    public string Name { get; init; } = "vmm";

    /// <summary>Password, of which eight characters count; null for none.</summary>
    public string? Password { get; init; }

    /// <summary>Certificate with private key; null for no TLS.</summary>
    public X509Certificate2? Certificate { get; init; }

    /// <summary>Most viewers at once.</summary>
    public int MaxViewers { get; init; } = 16;
}

/// <summary>A VNC server for one screen.</summary>
public sealed class VncServer : IDisposable
{
    private const int GreetingMs = 100;
    private const int HandshakeMs = 30_000;
    private const int FailureMs = 2000;

    private readonly Lock _gate = new();
    private readonly IDisplaySurface _surface;
    private readonly ScreenInput _input;
    private readonly VncOptions _options;
    private readonly List<Socket> _listeners = [];
    private readonly List<string> _paths = [];
    private readonly HashSet<VncViewer> _viewers = [];
    private readonly ManualResetEventSlim _stop = new();
    private bool _stopping;
    private long _refused;

    /// <summary>Makes a server; it serves once it listens.</summary>
    public VncServer(IDisplaySurface surface, ScreenInput input, VncOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        _surface = surface;
        _input = input;
        _options = options;
    }

    /// <summary>Viewers that are connected now.</summary>
    public int Viewers
    {
        get
        {
            lock (_gate)
            {
                return _viewers.Count;
            }
        }
    }

    /// <summary>Connections that were turned away or failed to authenticate.</summary>
    public long Refused => Interlocked.Read(ref _refused);

    /// <summary>Listens on TCP.</summary>
    /// <param name="address">Address and port; port 0 takes a free one.</param>
    /// <returns>Where it listens.</returns>
    /// <exception cref="IOException">The address is taken or not of this host.</exception>
    public IPEndPoint Listen(IPEndPoint address)
    {
        ArgumentNullException.ThrowIfNull(address);
        var listener = new Socket(address.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            listener.Bind(address);
            listener.Listen(16);
        }
        catch (SocketException e)
        {
            listener.Dispose();
            throw new IOException($"vnc: {address}: {e.Message}", e);
        }

        Serve(listener);
        return (IPEndPoint)listener.LocalEndPoint!;
    }

    /// <summary>Listens on a Unix socket, mode 0600.</summary>
    /// <exception cref="IOException">The path is taken or cannot be made.</exception>
    public void ListenUnix(string path)
    {
        Socket listener = UnixSocketListener.Listen(path);
        _paths.Add(path);
        Serve(listener);
    }

    /// <summary>Stops listening and hangs up.</summary>
    public void Dispose()
    {
        VncViewer[] viewers;
        lock (_gate)
        {
            if (_stopping)
            {
                return;
            }

            _stopping = true;
            _stop.Set();
            viewers = [.. _viewers];
        }

        foreach (Socket listener in _listeners)
        {
            listener.Dispose();
        }

        foreach (VncViewer viewer in viewers)
        {
            viewer.Dispose();
        }

        foreach (string path in _paths)
        {
            File.Delete(path);
        }
    }

    internal void Leave(VncViewer viewer)
    {
        lock (_gate)
        {
            _viewers.Remove(viewer);
        }
    }

    private void Serve(Socket listener)
    {
        lock (_gate)
        {
            _listeners.Add(listener);
        }

        new Thread(() => Accept(listener)) { Name = "vnc-accept", IsBackground = true }.Start();
    }

    private void Accept(Socket listener)
    {
        while (true)
        {
            Socket socket;
            try
            {
                socket = listener.Accept();
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                lock (_gate)
                {
                    if (_stopping)
                    {
                        return;
                    }
                }

                // Out of descriptors, or a connection that was gone already.
                _ = _stop.Wait(50);
                continue;
            }

            if (Viewers >= _options.MaxViewers)
            {
                Interlocked.Increment(ref _refused);
                socket.Dispose();
                continue;
            }

            new Thread(() => Run(socket)) { Name = "vnc-viewer", IsBackground = true }.Start();
        }
    }

    private void Run(Socket socket)
    {
        VncViewer? viewer = null;
        Stream? stream = null;
        try
        {
            if (socket.AddressFamily != AddressFamily.Unix)
            {
                socket.NoDelay = true;
            }

            socket.ReceiveTimeout = HandshakeMs;
            socket.SendTimeout = HandshakeMs;
            stream = Recognize(socket);
            stream = Greet(stream);
            socket.ReceiveTimeout = 0;
            viewer = new VncViewer(this, stream, _surface, _input, _options.Name);
            lock (_gate)
            {
                if (_stopping)
                {
                    return;
                }

                _viewers.Add(viewer);
            }

            viewer.Run();
        }
        catch (Exception e) when (e is IOException or SocketException or ObjectDisposedException or AuthenticationException
            or InvalidDataException)
        {
            // The viewer is gone or does not speak RFB.
            Interlocked.Add(ref _refused, viewer is null ? 1 : 0);
        }
        finally
        {
            viewer?.Dispose();
            stream?.Dispose();
            socket.Dispose();
        }
    }

    private Stream Recognize(Socket socket)
    {
        Stream stream = new NetworkStream(socket, ownsSocket: true);
        if (!socket.Poll(GreetingMs * 1000, SelectMode.SelectRead))
        {
            return stream;
        }

        byte[] first = new byte[1];
        if (socket.Receive(first, SocketFlags.Peek) != 1)
        {
            return stream;
        }

        if (first[0] == 0x16 && _options.Certificate is { } certificate)
        {
            stream = Secure(stream, certificate);
            return WebSocketStream.Accept(stream);
        }

        return first[0] == (byte)'G' ? WebSocketStream.Accept(stream) : stream;
    }

    private static SslStream Secure(Stream stream, X509Certificate2 certificate)
    {
        var secure = new SslStream(stream, leaveInnerStreamOpen: false);
        secure.AuthenticateAsServer(certificate, clientCertificateRequired: false, checkCertificateRevocation: false);
        return secure;
    }

    // Versions and security (RFC 6143 §7.1, VeNCrypt 0.2).
    private Stream Greet(Stream stream)
    {
        stream.Write("RFB 003.008\n"u8);
        byte[] version = new byte[12];
        stream.ReadExactly(version);
        if (!version.AsSpan().StartsWith("RFB 003."u8))
        {
            throw new InvalidDataException("not RFB");
        }

        int minor = version[10] - '0';
        bool isOld = minor is not (7 or 8);
        bool isTls = _options.Certificate is not null;
        bool hasPassword = _options.Password is not null;
        int type = isTls ? 19 : hasPassword ? 2 : 1;
        if (isOld)
        {
            if (isTls)
            {
                Fail(stream, "this server needs VeNCrypt");
            }

            stream.Write([0, 0, 0, (byte)type]);
        }
        else
        {
            stream.Write([1, (byte)type]);
            if (stream.ReadByte() != type)
            {
                throw new InvalidDataException("unexpected security type");
            }
        }

        if (isTls)
        {
            stream = StartVeNCrypt(stream, hasPassword);
        }

        if (hasPassword)
        {
            CheckPassword(stream, minor);
        }
        else if (isTls || minor == 8)
        {
            stream.Write([0, 0, 0, 0]);
        }

        return stream;
    }

    private SslStream StartVeNCrypt(Stream stream, bool hasPassword)
    {
        stream.Write([0, 2]);
        byte[] version = new byte[2];
        stream.ReadExactly(version);
        if (version[0] != 0 || version[1] != 2)
        {
            stream.Write([1]);
            throw new InvalidDataException("unknown VeNCrypt version");
        }

        // 260 X509None, 261 X509Vnc.
        byte sub = hasPassword ? (byte)5 : (byte)4;
        stream.Write([0, 1, 0, 0, 1, sub]);
        byte[] chosen = new byte[4];
        stream.ReadExactly(chosen);
        if (!chosen.AsSpan().SequenceEqual((ReadOnlySpan<byte>)[0, 0, 1, sub]))
        {
            stream.Write([0]);
            throw new InvalidDataException("unexpected VeNCrypt type");
        }

        stream.Write([1]);
        return Secure(stream, _options.Certificate!);
    }

    private void CheckPassword(Stream stream, int minor)
    {
        byte[] challenge = RandomNumberGenerator.GetBytes(16);
        stream.Write(challenge);
        byte[] response = new byte[16];
        stream.ReadExactly(response);
        byte[] expected = VncDes.Respond(Encoding.Latin1.GetBytes(_options.Password!), challenge);
        if (CryptographicOperations.FixedTimeEquals(response, expected))
        {
            stream.Write([0, 0, 0, 0]);
            return;
        }

        _ = _stop.Wait(FailureMs);
        stream.Write([0, 0, 0, 1]);
        if (minor == 8)
        {
            WriteText(stream, "wrong password");
        }

        throw new InvalidDataException("wrong password");
    }

    private static void Fail(Stream stream, string reason)
    {
        stream.Write([0, 0, 0, 0]);
        WriteText(stream, reason);
        throw new InvalidDataException(reason);
    }

    private static void WriteText(Stream stream, string text)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        stream.Write([0, 0, 0, (byte)bytes.Length]);
        stream.Write(bytes);
    }
}
