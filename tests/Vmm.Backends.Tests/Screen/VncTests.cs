// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.IO.Compression;
using System.Net;
using System.Net.Security;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Security.Cryptography.X509Certificates;
using System.Text;
using System.Threading;
using BigGustave;
using FluentAssertions;
using Vmm.Backends.Screen;
using Vmm.Core;
using Xunit;

namespace Vmm.Backends.Tests.Screen;

public sealed class VncTests : IDisposable
{
    private readonly FakeSurface _surface = new(320, 200);
    private readonly FakeKeyboard _keyboard = new();
    private readonly FakePointer _pointer = new();
    private readonly TempDirectory _temp = new();
    private VncServer? _server;

    public void Dispose()
    {
        _server?.Dispose();
        _temp.Dispose();
    }

    [Theory]
    [InlineData(RfbEncoders.Raw, 32, false)]
    [InlineData(RfbEncoders.Zrle, 32, false)]
    [InlineData(RfbEncoders.Tight, 32, false)]
    [InlineData(RfbEncoders.Raw, 16, false)]
    [InlineData(RfbEncoders.Zrle, 16, true)]
    [InlineData(RfbEncoders.Tight, 16, false)]
    [InlineData(RfbEncoders.Zrle, 32, true)]
    [InlineData(RfbEncoders.Raw, 8, false)]
    public void Updates_OfAllKinds_ArePixelEqual(int encoding, int bits, bool isBigEndian)
    {
        using Client client = Connect();
        client.SetFormat(bits, isBigEndian);
        client.SetEncodings(encoding, RfbEncoders.CopyRect);
        var random = new Random(encoding + bits);
        client.Update(incremental: false);
        client.ShouldShow(_surface);
        for (int i = 0; i < 40; i++)
        {
            switch (random.Next(6))
            {
                case 0:
                    _surface.Scroll(16);
                    break;
                case 1:
                    _surface.Noise(random, random.Next(200), random.Next(150), random.Next(1, 120), random.Next(1, 50));
                    break;
                case 2:
                    _surface.Fill(random.Next(200), random.Next(150), random.Next(1, 120), random.Next(1, 50), (uint)random.Next(1 << 24));
                    break;
                case 3:
                    _surface.Scroll(-8);
                    break;
                default:
                    _surface.Text(random, random.Next(2, 20), random.Next(200), random.Next(150));
                    break;
            }

            // Something always changes: an update is sent only then.
            _surface.Fill(319, 199, 1, 1, i % 2 == 0 ? 0xFFFFFFu : 0);
            client.Update(incremental: true);
            client.ShouldShow(_surface);
        }

        client.Copies.Should().BeGreaterThan(0, "scrolling is copied");
    }

    [Fact]
    public void Resize_ReachesViewersThatCanFollow()
    {
        using Client client = Connect();
        client.SetEncodings(RfbEncoders.Zrle, -308);
        client.Update(incremental: false);
        _surface.Resize(640, 480);
        client.Update(incremental: true);
        (client.Width, client.Height).Should().Be((640, 480));
        client.ShouldShow(_surface);
        client.RequestSize(800, 600);
        client.Update(incremental: true);
        client.LastSizeReply.Should().Be((1, 4), "forwarded to the guest");
        _surface.Wanted.Should().Be((800, 600));
    }

    [Fact]
    public void ManyViewers_EachAtItsOwnPace()
    {
        using Client first = Connect();
        using Client second = Connect();
        first.SetEncodings(RfbEncoders.Zrle);
        second.SetEncodings(RfbEncoders.Tight);
        first.Update(incremental: false);
        var random = new Random(1);
        for (int i = 0; i < 10; i++)
        {
            _surface.Noise(random, 10 * i, 5 * i, 50, 40);
            first.Update(incremental: true);
            first.ShouldShow(_surface);
        }

        second.Update(incremental: false);
        second.ShouldShow(_surface);
        _server!.Viewers.Should().Be(2);
    }

