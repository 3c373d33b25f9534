// SPDX-License-Identifier: BSD-2-Clause
using Vmm.Core;

namespace Vmm.Devices.Net;

/// <summary>
/// The 93C46 behind an Ethernet card: 64 words of 16 bits on three wires (Microwire; Microchip 93C46B data sheet, 3.0). A
/// start bit, two bits of operation and six of address go in; after a READ the dummy bit 0 and the words come out, one
/// after the other for as long as the clock runs. Writes are never enabled: what the card is stays as it was made.
/// Under the lock of its card.
/// </summary>
internal sealed class Eeprom93C46
{
    /// <summary>How many words it has.</summary>
    public const int Words = 64;

    private const int CommandBits = 9;
    private const uint Read = 0b110;

    private readonly ushort[] _words = new ushort[Words];

    // Rising edges since the start bit; beyond CommandBits they count the bits that have come out.
    private int _count;
    private uint _command;

    /// <summary>The level of the data-out wire; high is also "ready".</summary>
    public bool DataOut { get; private set; } = true;

    /// <summary>A word, for the card itself.</summary>
    public ushort this[int word]
    {
        get => _words[word & (Words - 1)];
        set => _words[word & (Words - 1)] = value;
    }

    /// <summary>Chip select went low, or never was high: a command under way is forgotten.</summary>
    public void Deselect()
    {
        _count = 0;
        _command = 0;
        DataOut = true;
    }

    /// <summary>A rising edge of the clock while selected.</summary>
    /// <param name="dataIn">The level of the data-in wire.</param>
    public void Clock(bool dataIn)
    {
        if (_count == 0 && !dataIn)
        {
            return; // still no start bit
        }

        if (_count < CommandBits)
        {
            _command = (_command << 1) | (dataIn ? 1u : 0);
            _count++;
            DataOut = _count < CommandBits;
            return;
        }

        if (_command >> 6 != Read)
        {
            return;
        }

        int at = _count - CommandBits;
        _count = at >= (Words * 16) - 1 ? CommandBits : _count + 1;
        DataOut = ((this[(int)_command + (at / 16)] >> (15 - (at % 16))) & 1) != 0;
    }

    /// <summary>Writes the state of the wires; the words belong to the definition of the machine.</summary>
    public void Save(StateWriter writer, string card)
    {
        writer.Write(card + ".eeprom-count", (ulong)_count);
        writer.Write(card + ".eeprom-command", _command);
        writer.Write(card + ".eeprom-out", DataOut);
    }

    /// <summary>Reads what <see cref="Save"/> wrote.</summary>
    public void Load(StateReader reader, string card)
    {
        _count = (int)reader.ReadBounded(card + ".eeprom-count", CommandBits + (Words * 16) - 1);
        _command = reader.ReadUInt32(card + ".eeprom-command");
        DataOut = reader.ReadBoolean(card + ".eeprom-out");
    }
}
