// SPDX-License-Identifier: BSD-2-Clause
using System.Threading;
using Vmm.Core;

namespace Vmm.Devices.Legacy;

// Theory. Two Intel 8259A interrupt controllers (data sheet 231468-003) as a PC wires them: the slave's output is the
// master's input 2, and the PIIX3 adds an edge/level register per chip (ELCR, 82371SB §2.5.6). The 8080 mode and the
// buffered modes are wiring that a PC does not have; ICW1's LTIM bit is superseded by ELCR.
//
// One deviation: an edge request stays in IRR when its input falls before it was acknowledged, where the data sheet
// answers with a spurious IR7. Timers of a virtual machine can run late, and a chip that pulsed must not lose its
// interrupt to that; KVM's model does the same. Level requests follow their input, so IR7 and IR15 do occur.
//
// Both chips have one gate. The output is driven under it (order: device gate, this gate, local APIC). Acknowledge is
// called by the local APIC without its own gate held.

/// <summary>What stands behind an ExtINT input of a local APIC.</summary>
public interface IExternalInterruptSource
{
    /// <summary>The output is asserted. Lock-free.</summary>
    bool HasInterrupt { get; }

    /// <summary>Interrupt acknowledge cycle; always gives a vector, if need be the spurious one.</summary>
    byte Acknowledge();
}

/// <summary>The cascaded pair of 8259A. See the theory at the top of this file.</summary>
public sealed class I8259Pair : IDevice, IExternalInterruptSource
{
    /// <summary>Ports of the master.</summary>
    public const ushort MasterPort = 0x20;

    /// <summary>Ports of the slave.</summary>
    public const ushort SlavePort = 0xA0;

    /// <summary>Ports of the two edge/level registers.</summary>
    public const ushort ElcrPort = 0x4D0;

    private readonly Lock _gate = new();
    private readonly IIrqLine _output;
    private readonly Chip _master = new(0, 0xF8);
    private readonly Chip _slave = new(1, 0xDE);
    private readonly IIrqLine[] _inputs = new IIrqLine[16];
    private volatile bool _asserted;

    /// <summary>Makes the pair.</summary>
    /// <param name="output">INTR: LINT0 of the boot processor.</param>
    public I8259Pair(IIrqLine output)
    {
        _output = output;
        for (int i = 0; i < 16; i++)
        {
            int irq = i;
            _inputs[i] = new DelegateLine(level => SetInput(irq, level));
        }

        MasterPorts = new ChipPorts(this, _master);
        SlavePorts = new ChipPorts(this, _slave);
        ElcrPorts = new ElcrWindow(this);
    }

    /// <inheritdoc/>
    public string Id => "pic";

    /// <inheritdoc/>
    public int StateVersion => 1;

    /// <summary>Two ports for <see cref="MasterPort"/>.</summary>
    public IRegisterWindow MasterPorts { get; }

    /// <summary>Two ports for <see cref="SlavePort"/>.</summary>
    public IRegisterWindow SlavePorts { get; }

    /// <summary>Two ports for <see cref="ElcrPort"/>.</summary>
    public IRegisterWindow ElcrPorts { get; }

    /// <inheritdoc/>
    public bool HasInterrupt => _asserted;

    /// <summary>An interrupt input, 0..15; 2 is the cascade and takes nothing.</summary>
    public IIrqLine Input(int irq) => _inputs[irq];

    /// <inheritdoc/>
    public byte Acknowledge()
    {
        lock (_gate)
        {
            int irq = _master.Pending();
            if (irq < 0)
            {
                return (byte)(_master.VectorBase + 7);
            }

            _master.BeginService(irq);
            byte vector;
            if (irq == 2)
            {
                int slaveIrq = _slave.Pending();
                if (slaveIrq >= 0)
                {
                    _slave.BeginService(slaveIrq);
                }

                vector = (byte)(_slave.VectorBase + (slaveIrq < 0 ? 7 : slaveIrq));
            }
            else
            {
                vector = (byte)(_master.VectorBase + irq);
            }

            Update();
            return vector;
        }
    }

