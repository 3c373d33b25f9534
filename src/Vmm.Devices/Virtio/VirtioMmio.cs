// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Buffers.Binary;
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Virtio;

/// <summary>
/// virtio-mmio, version 2 (VIRTIO 1.2 §4.2): one 512-byte register window and one level interrupt. Registers below 0x100
/// take 32-bit accesses only; others read as 0 and are ignored. Configuration space takes any width.
/// </summary>
public sealed class VirtioMmio : IDevice, IRegisterWindow, IVirtioInterrupts
{
    private const uint MagicValue = 0x74726976; // "virt"
    private const uint Version = 2;
    private const uint VendorId = 0x554D4D56; // "VMMU"
    private const uint Config = 0x100;
    private const uint InterruptQueue = 1;
    private const uint InterruptConfig = 2;

    private readonly Lock _gate = new();
    private readonly VirtioDevice _device;
    private readonly IIrqLine _irq;
    private uint _deviceFeatureSelect;
    private uint _driverFeatureSelect;
    private uint _queueSelect;
    private uint _interruptStatus;

    /// <summary>Makes the transport around a device, which it owns.</summary>
    public VirtioMmio(VirtioDevice device, IIrqLine irq)
    {
        ArgumentNullException.ThrowIfNull(device);
        _device = device;
        _irq = irq;
        device.Attach(this);
    }

    private enum Register : uint
    {
        Magic = 0x000,
        Version = 0x004,
        DeviceId = 0x008,
        VendorId = 0x00C,
        DeviceFeatures = 0x010,
        DeviceFeaturesSel = 0x014,
        DriverFeatures = 0x020,
        DriverFeaturesSel = 0x024,
        QueueSel = 0x030,
        QueueNumMax = 0x034,
        QueueNum = 0x038,
        QueueReady = 0x044,
        QueueNotify = 0x050,
        InterruptStatus = 0x060,
        InterruptAck = 0x064,
        Status = 0x070,
        QueueDescLow = 0x080,
        QueueDescHigh = 0x084,
        QueueDriverLow = 0x090,
        QueueDriverHigh = 0x094,
        QueueDeviceLow = 0x0A0,
        QueueDeviceHigh = 0x0A4,
        ShmLengthLow = 0x0B0,
        ShmLengthHigh = 0x0B4,
        ShmBaseLow = 0x0B8,
        ShmBaseHigh = 0x0BC,
        QueueReset = 0x0C0,
        ConfigGeneration = 0x0FC,
    }

    /// <inheritdoc/>
    public string Id => _device.Id;

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <inheritdoc/>
    public uint Length => 0x200;

    /// <summary>Offset of the doorbell register, for a machine that wires it to the worker (the value is the queue).</summary>
    public static uint DoorbellOffset => (uint)Register.QueueNotify;

    /// <summary>The device behind the registers.</summary>
    public VirtioDevice Device => _device;

    /// <inheritdoc/>
    public ulong Read(uint offset, AccessWidth width)
    {
        if (offset >= Config)
        {
            Span<byte> bytes = stackalloc byte[8];
            bytes.Clear();
            _device.ReadConfig(offset - Config, bytes[..(int)width]);
            return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
        }

        return width == AccessWidth.Dword ? ReadRegister((Register)offset) : 0;
    }

    /// <inheritdoc/>
    public void Write(uint offset, AccessWidth width, ulong value)
    {
        if (offset >= Config)
        {
            Span<byte> bytes = stackalloc byte[8];
            BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
            _device.WriteConfig(offset - Config, bytes[..(int)width]);
        }
        else if (width == AccessWidth.Dword)
        {
            WriteRegister((Register)offset, (uint)value);
        }
    }

    /// <inheritdoc/>
    public void SignalQueue(int queue) => Raise(InterruptQueue);

    /// <inheritdoc/>
    public void SignalConfig() => Raise(InterruptConfig);

    /// <inheritdoc/>
    public void Reset()
    {
        _device.Reset();
        lock (_gate)
        {
            ClearRegisters();
        }
    }

    /// <inheritdoc/>
    public void Pause() => _device.Pause();

