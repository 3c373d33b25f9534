// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;
using Vmm.Devices.Pci;

namespace Vmm.Devices.Virtio;

/// <summary>Which drivers a virtio-pci card serves.</summary>
public enum VirtioPciMode
{
    /// <summary>VIRTIO 1.0 and later only.</summary>
    Modern,

    /// <summary>Both; types that have no legacy form become modern.</summary>
    Transitional,

    /// <summary>Only drivers of before 1.0 (0.9.5).</summary>
    Legacy,
}

/// <summary>
/// virtio-pci (VIRTIO 1.2 §4.1). BAR 0 is the legacy I/O window (transitional and legacy cards), BAR 1 the MSI-X table,
/// BAR 4 the modern window: common configuration at 0, ISR at 0x1000, device configuration at 0x2000, doorbells at
/// 0x3000 (4 bytes per queue). With MSI-X on, each queue and the configuration have a vector; otherwise INTx follows the
/// ISR register, which reading clears.
/// </summary>
public sealed class VirtioPci : PciFunction, IVirtioInterrupts
{
    /// <summary>Offset of queue n's doorbell in BAR 4 is this plus 4 n.</summary>
    public const uint DoorbellOffset = 0x3000;

    private const ushort Vendor = 0x1AF4;
    private const uint CommonOffset = 0x0000;
    private const uint IsrOffset = 0x1000;
    private const uint DeviceOffset = 0x2000;
    private const uint SectionBytes = 0x1000;
    private const uint DoorbellBytes = 4;
    private const int ModernBar = 4;
    private const byte IsrQueue = 1;
    private const byte IsrConfig = 2;
    private const int LegacyPageShift = 12;

    private readonly Lock _registerGate = new();
    private readonly VirtioDevice _device;
    private readonly IDoorbellSignal? _doorbells;
    private readonly ushort[] _queueVectors;
    private readonly int _configAccess;
    private ushort _configVector = PciMsiX.NoVector;
    private uint _deviceFeatureSelect;
    private uint _driverFeatureSelect;
    private ushort _queueSelect;
    private byte _isr;

    /// <summary>Makes a card around a model, which it owns.</summary>
    /// <param name="id">Name.</param>
    /// <param name="model">What the card does.</param>
    /// <param name="mode">Whom it serves.</param>
    /// <param name="options">Ring features.</param>
    /// <param name="signal">How the worker sleeps; null for the built-in way.</param>
    public VirtioPci(
        string id,
        IVirtioModel model,
        VirtioPciMode mode = VirtioPciMode.Transitional,
        VirtioOptions? options = null,
        IWorkSignal? signal = null)
        : base(id, IdentityOf(model, ref mode))
    {
        _doorbells = signal as IDoorbellSignal;
        _device = new VirtioDevice(id, model, Dma, options, signal);
        _device.Attach(this);
        _queueVectors = new ushort[_device.QueueCount];
        Array.Fill(_queueVectors, (ushort)PciMsiX.NoVector);
        UseIntx();
        if (mode != VirtioPciMode.Modern)
        {
            AddBar(0, PciBarKind.Io, new LegacyWindow(this));
        }

        if (mode != VirtioPciMode.Legacy)
        {
            AddBar(ModernBar, PciBarKind.Memory64Prefetchable, new ModernWindow(this));
            AddVirtioCapability(1, CommonOffset, SectionBytes);
            AddVirtioCapability(3, IsrOffset, SectionBytes);
            AddVirtioCapability(4, DeviceOffset, SectionBytes);
            AddVirtioCapability(2, DoorbellOffset, SectionBytes, DoorbellBytes);

            // §4.1.4.9: a window into the BAR for software that cannot map it. BAR, offset, length and data are the
            // guest's.
            Span<byte> body = stackalloc byte[18];
            Span<byte> writable = stackalloc byte[18];
            body.Clear();
            writable.Clear();
            body[0] = 20;
            body[1] = 5;
            writable[2] = 0xFF;
            writable[6..].Fill(0xFF);
            _configAccess = AddCapability(0x09, body, writable);
        }

        UseMsiX(Math.Min(_device.QueueCount + 1, 2048), 1);
    }