    [Fact]
    public void KeysAndPointer_ReachTheGuest()
    {
        using Client client = Connect();
        client.SetEncodings(RfbEncoders.Raw, -258, -261);
        client.Update(incremental: false);
        client.HasExtendedKeys.Should().BeTrue();
        client.Leds.Should().Be(2, "Num Lock");
        client.Send([255, 0, 0, 1, 0, 0, 0, 0x61, 0, 0, 0, 0x1E]);
        client.Send([255, 0, 0, 0, 0, 0, 0, 0x61, 0, 0, 0, 0x1E]);
        client.Send([4, 1, 0, 0, 0, 0, 0xFF, 0x52]);
        client.Send([5, 5, 0, 160, 0, 100]);
        _pointer.WaitFor(1);
        _keyboard.Events.Should().Equal(((HidKey)0x04, true), ((HidKey)0x04, false), (HidKey.Up, true));
        _pointer.Events[0].Should().Be(new PointerEvent(160 * 32767 / 319, 100 * 32767 / 199, 0, PointerButtons.Left | PointerButtons.Right));
        client.Dispose();
        _keyboard.WaitFor(4);
        _keyboard.Events[3].Should().Be((HidKey.Up, false), "a viewer that leaves lets its keys go");
    }

    // The key beside the space bar and the one of the same code on the other side, told apart by the prefix in either form.
    [Theory]
    [InlineData(0x38, HidKey.LeftAlt)]
    [InlineData(0xB8, HidKey.RightAlt)]
    [InlineData(0xE038, HidKey.RightAlt)]
    [InlineData(0xB7, HidKey.PrintScreen)]
    [InlineData(0xC6, HidKey.Pause)]
    public void ExtendedKey_IsFoundByItsScanCode(int code, HidKey expected)
    {
        using Client client = Connect();
        client.SetEncodings(RfbEncoders.Raw, -258);
        client.Update(incremental: false);
        client.Send([255, 0, 0, 1, 0, 0, 0, 0x61, 0, 0, (byte)(code >> 8), (byte)code]);
        _keyboard.WaitFor(1);
        _keyboard.Events[0].Should().Be((expected, true));
    }

    [Theory]
    [InlineData("us", "aZ1!@[{\\|~/?", "")]
    [InlineData("de", "yZ1!@[{\\|~/?äß€", "")]
    [InlineData("fr", "aQ1!@[{\\|~/?é§", "")]
    [InlineData("gb", "aZ1!@[{\\|~/?£#", "")]
    public void TypedCharacters_HaveAPlaceInEachLayout(string name, string text, string missing)
    {
        // What the guest makes of the keys, by the same layout, must be the text again.
        KeyLayout layout = KeyLayout.Find(name)!;
        var keyboard = new FakeKeyboard();
        var input = new ScreenInput([keyboard], [], layout);
        foreach (char character in text)
        {
            uint keysym = character == '€' ? 0x20ACu : character;
            input.Keysym(keysym, isPressed: true);
            input.Keysym(keysym, isPressed: false);
        }

        keyboard.TypedIn(layout).Should().Be(text + missing);
        keyboard.Held.Should().BeEmpty();
    }

    [Fact]
    public void Password_RightOneEnters_WrongOneDoesNot()
    {
        Start(new VncOptions { Password = "secret" });
        using (Client client = Connect(password: "secret"))
        {
            client.Update(incremental: false);
            client.ShouldShow(_surface);
        }

        Action wrong = () => Connect(password: "guess").Dispose();
        wrong.Should().Throw<IOException>().WithMessage("*wrong password*");
        SpinWait.SpinUntil(() => _server!.Refused == 1, 10_000).Should().BeTrue();
    }

    [Fact]
    public void Des_KnownVectors()
    {
        // FIPS 81 and the classic worked example.
        VncDes.Encrypt(0x133457799BBCDFF1, 0x0123456789ABCDEF).Should().Be(0x85E813540F0AB405);
        VncDes.Encrypt(0x0123456789ABCDEF, 0x4E6F772069732074).Should().Be(0x3FA40E8A984D4815);
    }

    [Fact]
    public void VeNCrypt_OverTls_ShowsTheScreen()
    {
        using X509Certificate2 certificate = MakeCertificate();
        Start(new VncOptions { Certificate = certificate, Password = "secret" });
        using Client client = Connect(password: "secret", tls: true);
        client.SetEncodings(RfbEncoders.Zrle);
        client.Update(incremental: false);
        client.ShouldShow(_surface);
    }

    [Fact]
    public void WebSocket_BinaryFrames_CarryRfb()
    {
        Start(new VncOptions());
        using Client client = Connect(origin: "http://127.0.0.1:8080");
        client.SetEncodings(RfbEncoders.Tight);
        client.Update(incremental: false);
        client.ShouldShow(_surface);
        Action foreign = () => Connect(origin: "http://evil.example").Dispose();
        foreign.Should().Throw<IOException>().WithMessage("*403*");
    }

