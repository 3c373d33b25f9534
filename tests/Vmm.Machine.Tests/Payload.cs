// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.IO;
using System.Text;
using Vmm.Config;
using Vmm.Core;

namespace Vmm.Machine.Tests;

/// <summary>Makes machines that run a few instructions: a flat multiboot image in 32-bit mode.</summary>
internal static class Payload
{
    /// <summary>A definition with 4 MiB, debug-exit at 0xF4, and an image of the code followed by an endless loop.</summary>
    public static MachineSpec Spec(string directory, byte[] code)
    {
        var image = new byte[4096];
        const uint Flags = 1 << 16;
        uint[] header = [0x1BADB002, Flags, unchecked(0u - 0x1BADB002 - Flags), 0x100000, 0x100000, 0x101000, 0x101000, 0x100020];
        for (int i = 0; i < header.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(i * 4), header[i]);
        }

        code.CopyTo(image, 0x20);
        image[0x20 + code.Length] = 0xEB;
        image[0x21 + code.Length] = 0xFE;
        string kernel = Path.Combine(directory, "payload");
        File.WriteAllBytes(kernel, image);
        return new MachineSpec
        {
            Name = "payload",
            MemoryBytes = 4 << 20,
            DebugExit = 0xF4,
            Boot = new BootSpec { Kernel = kernel },
        };
    }

    /// <summary>Keeps what a guest writes; what it reads can be typed.</summary>
    public sealed class Recorder : ICharBackend
    {
        private readonly StringBuilder _text = new();
        private ICharReceiver? _guest;

        public string Text
        {
            get
            {
                lock (_text)
                {
                    return _text.ToString();
                }
            }
        }

        public void Write(ReadOnlySpan<byte> bytes)
        {
            lock (_text)
            {
                _text.Append(Encoding.ASCII.GetString(bytes));
            }
        }

        public void Send(byte input) => _guest!.Receive([input]);

        public void Attach(ICharReceiver receiver) => _guest = receiver;

        public void ResumeInput()
        {
        }

        public void Dispose()
        {
        }
    }
}
