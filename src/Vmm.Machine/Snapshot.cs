// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Security.Cryptography;
using System.Text;
using Vmm.Core;
using Vmm.Memory;

namespace Vmm.Machine;

// Theory. A snapshot is a stream of sections that can be written to a pipe and read from one: nothing is patched later.
//   header   "VMMSNAP1"
//   section  u16 name length, name, u32 version, u64 payload length, payload; little-endian
//   end      a section named "end" whose payload is the SHA-256 of everything before it
// The first section is "machine" (clock, number of CPUs, memory size); then "cpu0".., one section a device named by its
// identifier, "irqchip" when the driver owns controllers, and any number of "ram" sections: u16 length and name of the
// block, u64 offset, then a run of bytes. Pages of zeroes are left out.
//
// A snapshot says nothing of the driver: CPU state is architectural (CpuState), devices are models. It is loaded into a
// machine made from the same definition, freshly built and paused; sections are matched by name, so a missing or surplus
// device is an error that names it, not a silent difference. A load that fails leaves the machine unusable, never half
// running: the caller disposes it.

/// <summary>Writes and reads the state of a paused machine.</summary>
public static class Snapshot
{
    private const int RunBytes = 1 << 20;
    private const ulong MaxSectionBytes = 256UL << 20;

    private static ReadOnlySpan<byte> Magic => "VMMSNAP1"u8;

    /// <summary>Writes everything.</summary>
    /// <param name="state">The machine's parts; paused.</param>
    /// <param name="stream">Receives the snapshot; need not seek.</param>
    /// <param name="progress">Told bytes of guest memory looked at, and their total; null for nobody.</param>
    internal static void Write(SnapshotState state, Stream stream, Action<long, long>? progress)
    {
        using var output = new SectionWriter(stream);
        output.WriteRaw(Magic);
        var machine = new StateWriter("machine");
        machine.Write("clock.ns", state.ClockNs);
        machine.Write("cpus", (ulong)state.Vcpus.Count);
        machine.Write("memory", state.MemoryBytes);
        output.Write("machine", 1, machine.ToArray());

        var cpu = new CpuState();
        for (int i = 0; i < state.Vcpus.Count; i++)
        {
            state.Vcpus[i].Vcpu.ReadState(cpu);
            if (state.Irqchip == IrqchipMode.User && state.Vcpus[i].Activity is not ActivityState.Running)
            {
                cpu.Activity = state.Vcpus[i].Activity;
            }

            var writer = new StateWriter($"cpu{i}");
            cpu.Save(writer);
            output.Write(writer.Section, 1, writer.ToArray());
        }

        foreach (IDevice device in state.Devices)
        {
            var writer = new StateWriter(device.Id);
            device.Save(writer);
            output.Write(device.Id, (uint)device.StateVersion, writer.ToArray());
        }

        if (state.Irqchip != IrqchipMode.User)
        {
            var writer = new StateWriter("irqchip");
            state.Vm.SaveIrqchip(writer);
            output.Write("irqchip", 1, writer.ToArray());
        }

        WriteMemory(state, output, progress);
        output.WriteEnd();
    }