    [Fact]
    public void Garbage_NeverHurtsTheServer()
    {
        Start(new VncOptions());
        var random = new Random(5);
        for (int i = 0; i < 60; i++)
        {
            using var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
            socket.Connect(_endPoint!);
            byte[] junk = new byte[random.Next(1, 3000)];
            random.NextBytes(junk);
            if (i % 2 == 0)
            {
                Encoding.ASCII.GetBytes("RFB 003.008\n\u0001\u0001").CopyTo(junk.AsSpan(0, Math.Min(14, junk.Length)).Length == 14 ? junk : new byte[14], 0);
            }

            socket.Send(junk);
        }

        using Client client = Connect();
        client.Update(incremental: false);
        client.ShouldShow(_surface);
    }

    [Fact]
    public void Screenshot_Png_IsPixelEqual()
    {
        _surface.Noise(new Random(4), 0, 0, 320, 200);
        using var stream = new MemoryStream();
        Screenshot.WritePng(_surface, stream);
        stream.Position = 0;
        ShouldEqual(Png.Open(stream), _surface);
    }

    [Theory]
    [InlineData(95, 6)]
    [InlineData(50, 25)]
    public void Jpeg_OfAPicture_IsCloseToIt(int quality, int tolerance)
    {
        // Decoded by an independent program.
        _surface.Gradient();
        byte[] jpeg = Jpeg.Encode(_surface.Pixels, 320, new DisplayRectangle(0, 0, 320, 200), quality);
        File.WriteAllBytes(_temp["a.jpg"], jpeg);
        (int status, string output) = TempDirectory.Run("djpeg", "-outfile", _temp["a.ppm"], _temp["a.jpg"]);
        status.Should().Be(0, output);
        byte[] ppm = File.ReadAllBytes(_temp["a.ppm"]);
        int at = ppm.Length - (320 * 200 * 3);
        long worst = 0;
        for (int i = 0; i < 320 * 200; i++)
        {
            uint colour = _surface.Pixels[i];
            worst = Math.Max(worst, Math.Abs((int)((colour >> 16) & 0xFF) - ppm[at + (i * 3)]));
            worst = Math.Max(worst, Math.Abs((int)((colour >> 8) & 0xFF) - ppm[at + (i * 3) + 1]));
            worst = Math.Max(worst, Math.Abs((int)(colour & 0xFF) - ppm[at + (i * 3) + 2]));
        }

        worst.Should().BeLessThanOrEqualTo(tolerance);
    }

    [Fact]
    public void GvncCapture_ARealViewer_IsPixelEqual()
    {
        // gvnccapture takes a display number: port minus 5900.
        _surface.Noise(new Random(9), 20, 20, 200, 100);
        _surface.Text(new Random(2), 12, 0, 130);
        for (int display = 20; ; display++)
        {
            try
            {
                Start(new VncOptions(), 5900 + display);
            }
            catch (IOException) when (display < 60)
            {
                continue;
            }

            string png = _temp["a.png"];
            (int status, string output) = TempDirectory.Run(
                "gvnccapture", "--quiet", string.Create(CultureInfo.InvariantCulture, $"127.0.0.1:{display}"), png);
            status.Should().Be(0, output);
            using FileStream stream = File.OpenRead(png);
            ShouldEqual(Png.Open(stream), _surface);
            return;
        }
    }

    private static void ShouldEqual(Png png, FakeSurface surface)
    {
        (png.Width, png.Height).Should().Be((surface.Width, surface.Height));
        for (int y = 0; y < png.Height; y++)
        {
            for (int x = 0; x < png.Width; x++)
            {
                Pixel pixel = png.GetPixel(x, y);
                uint colour = ((uint)pixel.R << 16) | ((uint)pixel.G << 8) | pixel.B;
                if (colour != surface.Pixels[(y * surface.Width) + x])
                {
                    colour.Should().Be(surface.Pixels[(y * surface.Width) + x], $"pixel {x},{y}");
                }
            }
        }
    }

    private static X509Certificate2 MakeCertificate()
    {
        using var key = ECDsa.Create(ECCurve.NamedCurves.nistP256);
        var request = new CertificateRequest("CN=vmm", key, HashAlgorithmName.SHA256);
        DateTimeOffset start = DateTimeOffset.UnixEpoch.AddYears(50);
        using X509Certificate2 made = request.CreateSelfSigned(start, start.AddYears(100));
        return X509CertificateLoader.LoadPkcs12(made.Export(X509ContentType.Pfx), null);
    }