    // §4.1.4.3.
    private enum Common : uint
    {
        DeviceFeatureSelect = 0x00,
        DeviceFeature = 0x04,
        DriverFeatureSelect = 0x08,
        DriverFeature = 0x0C,
        ConfigMsixVector = 0x10,
        NumQueues = 0x12,
        DeviceStatus = 0x14,
        ConfigGeneration = 0x15,
        QueueSelect = 0x16,
        QueueSize = 0x18,
        QueueMsixVector = 0x1A,
        QueueEnable = 0x1C,
        QueueNotifyOff = 0x1E,
        QueueDescLow = 0x20,
        QueueDescHigh = 0x24,
        QueueDriverLow = 0x28,
        QueueDriverHigh = 0x2C,
        QueueDeviceLow = 0x30,
        QueueDeviceHigh = 0x34,
        QueueNotifyData = 0x38,
        QueueReset = 0x3A,
    }

    // §4.1.4.10.
    private enum Legacy : uint
    {
        DeviceFeatures = 0,
        DriverFeatures = 4,
        QueueAddress = 8,
        QueueSize = 12,
        QueueSelect = 14,
        QueueNotify = 16,
        DeviceStatus = 18,
        IsrStatus = 19,
        ConfigMsixVector = 20,
        QueueMsixVector = 22,
    }

    /// <inheritdoc/>
    public override int StateVersion => 1;

    /// <summary>The device behind the registers.</summary>
    public VirtioDevice Device => _device;

    /// <inheritdoc/>
    public void SignalQueue(int queue)
    {
        if (MsiX is { IsEnabled: true } msix)
        {
            msix.Send(Volatile.Read(ref _queueVectors[queue]));
        }
        else
        {
            RaiseIsr(IsrQueue);
        }
    }

    /// <inheritdoc/>
    public void SignalConfig()
    {
        if (MsiX is { IsEnabled: true } msix)
        {
            msix.Send(Volatile.Read(ref _configVector));
        }
        else
        {
            RaiseIsr(IsrConfig);
        }
    }

    /// <inheritdoc/>
    public override void Pause() => _device.Pause();

    /// <inheritdoc/>
    public override void Resume() => _device.Resume();

    /// <inheritdoc/>
    protected override void ResetCard()
    {
        _device.Reset();
        lock (_registerGate)
        {
            ClearRegisters();
        }
    }

    /// <inheritdoc/>
    protected override void SaveCard(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_registerGate)
        {
            writer.Write("vpci.device-feature-select", _deviceFeatureSelect);
            writer.Write("vpci.driver-feature-select", _driverFeatureSelect);
            writer.Write("vpci.queue-select", _queueSelect);
            writer.Write("vpci.isr", _isr);
            writer.Write("vpci.config-vector", _configVector);
            for (int i = 0; i < _queueVectors.Length; i++)
            {
                writer.Write($"vpci.q{i}.vector", _queueVectors[i]);
            }
        }