    /// <summary>Reads everything into a freshly built, paused machine.</summary>
    /// <exception cref="StateException">The snapshot is damaged or belongs to another definition.</exception>
    internal static void Read(SnapshotState state, Stream stream)
    {
        using var input = new SectionReader(stream);
        input.ExpectMagic(Magic);
        var devices = new Dictionary<string, IDevice>(StringComparer.Ordinal);
        foreach (IDevice device in state.Devices)
        {
            devices.Add(device.Id, device);
        }

        var loaded = new HashSet<string>(StringComparer.Ordinal);
        while (input.Next(out string name, out uint version, out byte[] payload))
        {
            if (string.Equals(name, "ram", StringComparison.Ordinal))
            {
                ReadRun(state, payload);
                continue;
            }

            if (!loaded.Add(name))
            {
                throw new StateException($"snapshot: section {name} appears twice");
            }

            var reader = new StateReader(name, payload);
            if (string.Equals(name, "machine", StringComparison.Ordinal))
            {
                ReadMachine(state, reader);
            }
            else if (name.StartsWith("cpu", StringComparison.Ordinal) && int.TryParse(name.AsSpan(3), CultureInfo.InvariantCulture, out int index))
            {
                ReadCpu(state, reader, index);
            }
            else if (string.Equals(name, "irqchip", StringComparison.Ordinal))
            {
                if (state.Irqchip == IrqchipMode.User)
                {
                    throw new StateException("snapshot: was made with the driver's own irqchip; run with the same irqchip:");
                }

                state.Vm.LoadIrqchip(reader);
            }
            else if (devices.TryGetValue(name, out IDevice? device))
            {
                if (version > (uint)device.StateVersion)
                {
                    throw new StateException($"snapshot: {name} has version {version}, this program knows {device.StateVersion}");
                }

                device.Load(reader, (int)version);
            }
            else
            {
                throw new StateException($"snapshot: has a device {name} that the definition lacks");
            }
        }

        foreach (IDevice device in state.Devices)
        {
            if (!loaded.Contains(device.Id))
            {
                throw new StateException($"snapshot: lacks the state of device {device.Id}");
            }
        }

        for (int i = 0; i < state.Vcpus.Count; i++)
        {
            if (!loaded.Contains($"cpu{i}"))
            {
                throw new StateException($"snapshot: lacks the state of cpu{i}");
            }
        }
    }

    private static void WriteMemory(SnapshotState state, SectionWriter output, Action<long, long>? progress)
    {
        var buffer = new byte[RunBytes];
        long done = 0;
        foreach (RamBlock block in state.Blocks)
        {
            byte[] name = Encoding.UTF8.GetBytes(block.Name);
            for (ulong offset = 0; offset < block.LengthBytes; offset += RunBytes)
            {
                Span<byte> run = buffer.AsSpan(0, (int)Math.Min(RunBytes, block.LengthBytes - offset));
                block.TryRead(offset, run);
                WriteRun(output, name, offset, run);
                done += run.Length;
                progress?.Invoke(done, (long)state.MemoryBytes);
            }
        }
    }

    // Cuts a run into stretches without zero pages.
    private static void WriteRun(SectionWriter output, byte[] name, ulong offset, Span<byte> run)
    {
        int start = -1;
        for (int at = 0; at <= run.Length; at += RamBlock.PageBytes)
        {
            bool zero = at == run.Length || !run.Slice(at, RamBlock.PageBytes).ContainsAnyExcept((byte)0);
            if (!zero && start < 0)
            {
                start = at;
            }
            else if (zero && start >= 0)
            {
                output.WriteRun(name, offset + (uint)start, run[start..at]);
                start = -1;
            }
        }
    }

    private static void ReadMachine(SnapshotState state, StateReader reader)
    {
        ulong cpus = reader.ReadUInt64("cpus");
        ulong memory = reader.ReadUInt64("memory");
        if (cpus != (ulong)state.Vcpus.Count || memory != state.MemoryBytes)
        {
            throw new StateException(
                $"snapshot: was made with {cpus} CPUs and {memory >> 20} MiB, the definition says {state.Vcpus.Count} and {state.MemoryBytes >> 20} MiB");
        }

        state.SetClockNs(reader.ReadInt64("clock.ns"));
    }

    private static void ReadCpu(SnapshotState state, StateReader reader, int index)
    {
        if (index < 0 || index >= state.Vcpus.Count)
        {
            throw new StateException($"snapshot: has a CPU {index} that the definition lacks");
        }

        var cpu = new CpuState();
        cpu.Load(reader);
        state.Vcpus[index].Activity = cpu.Activity;
        state.Vcpus[index].Vcpu.WriteState(cpu);
    }

    private static void ReadRun(SnapshotState state, byte[] payload)
    {
        if (payload.Length < 10)
        {
            throw new StateException("snapshot: a ram section is truncated");
        }

        int nameBytes = BinaryPrimitives.ReadUInt16LittleEndian(payload);
        if (payload.Length < 10 + nameBytes)
        {
            throw new StateException("snapshot: a ram section is truncated");
        }

        string name = Encoding.UTF8.GetString(payload, 2, nameBytes);
        ulong offset = BinaryPrimitives.ReadUInt64LittleEndian(payload.AsSpan(2 + nameBytes));
        foreach (RamBlock block in state.Blocks)
        {
            if (string.Equals(block.Name, name, StringComparison.Ordinal)
                && block.TryWrite(offset, payload.AsSpan(10 + nameBytes), out _))
            {
                return;
            }
        }

        throw new StateException($"snapshot: memory block {name} at 0x{offset:x} does not fit this machine");
    }