    private IPEndPoint? _endPoint;

    private void Start(VncOptions options, int port = 0)
    {
        var input = new ScreenInput([_keyboard], [_pointer], KeyLayout.Find("us")!);
        _server = new VncServer(_surface, input, options);
        _endPoint = _server.Listen(new IPEndPoint(IPAddress.Loopback, port));
    }

    private Client Connect(string? password = null, bool tls = false, string? origin = null)
    {
        if (_server is null)
        {
            Start(new VncOptions());
        }

        return new Client(_endPoint!, password, tls, origin);
    }

    private sealed class FakeKeyboard : IKeyboardSink
    {
        private readonly object _gate = new();
        private readonly List<(HidKey Key, bool Pressed)> _events = [];

        public bool IsActive => true;

        public KeyboardLeds Leds => KeyboardLeds.Num;

        public List<(HidKey Key, bool Pressed)> Events
        {
            get
            {
                lock (_gate)
                {
                    return [.. _events];
                }
            }
        }

        public HashSet<HidKey> Held { get; } = [];

        public void Send(HidKey key, bool pressed)
        {
            lock (_gate)
            {
                _events.Add((key, pressed));
                _ = pressed ? Held.Add(key) : Held.Remove(key);
                Monitor.PulseAll(_gate);
            }
        }

        public void WaitFor(int count)
        {
            lock (_gate)
            {
                while (_events.Count < count && Monitor.Wait(_gate, 10_000))
                {
                }
            }
        }

        public string TypedIn(KeyLayout layout)
        {
            var text = new StringBuilder();
            bool shift = false;
            bool third = false;
            foreach ((HidKey key, bool pressed) in Events)
            {
                if (key is HidKey.LeftShift or HidKey.RightShift)
                {
                    shift = pressed;
                }
                else if (key == HidKey.RightAlt)
                {
                    third = pressed;
                }
                else if (pressed)
                {
                    int level = third ? 2 : shift ? 1 : 0;
                    for (uint c = 0x21; c < 0x2100; c++)
                    {
                        uint keysym = c;
                        if (layout.TryFind(keysym, out HidKey found, out int at) && found == key && at == level)
                        {
                            text.Append((char)c);
                            break;
                        }
                    }
                }
            }

            return text.ToString();
        }
    }

    private sealed class FakePointer : IPointerSink
    {
        private readonly object _gate = new();

        public bool IsActive => true;

        public bool IsAbsolute => true;

        public List<PointerEvent> Events { get; } = [];

        public void Send(in PointerEvent pointer)
        {
            lock (_gate)
            {
                Events.Add(pointer);
                Monitor.PulseAll(_gate);
            }
        }

        public void WaitFor(int count)
        {
            lock (_gate)
            {
                while (Events.Count < count && Monitor.Wait(_gate, 10_000))
                {
                }
            }
        }
    }

    private sealed class FakeSurface : IDisplaySurface
    {
        private readonly Lock _gate = new();
        private long _serial = 1;

        public FakeSurface(int width, int height)
        {
            Width = width;
            Height = height;
            Pixels = new uint[width * height];
            Text(new Random(3), 20, 0, 0);
        }

        public int Width { get; private set; }

        public int Height { get; private set; }

        public uint[] Pixels { get; private set; }

        public (int Width, int Height) Wanted { get; private set; }

        public DisplayCursor? Cursor => null;

        public void Refresh(DisplayFrame frame)
        {
            lock (_gate)
            {
                frame.Begin(Width, Height);
                if (frame.Serial != _serial)
                {
                    Pixels.CopyTo(frame.Pixels.AsSpan());
                    frame.Changes.Add(new DisplayRectangle(0, 0, Width, Height));
                    frame.Serial = _serial;
                }
            }
        }

        public TextScreen? ReadText() => null;

        public bool RequestSize(int width, int height)
        {
            Wanted = (width, height);
            return true;
        }

        public void Resize(int width, int height)
        {
            lock (_gate)
            {
                Width = width;
                Height = height;
                Pixels = new uint[width * height];
                _serial++;
            }

            Text(new Random(8), 30, 10, 10);
        }

        public void Fill(int x, int y, int width, int height, uint colour) =>
            Draw((column, row) => column >= x && column < x + width && row >= y && row < y + height ? colour : null);

        public void Noise(Random random, int x, int y, int width, int height) =>
            Draw((column, row) => column >= x && column < x + width && row >= y && row < y + height
                ? (uint)random.Next(1 << 24)
                : null);