        _device.Save(writer);
    }

    /// <inheritdoc/>
    protected override void LoadCard(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        _device.Load(reader);
        lock (_registerGate)
        {
            _deviceFeatureSelect = reader.ReadUInt32("vpci.device-feature-select");
            _driverFeatureSelect = reader.ReadUInt32("vpci.driver-feature-select");
            _queueSelect = reader.ReadUInt16("vpci.queue-select");
            _isr = (byte)reader.ReadBounded("vpci.isr", 3);
            _configVector = reader.ReadUInt16("vpci.config-vector");
            for (int i = 0; i < _queueVectors.Length; i++)
            {
                _queueVectors[i] = reader.ReadUInt16($"vpci.q{i}.vector");
            }

            Intx.Set(_isr != 0);
        }
    }

    /// <inheritdoc/>
    protected override void OnBarMoved(int index, ulong? guestAddress)
    {
        if (index == ModernBar)
        {
            _doorbells?.Place(guestAddress + DoorbellOffset, _device.QueueCount, DoorbellBytes);
        }
    }

    /// <inheritdoc/>
    protected override void OnConfigReading(int offset, int length)
    {
        int data = _configAccess + 16;
        if (_configAccess == 0 || offset >= data + 4 || offset + length <= data)
        {
            return;
        }

        if (TryGetConfigAccess(out uint at, out AccessWidth width))
        {
            SetConfig(data, AccessWidth.Dword, (uint)ReadModern(at, width));
        }
    }

    /// <inheritdoc/>
    protected override void OnConfigWritten(int offset, int length)
    {
        int data = _configAccess + 16;
        if (_configAccess == 0 || offset >= data + 4 || offset + length <= data)
        {
            return;
        }

        if (TryGetConfigAccess(out uint at, out AccessWidth width))
        {
            uint value = GetConfig(data, AccessWidth.Dword);
            uint mask = width == AccessWidth.Dword ? uint.MaxValue : (1u << (8 * (int)width)) - 1;
            WriteModern(at, width, value & mask);
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _device.Dispose();
        }

        base.Dispose(disposing);
    }

    // §4.1.2: transitional identifiers exist for the types of the old specification.
    private static PciIdentity IdentityOf(IVirtioModel model, ref VirtioPciMode mode)
    {
        ArgumentNullException.ThrowIfNull(model);
        (ushort old, uint classCode) = model.Type switch
        {
            VirtioDeviceType.Net => ((ushort)0x1000, 0x020000u),
            VirtioDeviceType.Block => ((ushort)0x1001, 0x010000u),
            VirtioDeviceType.Balloon => ((ushort)0x1002, 0x00FF00u),
            VirtioDeviceType.Console => ((ushort)0x1003, 0x078000u),
            VirtioDeviceType.Scsi => ((ushort)0x1004, 0x010000u),
            VirtioDeviceType.Rng => ((ushort)0x1005, 0x00FF00u),
            VirtioDeviceType.NineP => ((ushort)0x1009, 0x000200u),
            VirtioDeviceType.Gpu => ((ushort)0, 0x038000u),
            VirtioDeviceType.Input => ((ushort)0, 0x098000u),
            _ => ((ushort)0, 0x078000u),
        };
        if (old == 0)
        {
            mode = VirtioPciMode.Modern;
        }

        ushort type = (ushort)model.Type;
        return mode == VirtioPciMode.Modern
            ? new PciIdentity(Vendor, (ushort)(0x1040 + type), classCode, 1, Vendor, (ushort)(0x40 + type))
            : new PciIdentity(Vendor, old, classCode, 0, Vendor, type);
    }

    private static ulong SetLow(ulong value, uint low) => (value & ~0xFFFF_FFFFUL) | low;

    private static ulong SetHigh(ulong value, uint high) => (value & 0xFFFF_FFFFUL) | ((ulong)high << 32);

    private void AddVirtioCapability(byte type, uint offset, uint length, uint? multiplier = null)
    {
        Span<byte> body = stackalloc byte[18];
        body.Clear();
        body = body[..(multiplier is null ? 14 : 18)];
        body[0] = (byte)(body.Length + 2);
        body[1] = type;
        body[2] = 4;
        BinaryPrimitives.WriteUInt32LittleEndian(body[6..], offset);
        BinaryPrimitives.WriteUInt32LittleEndian(body[10..], length);
        if (multiplier is { } value)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(body[14..], value);
        }

        AddCapability(0x09, body, []);
    }

    private bool TryGetConfigAccess(out uint offset, out AccessWidth width)
    {
        uint bar = GetConfig(_configAccess + 4, AccessWidth.Byte);
        offset = GetConfig(_configAccess + 8, AccessWidth.Dword);
        uint length = GetConfig(_configAccess + 12, AccessWidth.Dword);
        width = (AccessWidth)length;
        return bar == 4 && length is 1 or 2 or 4 && offset <= (4 * SectionBytes) - length && offset % length == 0;
    }

    private void RaiseIsr(byte cause)
    {
        lock (_registerGate)
        {
            _isr |= cause;
            Intx.Set(asserted: true);
        }
    }

    private byte TakeIsr()
    {
        lock (_registerGate)
        {
            byte isr = _isr;
            _isr = 0;
            Intx.Set(asserted: false);
            return isr;
        }
    }

    private void ClearRegisters()
    {
        _configVector = PciMsiX.NoVector;
        Array.Fill(_queueVectors, (ushort)PciMsiX.NoVector);
        _deviceFeatureSelect = 0;
        _driverFeatureSelect = 0;
        _queueSelect = 0;
        _isr = 0;
        Intx.Set(asserted: false);
    }

    // §4.1.4.3.1: a vector that does not exist reads back as NO_VECTOR.
    private ushort CheckVector(uint vector) =>
        vector < (uint)(MsiX?.Vectors ?? 0) ? (ushort)vector : (ushort)PciMsiX.NoVector;

    private void WriteStatus(byte value, bool wait)
    {
        _device.WriteStatus(value);
        if (value == 0)
        {
            if (wait)
            {
                _device.WaitForReset();
            }

            lock (_registerGate)
            {
                ClearRegisters();
            }
        }
    }

    private ulong ReadModern(uint offset, AccessWidth width)
    {
        uint section = offset / SectionBytes * SectionBytes;
        uint at = offset - section;
        switch (section)
        {
            case CommonOffset:
                if (width == AccessWidth.Qword)
                {
                    return ReadCommon(at, AccessWidth.Dword) | ((ulong)ReadCommon(at + 4, AccessWidth.Dword) << 32);
                }

                return ReadCommon(at, width);
            case IsrOffset:
                return at == 0 ? TakeIsr() : 0u;
            case DeviceOffset:
                return ReadDeviceConfig(at, width);
            default:
                return 0;
        }
    }

    private void WriteModern(uint offset, AccessWidth width, ulong value)
    {
        uint section = offset / SectionBytes * SectionBytes;
        uint at = offset - section;
        switch (section)
        {
            case CommonOffset:
                if (width == AccessWidth.Qword)
                {
                    WriteCommon(at, AccessWidth.Dword, (uint)value);
                    WriteCommon(at + 4, AccessWidth.Dword, (uint)(value >> 32));
                }
                else
                {
                    WriteCommon(at, width, (uint)value);
                }

                break;
            case DeviceOffset:
                WriteDeviceConfig(at, width, value);
                break;
            case DoorbellOffset:
                _device.NotifyQueue((int)(at / DoorbellBytes)); // the address names the queue, whatever is written
                break;
        }
    }

    private ulong ReadDeviceConfig(uint offset, AccessWidth width)
    {
        Span<byte> bytes = stackalloc byte[8];
        bytes.Clear();
        _device.ReadConfig(offset, bytes[..(int)width]);
        return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
    }

    private void WriteDeviceConfig(uint offset, AccessWidth width, ulong value)
    {
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
        _device.WriteConfig(offset, bytes[..(int)width]);
    }

    // Fields are read with their own width or as the dword or word that holds them (§4.1.3.1 asks drivers for the former).
    private uint ReadCommon(uint offset, AccessWidth width)
    {
        lock (_registerGate)
        {
            uint dword = ReadCommonDword(offset & ~3u);
            uint mask = width == AccessWidth.Dword ? uint.MaxValue : (1u << (8 * (int)width)) - 1;
            return (dword >> (int)(8 * (offset & 3))) & mask;
        }
    }

    private uint ReadCommonDword(uint offset)
    {
        VirtioQueueSetup? queue = _device.QueueSetup(_queueSelect);
        ushort vector = queue is null ? (ushort)PciMsiX.NoVector : _queueVectors[_queueSelect];
        return (Common)offset switch
        {
            Common.DeviceFeatureSelect => _deviceFeatureSelect,
            Common.DeviceFeature => _device.ReadFeatures(_deviceFeatureSelect),
            Common.DriverFeatureSelect => _driverFeatureSelect,
            Common.DriverFeature => _driverFeatureSelect switch
            {
                0 => (uint)_device.DriverFeatures,
                1 => (uint)(_device.DriverFeatures >> 32),
                _ => 0,
            },
            Common.ConfigMsixVector => _configVector | ((uint)_device.QueueCount << 16),
            Common.DeviceStatus =>
                (uint)_device.Status | ((_device.ConfigGeneration & 0xFF) << 8) | ((uint)_queueSelect << 16),
            Common.QueueSize => (queue?.Size ?? 0u) | ((uint)vector << 16),
            Common.QueueEnable => (queue is { Enabled: true, Resetting: false } ? 1u : 0u) | ((uint)_queueSelect << 16),
            Common.QueueDescLow => (uint)(queue?.Descriptors ?? 0),
            Common.QueueDescHigh => (uint)((queue?.Descriptors ?? 0) >> 32),
            Common.QueueDriverLow => (uint)(queue?.Driver ?? 0),
            Common.QueueDriverHigh => (uint)((queue?.Driver ?? 0) >> 32),
            Common.QueueDeviceLow => (uint)(queue?.Device ?? 0),
            Common.QueueDeviceHigh => (uint)((queue?.Device ?? 0) >> 32),
            Common.QueueNotifyData => queue is { Resetting: true } ? 1u << 16 : 0,
            _ => 0,
        };
    }

    private void WriteCommon(uint offset, AccessWidth width, uint value)
    {
        var register = (Common)offset;
        switch (register)
        {
            // These reach into the device, which may raise interrupts: not under the gate.
            case Common.DeviceStatus when width == AccessWidth.Byte:
                WriteStatus((byte)value, wait: false);
                return;
            case Common.QueueEnable when width >= AccessWidth.Word:
                if ((value & 0xFFFF) == 1)
                {
                    _device.EnableQueue(Volatile.Read(ref _queueSelect)); // §4.1.4.3.2: a driver never writes 0
                }

                return;
            case Common.QueueReset when width >= AccessWidth.Word:
                if ((value & 0xFFFF) == 1 && (_device.DriverFeatures & VirtioFeature.RingReset) != 0)
                {
                    _device.ResetQueue(Volatile.Read(ref _queueSelect));
                }

                return;
        }

        lock (_registerGate)
        {
            switch (register)
            {
                case Common.DeviceFeatureSelect:
                    _deviceFeatureSelect = value;
                    break;
                case Common.DriverFeatureSelect:
                    _driverFeatureSelect = value;
                    break;
                case Common.DriverFeature:
                    _device.WriteDriverFeatures(_driverFeatureSelect, value);
                    break;
                case Common.ConfigMsixVector:
                    _configVector = CheckVector(value & 0xFFFF);
                    break;
                case Common.QueueSelect:
                    _queueSelect = (ushort)value;
                    break;
                case Common.QueueMsixVector:
                    if (_queueSelect < _queueVectors.Length)
                    {
                        _queueVectors[_queueSelect] = CheckVector(value & 0xFFFF);
                    }

                    break;
                default:
                    WriteCommonQueue(register, value);
                    break;
            }
        }
    }

    private void WriteCommonQueue(Common register, uint value)
    {
        if (_device.QueueSetup(_queueSelect) is not { Enabled: false } queue)
        {
            return; // addresses of a live queue do not change
        }

        switch (register)
        {
            case Common.QueueSize:
                queue.Size = (ushort)value;
                break;
            case Common.QueueDescLow:
                queue.Descriptors = SetLow(queue.Descriptors, value);
                break;
            case Common.QueueDescHigh:
                queue.Descriptors = SetHigh(queue.Descriptors, value);
                break;
            case Common.QueueDriverLow:
                queue.Driver = SetLow(queue.Driver, value);
                break;
            case Common.QueueDriverHigh:
                queue.Driver = SetHigh(queue.Driver, value);
                break;
            case Common.QueueDeviceLow:
                queue.Device = SetLow(queue.Device, value);
                break;
            case Common.QueueDeviceHigh:
                queue.Device = SetHigh(queue.Device, value);
                break;
        }
    }

    // With MSI-X on, two vector registers stand before the device's configuration.
    private uint LegacyConfigOffset => MsiX is { IsEnabled: true } ? 24u : 20u;

    private ulong ReadLegacy(uint offset, AccessWidth width)
    {
        uint config = LegacyConfigOffset;
        if (offset >= config)
        {
            return ReadDeviceConfig(offset - config, width);
        }

        if ((Legacy)offset == Legacy.IsrStatus)
        {
            return TakeIsr();
        }

        uint mask = width >= AccessWidth.Dword ? uint.MaxValue : (1u << (8 * (int)width)) - 1;
        lock (_registerGate)
        {
            VirtioQueueSetup? queue = _device.QueueSetup(_queueSelect);
            return mask & (Legacy)offset switch
            {
                Legacy.DeviceFeatures => _device.LegacyFeatures,
                Legacy.DriverFeatures => (uint)_device.DriverFeatures,
                Legacy.QueueAddress => queue is { Enabled: true } ? (uint)(queue.Descriptors >> LegacyPageShift) : 0u,
                Legacy.QueueSize => queue?.MaxSize ?? 0u,
                Legacy.QueueSelect => _queueSelect,
                Legacy.DeviceStatus => (uint)_device.Status,
                Legacy.ConfigMsixVector => _configVector,
                Legacy.QueueMsixVector => queue is null ? (uint)PciMsiX.NoVector : _queueVectors[_queueSelect],
                _ => 0u,
            };
        }
    }

    private void WriteLegacy(uint offset, AccessWidth width, ulong value)
    {
        uint config = LegacyConfigOffset;
        if (offset >= config)
        {
            WriteDeviceConfig(offset - config, width, value);
            return;
        }

        switch ((Legacy)offset)
        {
            case Legacy.DriverFeatures:
                _device.WriteLegacyFeatures((uint)value);
                break;
            case Legacy.QueueAddress:
                SetLegacyAddress((uint)value);
                break;
            case Legacy.QueueNotify:
                _device.NotifyQueue((int)(value & 0xFFFF), legacy: true);
                break;
            case Legacy.DeviceStatus:
                WriteStatus((byte)value, wait: true);
                break;
            case Legacy.QueueSelect:
                lock (_registerGate)
                {
                    _queueSelect = (ushort)value;
                }

                break;
            case Legacy.ConfigMsixVector:
                lock (_registerGate)
                {
                    _configVector = CheckVector((uint)value & 0xFFFF);
                }

                break;
            case Legacy.QueueMsixVector:
                lock (_registerGate)
                {
                    if (_queueSelect < _queueVectors.Length)
                    {
                        _queueVectors[_queueSelect] = CheckVector((uint)value & 0xFFFF);
                    }
                }

                break;
        }
    }

    // §2.7.2: a legacy queue is contiguous, with the used ring on the next page; writing 0 takes it away.
    private void SetLegacyAddress(uint page)
    {
        int index;
        lock (_registerGate)
        {
            index = _queueSelect;
            if (_device.QueueSetup(index) is not { } queue)
            {
                return;
            }

            if (page != 0 && !queue.Enabled)
            {
                ulong start = (ulong)page << LegacyPageShift;
                ulong driver = start + (16UL * queue.MaxSize);
                ulong end = driver + 6 + (2UL * queue.MaxSize);
                queue.Size = queue.MaxSize;
                queue.Descriptors = start;
                queue.Driver = driver;
                queue.Device = (end + 0xFFF) & ~0xFFFUL;
            }
        }

        if (page == 0)
        {
            _device.ResetQueue(index);
        }
        else
        {
            _device.EnableQueue(index);
        }
    }

    private sealed class ModernWindow : IRegisterWindow
    {
        private readonly VirtioPci _owner;

        public ModernWindow(VirtioPci owner) => _owner = owner;

        public uint Length => 4 * SectionBytes;

        public ulong Read(uint offset, AccessWidth width) => _owner.ReadModern(offset, width);

        public void Write(uint offset, AccessWidth width, ulong value) => _owner.WriteModern(offset, width, value);
    }

    private sealed class LegacyWindow : IRegisterWindow
    {
        private readonly VirtioPci _owner;

        public LegacyWindow(VirtioPci owner) => _owner = owner;

        public uint Length => PciFunction.RoundUpToPowerOfTwo(24 + (uint)_owner._device.Model.ConfigBytes);

        public ulong Read(uint offset, AccessWidth width) => _owner.ReadLegacy(offset, width);

        public void Write(uint offset, AccessWidth width, ulong value) => _owner.WriteLegacy(offset, width, value);
    }
}
