// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;

namespace Vmm.Host.Sandbox;

/// <summary>An instruction of classic BPF (struct sock_filter, linux/filter.h).</summary>
/// <param name="Code">Class, size and mode.</param>
/// <param name="JumpTrue">Instructions to skip when a comparison holds.</param>
/// <param name="JumpFalse">Instructions to skip when it does not.</param>
/// <param name="Constant">k.</param>
[StructLayout(LayoutKind.Sequential, Pack = 4)]
internal readonly record struct BpfInstruction(ushort Code, byte JumpTrue, byte JumpFalse, uint Constant);

/// <summary>
/// Assembles the few instructions of classic BPF that a filter of system calls needs. Jumps go forward to labels; a
/// comparison's own jump reaches only 255 instructions, so each is followed by an unconditional one. Not thread-safe.
/// </summary>
internal sealed class BpfProgram
{
    // linux/bpf_common.h: class LD, JMP, ALU, RET; size W; mode ABS; sources K.
    private const ushort LoadWordAbsolute = 0x20;
    private const ushort Jump = 0x05;
    private const ushort JumpEqual = 0x15;
    private const ushort JumpGreaterOrEqual = 0x35;
    private const ushort And = 0x54;
    private const ushort Return = 0x06;
    private const int MaxInstructions = 4096;

    private readonly List<BpfInstruction> _code = [];
    private readonly List<(int At, Label Target)> _fixups = [];

    /// <summary>A place that jumps go to.</summary>
    internal sealed class Label
    {
        internal int At { get; set; } = -1;
    }

    /// <summary>Loads the word at an offset of the data into the accumulator.</summary>
    internal void Load(uint offset) => _code.Add(new BpfInstruction(LoadWordAbsolute, 0, 0, offset));

    /// <summary>Keeps only some bits of the accumulator.</summary>
    internal void Mask(uint bits) => _code.Add(new BpfInstruction(And, 0, 0, bits));

    /// <summary>Ends with a verdict.</summary>
    internal void Finish(uint verdict) => _code.Add(new BpfInstruction(Return, 0, 0, verdict));

    /// <summary>Goes to a label when the accumulator is not the constant.</summary>
    internal void UnlessEqual(uint constant, Label target) => Branch(new BpfInstruction(JumpEqual, 1, 0, constant), target);

    /// <summary>Goes to a label when the accumulator is the constant.</summary>
    internal void IfEqual(uint constant, Label target) => Branch(new BpfInstruction(JumpEqual, 0, 1, constant), target);

    /// <summary>Goes to a label when the accumulator is at least the constant.</summary>
    internal void IfAtLeast(uint constant, Label target) => Branch(new BpfInstruction(JumpGreaterOrEqual, 0, 1, constant), target);

    /// <summary>Says that a label stands here. Once for each.</summary>
    internal void Place(Label label) => label.At = _code.Count;

    /// <summary>The program.</summary>
    /// <exception cref="InvalidOperationException">It is longer than the kernel takes, or a label was never placed or lies behind.</exception>
    internal BpfInstruction[] Assemble()
    {
        foreach ((int at, Label target) in _fixups)
        {
            int distance = target.At - at - 1;
            if (target.At < 0 || distance < 0)
            {
                throw new InvalidOperationException("a jump of the filter goes nowhere");
            }

            _code[at] = _code[at] with { Constant = (uint)distance };
        }

        return _code.Count is > 0 and <= MaxInstructions
            ? _code.ToArray()
            : throw new InvalidOperationException("the filter is too long");
    }

    // The comparison either steps over the jump or falls into it.
    private void Branch(BpfInstruction comparison, Label target)
    {
        _code.Add(comparison);
        _fixups.Add((_code.Count, target));
        _code.Add(new BpfInstruction(Jump, 0, 0, 0));
    }
}