        public void Gradient() => Draw((x, y) => ((uint)(x * 255 / 319) << 16) | ((uint)(y * 255 / 199) << 8) | (uint)((x + y) / 4 & 0xFF));

        public void Text(Random random, int characters, int x, int y) =>
            Draw((column, row) => column >= x && column < x + (characters * 8) && row >= y && row < y + 16
                ? (random.Next(3) == 0 ? 0xAAAAAAu : 0x0000AAu)
                : null);

        public void Scroll(int rows)
        {
            lock (_gate)
            {
                uint[] old = (uint[])Pixels.Clone();
                for (int y = 0; y < Height; y++)
                {
                    int from = Math.Clamp(y + rows, 0, Height - 1);
                    Array.Copy(old, from * Width, Pixels, y * Width, Width);
                }

                _serial++;
            }
        }

        private void Draw(Func<int, int, uint?> colourOf)
        {
            lock (_gate)
            {
                for (int y = 0; y < Height; y++)
                {
                    for (int x = 0; x < Width; x++)
                    {
                        Pixels[(y * Width) + x] = colourOf(x, y) ?? Pixels[(y * Width) + x];
                    }
                }

                _serial++;
            }
        }
    }

    /// <summary>A small RFB client, independent of the server's code except for constants.</summary>
    private sealed class Client : IDisposable
    {
        private readonly Stream _stream;
        private readonly Inflater _zrle = new();
        private readonly Inflater[] _tight = [new(), new(), new(), new()];
        private uint[] _pixels;
        private int _bits = 32;
        private bool _isBigEndian;

        public Client(IPEndPoint server, string? password, bool tls, string? origin)
        {
            var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp) { ReceiveTimeout = 20_000 };
            socket.Connect(server);
            _stream = new NetworkStream(socket, ownsSocket: true);
            if (origin is not null)
            {
                _stream = new ClientWebSocketStream(_stream, origin);
            }

            Encoding.ASCII.GetString(Read(12)).Should().Be("RFB 003.008\n");
            Send(Encoding.ASCII.GetBytes("RFB 003.008\n"));
            byte[] types = Read(Read(1)[0]);
            byte type = tls ? (byte)19 : password is null ? (byte)1 : (byte)2;
            types.Should().Equal(type);
            Send([type]);
            if (tls)
            {
                Read(2).Should().Equal(0, 2);
                Send([0, 2]);
                Read(1).Should().Equal(0);
                Read(5).Should().Equal(1, 0, 0, 1, 5);
                Send([0, 0, 1, 5]);
                Read(1).Should().Equal(1);
#pragma warning disable CA5359 // the certificate was made for this test; nobody vouches for it
                var secure = new SslStream(_stream, false, (_, _, _, _) => true);
#pragma warning restore CA5359
                secure.AuthenticateAsClient("vmm");
                _stream = secure;
            }

            if (password is not null)
            {
                Send(VncDes.Respond(Encoding.ASCII.GetBytes(password), Read(16)));
            }

            if (BinaryPrimitives.ReadInt32BigEndian(Read(4)) != 0)
            {
                throw new IOException(Encoding.UTF8.GetString(Read(BinaryPrimitives.ReadInt32BigEndian(Read(4)))));
            }

            Send([1]);
            byte[] init = Read(24);
            Width = BinaryPrimitives.ReadUInt16BigEndian(init);
            Height = BinaryPrimitives.ReadUInt16BigEndian(init.AsSpan(2));
            Read(BinaryPrimitives.ReadInt32BigEndian(init.AsSpan(20)));
            _pixels = new uint[Width * Height];
        }

        public int Width { get; private set; }

        public int Height { get; private set; }

        public int Copies { get; private set; }

        public bool HasExtendedKeys { get; private set; }

        public int Leds { get; private set; } = -1;

        public (int Reason, int Status) LastSizeReply { get; private set; }

        public void Dispose() => _stream.Dispose();

        public void Send(byte[] bytes) => _stream.Write(bytes);

        public void SetFormat(int bits, bool isBigEndian)
        {
            _bits = bits;
            _isBigEndian = isBigEndian;
            byte big = isBigEndian ? (byte)1 : (byte)0;
            Send(bits switch
            {
                8 => [0, 0, 0, 0, 8, 8, 0, 1, 0, 7, 0, 7, 0, 3, 0, 3, 6, 0, 0, 0],
                16 => [0, 0, 0, 0, 16, 16, big, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0],
                _ => [0, 0, 0, 0, 32, 24, big, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0],
            });
        }