    /// <inheritdoc/>
    public void Resume() => _device.Resume();

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_gate)
        {
            writer.Write("mmio.device-feature-select", _deviceFeatureSelect);
            writer.Write("mmio.driver-feature-select", _driverFeatureSelect);
            writer.Write("mmio.queue-select", _queueSelect);
            writer.Write("mmio.interrupt-status", _interruptStatus);
        }

        _device.Save(writer);
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        ArgumentNullException.ThrowIfNull(reader);
        _device.Load(reader);
        lock (_gate)
        {
            _deviceFeatureSelect = reader.ReadUInt32("mmio.device-feature-select");
            _driverFeatureSelect = reader.ReadUInt32("mmio.driver-feature-select");
            _queueSelect = reader.ReadUInt32("mmio.queue-select");
            _interruptStatus = (uint)reader.ReadBounded("mmio.interrupt-status", 3);
            _irq.Set(_interruptStatus != 0);
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _device.Dispose();

    private static ulong SetLow(ulong value, uint low) => (value & ~0xFFFF_FFFFUL) | low;

    private static ulong SetHigh(ulong value, uint high) => (value & 0xFFFF_FFFFUL) | ((ulong)high << 32);

    private uint ReadRegister(Register register)
    {
        lock (_gate)
        {
            VirtioQueueSetup? queue = SelectedQueue();
            return register switch
            {
                Register.Magic => MagicValue,
                Register.Version => Version,
                Register.DeviceId => (uint)_device.Model.Type,
                Register.VendorId => VendorId,
                Register.DeviceFeatures => _device.ReadFeatures(_deviceFeatureSelect),
                Register.QueueNumMax => queue?.MaxSize ?? 0,
                Register.QueueReady => queue is { Enabled: true } ? 1u : 0,
                Register.QueueReset => queue is { Resetting: true } ? 1u : 0,
                Register.InterruptStatus => _interruptStatus,
                Register.Status => (uint)_device.Status,
                Register.ConfigGeneration => _device.ConfigGeneration,

                // No shared memory regions: length and base read as -1 (§4.2.2).
                Register.ShmLengthLow or Register.ShmLengthHigh or Register.ShmBaseLow or Register.ShmBaseHigh
                    => uint.MaxValue,
                _ => 0,
            };
        }
    }

    private void WriteRegister(Register register, uint value)
    {
        switch (register)
        {
            // These reach into the device, which may raise interrupts: not under the gate.
            case Register.QueueNotify:
                _device.NotifyQueue((int)Math.Min(value, int.MaxValue));
                return;
            case Register.Status:
                WriteStatus(value);
                return;
            case Register.QueueReady:
                EnableQueue(value);
                return;
            case Register.QueueReset:
                if (value == 1 && (_device.DriverFeatures & VirtioFeature.RingReset) != 0)
                {
                    _device.ResetQueue((int)Math.Min(Volatile.Read(ref _queueSelect), int.MaxValue));
                }

                return;
        }

        lock (_gate)
        {
            VirtioQueueSetup? queue = SelectedQueue();
            switch (register)
            {
                case Register.DeviceFeaturesSel:
                    _deviceFeatureSelect = value;
                    break;
                case Register.DriverFeaturesSel:
                    _driverFeatureSelect = value;
                    break;
                case Register.DriverFeatures:
                    _device.WriteDriverFeatures(_driverFeatureSelect, value);
                    break;
                case Register.QueueSel:
                    _queueSelect = value;
                    break;
                case Register.InterruptAck:
                    _interruptStatus &= ~value;
                    _irq.Set(_interruptStatus != 0);
                    break;
                default:
                    WriteQueueRegister(register, value, queue);
                    break;
            }
        }
    }

    private static void WriteQueueRegister(Register register, uint value, VirtioQueueSetup? queue)
    {
        if (queue is null || queue.Enabled)
        {
            return; // §4.2.2.2: not while the queue is ready
        }

        switch (register)
        {
            case Register.QueueNum:
                queue.Size = (ushort)Math.Min(value, ushort.MaxValue);
                break;
            case Register.QueueDescLow:
                queue.Descriptors = SetLow(queue.Descriptors, value);
                break;
            case Register.QueueDescHigh:
                queue.Descriptors = SetHigh(queue.Descriptors, value);
                break;
            case Register.QueueDriverLow:
                queue.Driver = SetLow(queue.Driver, value);
                break;
            case Register.QueueDriverHigh:
                queue.Driver = SetHigh(queue.Driver, value);
                break;
            case Register.QueueDeviceLow:
                queue.Device = SetLow(queue.Device, value);
                break;
            case Register.QueueDeviceHigh:
                queue.Device = SetHigh(queue.Device, value);
                break;
        }
    }

    private void WriteStatus(uint value)
    {
        _device.WriteStatus((byte)value);
        if ((byte)value == 0)
        {
            _device.WaitForReset(); // Linux's driver does not read the register back
            lock (_gate)
            {
                ClearRegisters();
            }
        }
    }

    private void EnableQueue(uint value)
    {
        int index = (int)Math.Min(Volatile.Read(ref _queueSelect), int.MaxValue);
        if (value == 1)
        {
            _device.EnableQueue(index);
        }
        else if (value == 0)
        {
            _device.ResetQueue(index);
        }
    }

    private VirtioQueueSetup? SelectedQueue() => _device.QueueSetup((int)Math.Min(_queueSelect, int.MaxValue));

    private void Raise(uint cause)
    {
        lock (_gate)
        {
            _interruptStatus |= cause;
            _irq.Set(asserted: true);
        }
    }

    private void ClearRegisters()
    {
        _deviceFeatureSelect = 0;
        _driverFeatureSelect = 0;
        _queueSelect = 0;
        _interruptStatus = 0;
        _irq.Set(asserted: false);
    }
}