    private sealed class SectionWriter(Stream stream) : IDisposable
    {
        private readonly IncrementalHash _hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);

        public void WriteRaw(ReadOnlySpan<byte> bytes)
        {
            _hash.AppendData(bytes);
            stream.Write(bytes);
        }

        public void Write(string name, uint version, ReadOnlySpan<byte> payload)
        {
            Header(name, version, (ulong)payload.Length);
            WriteRaw(payload);
        }

        public void WriteRun(byte[] block, ulong offset, ReadOnlySpan<byte> run)
        {
            Header("ram", 1, (ulong)(10 + block.Length + run.Length));
            Span<byte> number = stackalloc byte[8];
            BinaryPrimitives.WriteUInt16LittleEndian(number, (ushort)block.Length);
            WriteRaw(number[..2]);
            WriteRaw(block);
            BinaryPrimitives.WriteUInt64LittleEndian(number, offset);
            WriteRaw(number);
            WriteRaw(run);
        }

        public void WriteEnd()
        {
            Header("end", 1, 32);
            stream.Write(_hash.GetHashAndReset());
            stream.Flush();
        }

        public void Dispose() => _hash.Dispose();

        private void Header(string name, uint version, ulong length)
        {
            byte[] encoded = Encoding.UTF8.GetBytes(name);
            var header = new byte[2 + encoded.Length + 12];
            BinaryPrimitives.WriteUInt16LittleEndian(header, (ushort)encoded.Length);
            encoded.CopyTo(header, 2);
            BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(2 + encoded.Length), version);
            BinaryPrimitives.WriteUInt64LittleEndian(header.AsSpan(6 + encoded.Length), length);
            WriteRaw(header);
        }
    }

    private sealed class SectionReader(Stream stream) : IDisposable
    {
        private readonly IncrementalHash _hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);

        public void ExpectMagic(ReadOnlySpan<byte> magic)
        {
            var head = new byte[magic.Length];
            Read(head);
            if (!magic.SequenceEqual(head))
            {
                throw new StateException("snapshot: the file is not a snapshot of this program");
            }
        }

        public bool Next(out string name, out uint version, out byte[] payload)
        {
            var number = new byte[2];
            Read(number);
            var header = new byte[BinaryPrimitives.ReadUInt16LittleEndian(number) + 12];
            Read(header);
            name = Encoding.UTF8.GetString(header, 0, header.Length - 12);
            version = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(header.Length - 12));
            ulong length = BinaryPrimitives.ReadUInt64LittleEndian(header.AsSpan(header.Length - 8));
            if (length > MaxSectionBytes)
            {
                throw new StateException($"snapshot: section {name} claims {length} bytes");
            }

            bool end = string.Equals(name, "end", StringComparison.Ordinal);
            byte[] expected = end ? _hash.GetHashAndReset() : [];
            payload = new byte[length];
            Read(payload);
            if (end && !expected.AsSpan().SequenceEqual(payload))
            {
                throw new StateException("snapshot: checksum does not match; the file is damaged");
            }

            return !end;
        }

        public void Dispose() => _hash.Dispose();

        private void Read(Span<byte> into)
        {
            try
            {
                stream.ReadExactly(into);
            }
            catch (EndOfStreamException)
            {
                throw new StateException("snapshot: is truncated");
            }

            _hash.AppendData(into);
        }
    }
}

/// <summary>What a snapshot is made of.</summary>
internal sealed record SnapshotState(
    IVm Vm,
    IrqchipMode Irqchip,
    IReadOnlyList<VcpuThread> Vcpus,
    IReadOnlyList<IDevice> Devices,
    IReadOnlyList<RamBlock> Blocks,
    ulong MemoryBytes,
    long ClockNs,
    Action<long> SetClockNs);