        public void SetEncodings(params int[] encodings)
        {
            byte[] message = new byte[4 + (4 * encodings.Length)];
            message[0] = 2;
            message[3] = (byte)encodings.Length;
            for (int i = 0; i < encodings.Length; i++)
            {
                BinaryPrimitives.WriteInt32BigEndian(message.AsSpan(4 + (4 * i)), encodings[i]);
            }

            Send(message);
        }

        public void RequestSize(int width, int height)
        {
            byte[] message = new byte[8 + 16];
            message[0] = 251;
            BinaryPrimitives.WriteUInt16BigEndian(message.AsSpan(2), (ushort)width);
            BinaryPrimitives.WriteUInt16BigEndian(message.AsSpan(4), (ushort)height);
            message[6] = 1;
            Send(message);
        }

        public void Update(bool incremental)
        {
            Send([3, incremental ? (byte)1 : (byte)0, 0, 0, 0, 0, (byte)(Width >> 8), (byte)Width, (byte)(Height >> 8), (byte)Height]);
            byte[] head = Read(4);
            head[0].Should().Be(0);
            for (int i = BinaryPrimitives.ReadUInt16BigEndian(head.AsSpan(2)); i > 0; i--)
            {
                byte[] raw = Read(12);
                Rectangle(
                    BinaryPrimitives.ReadUInt16BigEndian(raw),
                    BinaryPrimitives.ReadUInt16BigEndian(raw.AsSpan(2)),
                    BinaryPrimitives.ReadUInt16BigEndian(raw.AsSpan(4)),
                    BinaryPrimitives.ReadUInt16BigEndian(raw.AsSpan(6)),
                    BinaryPrimitives.ReadInt32BigEndian(raw.AsSpan(8)));
            }
        }

        public void ShouldShow(FakeSurface surface)
        {
            for (int i = 0; i < _pixels.Length; i++)
            {
                uint expected = Expected(surface.Pixels[i]);
                if (_pixels[i] != expected)
                {
                    _pixels[i].Should().Be(expected, $"pixel {i % Width},{i / Width}");
                }
            }
        }

        private uint Expected(uint colour)
        {
            uint r = (colour >> 16) & 0xFF;
            uint g = (colour >> 8) & 0xFF;
            uint b = colour & 0xFF;
            return _bits switch
            {
                8 => (((r * 7) + 127) / 255) | ((((g * 7) + 127) / 255) << 3) | ((((b * 3) + 127) / 255) << 6),
                16 => ((((r * 31) + 127) / 255) << 11) | ((((g * 63) + 127) / 255) << 5) | (((b * 31) + 127) / 255),
                _ => colour,
            };
        }

        private void Rectangle(int x, int y, int width, int height, int encoding)
        {
            switch (encoding)
            {
                case 0:
                    {
                        byte[] raw = Read(width * height * (_bits / 8));
                        for (int i = 0; i < width * height; i++)
                        {
                            Put(x + (i % width), y + (i / width), Pixel(raw.AsSpan(i * (_bits / 8))));
                        }

                        break;
                    }

                case 1:
                    {
                        byte[] raw = Read(4);
                        int fromX = BinaryPrimitives.ReadUInt16BigEndian(raw);
                        int fromY = BinaryPrimitives.ReadUInt16BigEndian(raw.AsSpan(2));
                        uint[] old = (uint[])_pixels.Clone();
                        for (int i = 0; i < width * height; i++)
                        {
                            Put(x + (i % width), y + (i / width), old[((fromY + (i / width)) * Width) + fromX + (i % width)]);
                        }

                        Copies++;
                        break;
                    }

                case 16:
                    Zrle(x, y, width, height);
                    break;
                case 7:
                    Tight(x, y, width, height);
                    break;
                case -308:
                    Read(20);
                    LastSizeReply = (x, y);
                    Resize(width, height);
                    break;
                case -223:
                    Resize(width, height);
                    break;
                case -258:
                    HasExtendedKeys = true;
                    break;
                case -261:
                    Leds = Read(1)[0];
                    break;
                default:
                    throw new IOException($"encoding {encoding}");
            }
        }

        private void Resize(int width, int height)
        {
            if (width != Width || height != Height)
            {
                Width = width;
                Height = height;
                _pixels = new uint[width * height];
            }
        }

        private void Put(int x, int y, uint value) => _pixels[(y * Width) + x] = value;