    /// <inheritdoc/>
    public void Reset()
    {
        lock (_gate)
        {
            _master.PowerOn();
            _slave.PowerOn();
            Update();
        }
    }

    /// <inheritdoc/>
    public void Pause()
    {
    }

    /// <inheritdoc/>
    public void Resume()
    {
    }

    /// <inheritdoc/>
    public void Save(StateWriter writer)
    {
        lock (_gate)
        {
            _master.Save(writer, "master.");
            _slave.Save(writer, "slave.");
        }
    }

    /// <inheritdoc/>
    public void Load(StateReader reader, int version)
    {
        lock (_gate)
        {
            _master.Load(reader, "master.");
            _slave.Load(reader, "slave.");
            Update();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    private void SetInput(int irq, bool level)
    {
        if (irq == 2)
        {
            return;
        }

        lock (_gate)
        {
            (irq < 8 ? _master : _slave).SetInput(irq & 7, level);
            Update();
        }
    }

    // Under the gate. The cascade input follows the slave's output like a level request.
    private void Update()
    {
        _master.SetCascade(_slave.Pending() >= 0);
        bool asserted = _master.Pending() >= 0;
        if (asserted != _asserted)
        {
            _asserted = asserted;
            _output.Set(asserted);
        }
    }

    private sealed class Chip
    {
        private readonly int _index;
        private readonly byte _elcrMask;
        private byte _irr;
        private byte _imr;
        private byte _isr;
        private byte _inputs;
        private byte _elcr;
        private byte _cascade;
        private int _lowest = 7;
        private int _initStep;
        private bool _needsIcw4;
        private bool _single;
        private bool _autoEoi;
        private bool _rotateOnAutoEoi;
        private bool _specialFullyNested;
        private bool _specialMask;
        private bool _poll;
        private bool _readIsr;

        public Chip(int index, byte elcrMask)
        {
            _index = index;
            _elcrMask = elcrMask;
        }

        public byte VectorBase { get; private set; }

        public byte Elcr
        {
            get => _elcr;
            set
            {
                _elcr = (byte)(value & _elcrMask);

                // A pin that becomes level-triggered requests exactly while it is asserted.
                _irr = (byte)((_irr & ~_elcr) | (_inputs & _elcr));
            }
        }

        public void PowerOn()
        {
            // The inputs belong to other chips and stay.
            Initialize();
            VectorBase = 0;

            // The chip does nothing before its initialization words, of which the first clears the mask (data sheet,
            // "Initialization Command Words"): a guest that enables interrupts without them gets none.
            _imr = 0xFF;
            _initStep = 0;
            _elcr = 0;
            _needsIcw4 = _single = false;
        }

        public void SetInput(int pin, bool level)
        {
            byte bit = (byte)(1 << pin);
            bool was = (_inputs & bit) != 0;
            _inputs = (byte)(level ? _inputs | bit : _inputs & ~bit);
            if ((_elcr & bit) != 0)
            {
                _irr = (byte)(level ? _irr | bit : _irr & ~bit);
            }
            else if (level && !was)
            {
                _irr |= bit;
            }
        }

        public void SetCascade(bool level) => _cascade = level && _index == 0 ? (byte)4 : (byte)0;

        /// <summary>The request that the output stands for, or -1.</summary>
        public int Pending()
        {
            int requests = (_irr | _cascade) & ~_imr;
            if (requests == 0)
            {
                return -1;
            }

            // In special mask mode an in-service bit that is masked inhibits nothing (data sheet, "Special Mask Mode").
            // In special fully nested mode the master lets further requests of a slave in service through.
            int service = _specialMask ? _isr & ~_imr : _isr;
            if (_specialFullyNested && _index == 0)
            {
                service &= ~4;
            }

            for (int i = 1; i <= 8; i++)
            {
                int irq = (_lowest + i) & 7;
                int bit = 1 << irq;
                if ((service & bit) != 0)
                {
                    return -1;
                }

                if ((requests & bit) != 0 && (_isr & bit) == 0)
                {
                    return irq;
                }

                if ((requests & bit) != 0 && _specialFullyNested && bit == 4 && _index == 0)
                {
                    return irq;
                }
            }

            return -1;
        }

        public void BeginService(int irq)
        {
            byte bit = (byte)(1 << irq);
            if ((_elcr & bit) == 0)
            {
                _irr &= (byte)~bit;
            }

            if (_autoEoi)
            {
                if (_rotateOnAutoEoi)
                {
                    _lowest = irq;
                }
            }
            else
            {
                _isr |= bit;
            }
        }

        public byte Read(uint offset)
        {
            if (_poll)
            {
                // A read in poll mode is an acknowledge (data sheet, "Poll Command").
                _poll = false;
                int irq = Pending();
                if (irq < 0)
                {
                    return 0;
                }

                BeginService(irq);
                return (byte)(0x80 | irq);
            }

            return offset == 1 ? _imr : _readIsr ? _isr : (byte)(_irr | _cascade);
        }

        public void Write(uint offset, byte value)
        {
            if (offset == 0)
            {
                if ((value & 0x10) != 0)
                {
                    Initialize();
                    _needsIcw4 = (value & 1) != 0;
                    _single = (value & 2) != 0;
                    _initStep = 2;
                }
                else if ((value & 0x08) != 0)
                {
                    WriteOcw3(value);
                }
                else
                {
                    WriteOcw2(value);
                }

                return;
            }

            switch (_initStep)
            {
                case 2:
                    VectorBase = (byte)(value & 0xF8);
                    _initStep = !_single ? 3 : _needsIcw4 ? 4 : 0;
                    break;
                case 3:
                    _initStep = _needsIcw4 ? 4 : 0;
                    break;
                case 4:
                    _specialFullyNested = (value & 0x10) != 0;
                    _autoEoi = (value & 0x02) != 0;
                    _initStep = 0;
                    break;
                default:
                    _imr = value;
                    break;
            }
        }

        public void Save(StateWriter writer, string prefix)
        {
            writer.Write(prefix + "irr", (ulong)_irr);
            writer.Write(prefix + "imr", (ulong)_imr);
            writer.Write(prefix + "isr", (ulong)_isr);
            writer.Write(prefix + "inputs", (ulong)_inputs);
            writer.Write(prefix + "elcr", (ulong)_elcr);
            writer.Write(prefix + "base", (ulong)VectorBase);
            writer.Write(prefix + "lowest", (ulong)_lowest);
            writer.Write(prefix + "initStep", (ulong)_initStep);
            writer.Write(prefix + "needsIcw4", _needsIcw4);
            writer.Write(prefix + "single", _single);
            writer.Write(prefix + "autoEoi", _autoEoi);
            writer.Write(prefix + "rotate", _rotateOnAutoEoi);
            writer.Write(prefix + "sfnm", _specialFullyNested);
            writer.Write(prefix + "smm", _specialMask);
            writer.Write(prefix + "poll", _poll);
            writer.Write(prefix + "readIsr", _readIsr);
        }

        public void Load(StateReader reader, string prefix)
        {
            _irr = reader.ReadByte(prefix + "irr");
            _imr = reader.ReadByte(prefix + "imr");
            _isr = reader.ReadByte(prefix + "isr");
            _inputs = reader.ReadByte(prefix + "inputs");
            _elcr = (byte)(reader.ReadByte(prefix + "elcr") & _elcrMask);
            VectorBase = (byte)(reader.ReadByte(prefix + "base") & 0xF8);
            _lowest = (int)reader.ReadBounded(prefix + "lowest", 7);
            _initStep = (int)reader.ReadBounded(prefix + "initStep", 4);
            _needsIcw4 = reader.ReadBoolean(prefix + "needsIcw4");
            _single = reader.ReadBoolean(prefix + "single");
            _autoEoi = reader.ReadBoolean(prefix + "autoEoi");
            _rotateOnAutoEoi = reader.ReadBoolean(prefix + "rotate");
            _specialFullyNested = reader.ReadBoolean(prefix + "sfnm");
            _specialMask = reader.ReadBoolean(prefix + "smm");
            _poll = reader.ReadBoolean(prefix + "poll");
            _readIsr = reader.ReadBoolean(prefix + "readIsr");
        }

        // ICW1 (data sheet, "Initialization Command Words"): clears IMR, resets edge latches and modes, IR7 lowest.
        private void Initialize()
        {
            _irr = (byte)(_inputs & _elcr);
            _imr = 0;
            _isr = 0;
            _lowest = 7;
            _autoEoi = _rotateOnAutoEoi = _specialFullyNested = _specialMask = _poll = _readIsr = false;
        }

        private void WriteOcw2(byte value)
        {
            int level = value & 7;
            switch (value >> 5)
            {
                case 0:
                    _rotateOnAutoEoi = false;
                    break;
                case 4:
                    _rotateOnAutoEoi = true;
                    break;
                case 1:
                case 5:
                    int highest = HighestInService();
                    if (highest >= 0)
                    {
                        _isr &= (byte)~(1 << highest);
                        if (value >> 5 == 5)
                        {
                            _lowest = highest;
                        }
                    }

                    break;
                case 3:
                    _isr &= (byte)~(1 << level);
                    break;
                case 6:
                    _lowest = level;
                    break;
                case 7:
                    _isr &= (byte)~(1 << level);
                    _lowest = level;
                    break;
            }
        }

        private void WriteOcw3(byte value)
        {
            _poll = (value & 0x04) != 0;
            if ((value & 0x02) != 0)
            {
                _readIsr = (value & 0x01) != 0;
            }

            if ((value & 0x40) != 0)
            {
                _specialMask = (value & 0x20) != 0;
            }
        }

        // Non-specific EOI ends the highest in-service level; in special mask mode masked levels are not touched.
        private int HighestInService()
        {
            int service = _specialMask ? _isr & ~_imr : _isr;
            for (int i = 1; i <= 8; i++)
            {
                int irq = (_lowest + i) & 7;
                if ((service & (1 << irq)) != 0)
                {
                    return irq;
                }
            }

            return -1;
        }
    }

    private sealed class ChipPorts : IRegisterWindow
    {
        private readonly I8259Pair _owner;
        private readonly Chip _chip;

        public ChipPorts(I8259Pair owner, Chip chip)
        {
            _owner = owner;
            _chip = chip;
        }

        public uint Length => 2;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                ulong value = _chip.Read(offset);
                if (width == AccessWidth.Word)
                {
                    value |= (ulong)_chip.Read(1) << 8;
                }

                _owner.Update();
                return value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                _chip.Write(offset, (byte)value);
                if (width == AccessWidth.Word)
                {
                    _chip.Write(1, (byte)(value >> 8));
                }

                _owner.Update();
            }
        }
    }

    private sealed class ElcrWindow : IRegisterWindow
    {
        private readonly I8259Pair _owner;

        public ElcrWindow(I8259Pair owner) => _owner = owner;

        public uint Length => 2;

        public ulong Read(uint offset, AccessWidth width)
        {
            lock (_owner._gate)
            {
                ulong value = offset == 0 ? _owner._master.Elcr : _owner._slave.Elcr;
                return width == AccessWidth.Word ? value | ((ulong)_owner._slave.Elcr << 8) : value;
            }
        }

        public void Write(uint offset, AccessWidth width, ulong value)
        {
            lock (_owner._gate)
            {
                (offset == 0 ? _owner._master : _owner._slave).Elcr = (byte)value;
                if (width == AccessWidth.Word)
                {
                    _owner._slave.Elcr = (byte)(value >> 8);
                }

                _owner.Update();
            }
        }
    }
}