        private uint Pixel(ReadOnlySpan<byte> raw) => (_bits, _isBigEndian) switch
        {
            (8, _) => raw[0],
            (16, true) => BinaryPrimitives.ReadUInt16BigEndian(raw),
            (16, false) => BinaryPrimitives.ReadUInt16LittleEndian(raw),
            (_, true) => BinaryPrimitives.ReadUInt32BigEndian(raw),
            _ => BinaryPrimitives.ReadUInt32LittleEndian(raw),
        };

        private uint CompactPixel(Inflater from)
        {
            if (_bits != 32)
            {
                return Pixel(from.Take(_bits / 8));
            }

            byte[] raw = from.Take(3);
            return _isBigEndian
                ? ((uint)raw[0] << 16) | ((uint)raw[1] << 8) | raw[2]
                : raw[0] | ((uint)raw[1] << 8) | ((uint)raw[2] << 16);
        }

        private void Zrle(int x, int y, int width, int height)
        {
            _zrle.Feed(Read(BinaryPrimitives.ReadInt32BigEndian(Read(4))));
            for (int ty = 0; ty < height; ty += 64)
            {
                for (int tx = 0; tx < width; tx += 64)
                {
                    ZrleTile(x + tx, y + ty, Math.Min(64, width - tx), Math.Min(64, height - ty));
                }
            }
        }

        private void ZrleTile(int x, int y, int width, int height)
        {
            int kind = _zrle.Take(1)[0];
            var palette = new uint[kind & 0x7F];
            for (int i = 0; i < palette.Length && kind != 128; i++)
            {
                palette[i] = CompactPixel(_zrle);
            }

            if (kind == 128)
            {
                for (int at = 0; at < width * height;)
                {
                    uint pixel = CompactPixel(_zrle);
                    int length = 1;
                    byte more;
                    do
                    {
                        more = _zrle.Take(1)[0];
                        length += more;
                    }
                    while (more == 255);
                    for (; length > 0; length--, at++)
                    {
                        Put(x + (at % width), y + (at / width), pixel);
                    }
                }

                return;
            }

            kind.Should().BeLessThanOrEqualTo(16);
            int bits = kind switch { 2 => 1, 3 or 4 => 2, > 4 => 4, _ => 0 };
            for (int row = 0; row < height; row++)
            {
                byte[] packed = bits > 0 ? _zrle.Take(((width * bits) + 7) / 8) : [];
                for (int column = 0; column < width; column++)
                {
                    int shift = 8 - bits - (column * bits % 8);
                    uint pixel = kind switch
                    {
                        0 => CompactPixel(_zrle),
                        1 => palette[0],
                        _ => palette[(packed[column * bits / 8] >> shift) & ((1 << bits) - 1)],
                    };
                    Put(x + column, y + row, pixel);
                }
            }
        }

        private uint TightPixel(ReadOnlySpan<byte> raw) =>
            _bits == 32 ? ((uint)raw[0] << 16) | ((uint)raw[1] << 8) | raw[2] : Pixel(raw);

        private void Tight(int x, int y, int width, int height)
        {
            int size = _bits == 32 ? 3 : _bits / 8;
            int control = Read(1)[0];
            if (control == 0x80)
            {
                uint fill = TightPixel(Read(size));
                for (int i = 0; i < width * height; i++)
                {
                    Put(x + (i % width), y + (i / width), fill);
                }

                return;
            }

            int stream = (control >> 4) & 3;
            var palette = new List<uint>();
            if ((control & 0x40) != 0)
            {
                Read(1).Should().Equal(1);
                for (int i = Read(1)[0] + 1; i > 0; i--)
                {
                    palette.Add(TightPixel(Read(size)));
                }
            }

            int bytes = palette.Count switch
            {
                0 => width * height * size,
                2 => (width + 7) / 8 * height,
                _ => width * height,
            };
            byte[] data;
            if (bytes < 12)
            {
                data = Read(bytes);
            }
            else
            {
                int length = Read(1)[0];
                if (length >= 0x80)
                {
                    int next = Read(1)[0];
                    length = (length & 0x7F) | ((next & 0x7F) << 7);
                    if (next >= 0x80)
                    {
                        length |= Read(1)[0] << 14;
                    }
                }

                _tight[stream].Feed(Read(length));
                data = _tight[stream].Take(bytes);
            }

            for (int i = 0; i < width * height; i++)
            {
                int column = i % width;
                int row = i / width;
                uint pixel = palette.Count switch
                {
                    0 => TightPixel(data.AsSpan(i * size)),
                    2 => palette[(data[(row * ((width + 7) / 8)) + (column / 8)] >> (7 - (column % 8))) & 1],
                    _ => palette[data[i]],
                };
                Put(x + column, y + row, pixel);
            }
        }

        private byte[] Read(int length)
        {
            byte[] data = new byte[length];
            _stream.ReadExactly(data);
            return data;
        }
    }

    /// <summary>One zlib stream fed piece by piece.</summary>
    private sealed class Inflater
    {
        private readonly Pipe _pipe = new();
        private ZLibStream? _stream;

        public void Feed(byte[] data) => _pipe.Add(data);

        public byte[] Take(int length)
        {
            _stream ??= new ZLibStream(_pipe, CompressionMode.Decompress);
            byte[] data = new byte[length];
            _stream.ReadExactly(data);
            return data;
        }

        private sealed class Pipe : Stream
        {
            private readonly Queue<byte> _bytes = new();

            public override bool CanRead => true;

            public override bool CanSeek => false;

            public override bool CanWrite => false;

            public override long Length => throw new NotSupportedException();

            public override long Position
            {
                get => throw new NotSupportedException();
                set => throw new NotSupportedException();
            }

            public void Add(byte[] data) => Array.ForEach(data, _bytes.Enqueue);

            public override int Read(byte[] buffer, int offset, int count)
            {
                int got = 0;
                while (got < count && _bytes.TryDequeue(out byte value))
                {
                    buffer[offset + got++] = value;
                }

                return got;
            }

            public override void Flush()
            {
            }

            public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

            public override void SetLength(long value) => throw new NotSupportedException();

            public override void Write(byte[] buffer, int offset, int count) => throw new NotSupportedException();
        }
    }

    /// <summary>A browser's end of a WebSocket.</summary>
    private sealed class ClientWebSocketStream : Stream
    {
        private readonly Stream _inner;
        private int _left;

        public ClientWebSocketStream(Stream inner, string origin)
        {
            _inner = inner;
            inner.Write(Encoding.ASCII.GetBytes(
                $"GET /websockify HTTP/1.1\r\nHost: 127.0.0.1:5900\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nOrigin: {origin}\r\n"
                + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: binary\r\n\r\n"));
            var header = new StringBuilder();
            while (!header.ToString().EndsWith("\r\n\r\n", StringComparison.Ordinal))
            {
                int next = inner.ReadByte();
                if (next < 0)
                {
                    break;
                }

                header.Append((char)next);
            }

            // RFC 6455 §1.3 gives this answer to this key.
            if (!header.ToString().Contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", StringComparison.Ordinal))
            {
                throw new IOException(header.ToString());
            }
        }

        public override bool CanRead => true;

        public override bool CanSeek => false;

        public override bool CanWrite => true;

        public override long Length => throw new NotSupportedException();

        public override long Position
        {
            get => throw new NotSupportedException();
            set => throw new NotSupportedException();
        }

        public override int Read(byte[] buffer, int offset, int count)
        {
            if (_left == 0)
            {
                byte[] head = new byte[10];
                _inner.ReadExactly(head, 0, 2);
                head[0].Should().Be(0x82);
                _left = head[1];
                if (_left == 126)
                {
                    _inner.ReadExactly(head, 0, 2);
                    _left = BinaryPrimitives.ReadUInt16BigEndian(head);
                }
                else if (_left == 127)
                {
                    _inner.ReadExactly(head, 0, 8);
                    _left = (int)BinaryPrimitives.ReadInt64BigEndian(head);
                }
            }

            int got = _inner.Read(buffer, offset, Math.Min(count, _left));
            _left -= got;
            return got;
        }

        public override void Write(byte[] buffer, int offset, int count)
        {
            byte[] frame = new byte[8 + count];
            frame[0] = 0x82;
            frame[1] = 0xFE;
            BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(2), (ushort)count);
            for (int i = 0; i < 4; i++)
            {
                frame[4 + i] = (byte)(0x5A + i);
            }

            for (int i = 0; i < count; i++)
            {
                frame[8 + i] = (byte)(buffer[offset + i] ^ (0x5A + (i & 3)));
            }

            _inner.Write(frame);
        }

        public override void Flush() => _inner.Flush();

        public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

        public override void SetLength(long value) => throw new NotSupportedException();

        protected override void Dispose(bool disposing)
        {
            _inner.Dispose();
            base.Dispose(disposing);
        }
    }
}
