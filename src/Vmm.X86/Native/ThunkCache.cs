// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using System.Threading;
using Iced.Intel;
using Vmm.Core;

namespace Vmm.X86;

// Theory. Guest and host speak the same instruction set, so an x87, MMX, SSE or AVX instruction is executed by the host
// processor itself: a thunk loads the operands from the guest's register file, runs the same opcode, and stores the
// results. What such an instruction computes is then right by construction, down to NaN payloads and sticky flags.
//
// Thunks are made per *form*, not per guest instruction: explicit register operands are renamed to fixed host registers
// (XMM1 + operand, MM0 + operand, RAX and R9 for general registers) and reached through pointers, memory operands become
// [pointer]. The key is (Code, register or memory form, immediate, ST index), which bounds the number of thunks by the
// instruction set (about 60 thousand, most of them immediates nobody uses), whatever a hostile guest does. A thunk is
// therefore never freed or moved, and decoded instructions can hold its address.
//
//     void thunk(void* p0, void* p1, void* p2, void* p3, CpuContext* cpu)     System V: RDI RSI RDX RCX R8
//
// pN points to explicit operand N: an XMM slot of the XSAVE area (the upper YMM half lies UpperHalf bytes behind it), an
// MMX slot, a general register, or the bytes of a memory operand. Guest faults cannot happen inside a thunk, because
// the handler has already turned the guest address into a host address or staged the bytes. Host faults cannot happen
// either: SIMD exceptions are masked while a thunk runs, x87 exceptions are taken by the next waiting instruction and a
// thunk has none behind the guest's, and alignment was checked.
//
// MXCSR. An instruction that reads or writes MXCSR has two entry points. Fast runs under the guest's MXCSR, all of whose
// exceptions are masked, and stores it back. Careful runs under VectorScratch.MxcsrIn, leaves MxcsrOut, and stores
// results only when MxcsrOut has none of the bits in CommitUnless; it returns those bits. The host's MXCSR (the
// architectural default, which .NET relies on) is restored before returning.
//
// x87 thunks load the guest's whole x87 state with FXRSTOR and leave the new one in VectorScratch.X87 by FXSAVE.
//
// Locking: look-ups and creation take a lock; they happen when code is decoded, never when it runs.

/// <summary>What a handler needs to know about a form; in unmanaged memory, immutable once published.</summary>
[StructLayout(LayoutKind.Sequential)]
internal unsafe struct Thunk
{
    /// <summary>Entry that commits unconditionally; under the guest's MXCSR where that matters.</summary>
    public delegate* unmanaged<void*, void*, void*, void*, CpuContext*, uint> Fast;

    /// <summary>Entry that commits conditionally, or null when MXCSR plays no part.</summary>
    public delegate* unmanaged<void*, void*, void*, void*, CpuContext*, uint> Careful;

    /// <summary>Bytes of the memory operand; 0 when there is none.</summary>
    public int MemoryBytes;

    /// <summary>Which explicit operand is memory, or -1.</summary>
    public int MemoryOperand;

    /// <summary>The memory operand is stored to.</summary>
    public bool IsStore;

    /// <summary>VectorScratch.Flags holds the new arithmetic flags.</summary>
    public bool WritesFlags;

    /// <summary>The instruction reads the arithmetic flags (FCMOVcc): VectorScratch.Flags is loaded before.</summary>
    public bool ReadsFlags;

    /// <summary>Alignment that the memory operand must have (#GP otherwise); 1 for none.</summary>
    public int Alignment;

    /// <summary>
    /// x87 with few registers: operands ST(0) at p0, ST(i) at p1, memory at p2, the pushed register at p3; answers FSW.
    /// Null when there is none.
    /// </summary>
    public delegate* unmanaged<void*, void*, void*, void*, CpuContext*, uint> LightEntry;

    /// <summary>Describes <see cref="LightEntry"/>.</summary>
    public X87Light Light;

    /// <summary>VCVTPS2PH: elements converted; otherwise 0.</summary>
    public int HalfElements;

    /// <summary>Alignment that the host may demand of the bytes handed to the thunk.</summary>
    public int HostAlignment;
}

/// <summary>Work area of thunks inside <see cref="CpuContext"/>; offsets are known to generated code.</summary>
[StructLayout(LayoutKind.Explicit, Size = 0x400)]
internal unsafe struct VectorScratch
{
    /// <summary>Offset in <see cref="CpuContext"/>.</summary>
    public const int Offset = 0xC00;

    /// <summary>MXCSR as .NET expects it: all exceptions masked, round to nearest.</summary>
    public const uint HostMxcsrValue = 0x1F80;

    /// <summary>Memory operands are staged here when no host pointer serves.</summary>
    [FieldOffset(0x00)]
    public fixed byte Memory[128];

    /// <summary>MXCSR that a careful entry runs under.</summary>
    [FieldOffset(0x80)]
    public uint MxcsrIn;

    /// <summary>MXCSR behind the instruction.</summary>
    [FieldOffset(0x84)]
    public uint MxcsrOut;

    /// <summary>A careful entry stores nothing when MxcsrOut has one of these bits.</summary>
    [FieldOffset(0x88)]
    public uint CommitUnless;

    /// <summary>Always <see cref="HostMxcsrValue"/>.</summary>
    [FieldOffset(0x8C)]
    public uint HostMxcsr;

    /// <summary>Always FNINIT's control word, which the host's x87 keeps outside thunks.</summary>
    [FieldOffset(0x98)]
    public ushort HostFcw;

    /// <summary>RFLAGS in and out.</summary>
    [FieldOffset(0x90)]
    public ulong Flags;

    /// <summary>FXSAVE image that x87 thunks leave.</summary>
    [FieldOffset(0x100)]
    public fixed byte X87[512];

    /// <summary>The context's work area.</summary>
    // SAFETY: the context reserves Size bytes at Offset for nothing else; who uses the area does not outlive the
    // context.
    public static VectorScratch* Of(CpuContext* cpu) => (VectorScratch*)((byte*)cpu + Offset);
}

/// <summary>Makes and keeps thunks. Shared by the vCPUs of a process.</summary>
internal sealed unsafe class ThunkCache : IDisposable
{
    /// <summary>Upper halves of YMM registers lie this far behind the lower ones in the XSAVE area.</summary>
    public const int UpperHalf = XsaveLayout.YmmHigh - XsaveLayout.Xmm;

    private const int EntriesPerChunk = 256;
    private readonly Lock _gate = new();
    private readonly ICodeMemory _code;
    private readonly Dictionary<ulong, nint> _thunks = [];
    private readonly List<nint> _chunks = [];
    private readonly InstructionInfoFactory _info = new();
    private readonly CodeBuffer _buffer = new();
    private readonly List<(nint Write, int LengthBytes)> _freeArenas = [];
    private int _arenaEnd = SoftHypervisor.ThunkBytes;
    private int _used;
    private int _entriesLeft;
    private Thunk* _nextEntry;

    /// <summary>Makes an empty cache.</summary>
    /// <param name="code">Where thunks are written; the caller keeps ownership.</param>
    public ThunkCache(ICodeMemory code) => _code = code;

    /// <summary>Thunks made so far.</summary>
    public int Count => _thunks.Count;

    /// <summary>Bytes of code memory used.</summary>
    public int UsedBytes => _used;

    /// <summary>
    /// Writes a routine of its own into code memory.
    /// </summary>
    /// <returns>Its address, or 0 when code memory is exhausted.</returns>
    public nint AddRoutine(ReadOnlySpan<byte> bytes)
    {
        lock (_gate)
        {
            int length = (bytes.Length + 15) & ~15;
            if (length > ThunkLimit - _used)
            {
                return 0;
            }

            // SAFETY: the length was checked against what is left of the code memory, under the gate.
            bytes.CopyTo(new Span<byte>((byte*)_code.WriteAddress + _used, bytes.Length));
            nint entry = _code.ExecuteAddress + _used;
            _used += length;
            return entry;
        }
    }

    /// <summary>
    /// A piece of code memory for one vCPU's translated blocks, or false when not so much is left. Thunks keep the front.
    /// </summary>
    public bool TryTakeArena(int lengthBytes, out byte* write, out long executeDelta)
    {
        lock (_gate)
        {
            write = null;
            executeDelta = _code.ExecuteAddress - _code.WriteAddress;
            int start = _freeArenas.FindIndex(free => free.LengthBytes == lengthBytes);
            if (start >= 0)
            {
                write = (byte*)_freeArenas[start].Write;
                _freeArenas.RemoveAt(start);
                return true;
            }

            if (lengthBytes > _code.LengthBytes - _arenaEnd)
            {
                return false;
            }

            write = (byte*)_code.WriteAddress + _arenaEnd;
            _arenaEnd += lengthBytes;
            return true;
        }
    }

    /// <summary>Gives an arena back. Arenas of one length follow each other: those of a machine have the same.</summary>
    public void ReturnArena(byte* write, int lengthBytes)
    {
        lock (_gate)
        {
            _freeArenas.Add(((nint)write, lengthBytes));
            if (_freeArenas.Sum(free => (long)free.LengthBytes) == _arenaEnd - SoftHypervisor.ThunkBytes)
            {
                // The next machine may have another length.
                _freeArenas.Clear();
                _arenaEnd = SoftHypervisor.ThunkBytes;
            }
        }
    }

    private int ThunkLimit => Math.Min(_code.LengthBytes, SoftHypervisor.ThunkBytes);

    /// <summary>Finds or makes the thunk for a decoded instruction.</summary>
    /// <returns>Null when code memory is exhausted or the form cannot be encoded.</returns>
    public Thunk* Get(in Instruction instruction)
    {
        ulong key = Key(instruction);
        lock (_gate)
        {
            if (_thunks.TryGetValue(key, out nint found))
            {
                // SAFETY: only addresses from NewEntry are put into the table; they live until Dispose.
                return (Thunk*)found;
            }

            Thunk* made = Make(instruction);
            if (made != null)
            {
                _thunks.Add(key, (nint)made);
            }

            return made;
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (nint chunk in _chunks)
        {
            // SAFETY: each chunk came from AllocZeroed, is freed once, and no vCPU runs any more (the hypervisor is
            // disposed last).
            NativeMemory.Free((void*)chunk);
        }

        _chunks.Clear();
        _thunks.Clear();
    }

    private static ulong Key(in Instruction instruction)
    {
        ulong key = (ulong)instruction.Code;
        int shift = 16;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            switch (instruction.GetOpKind(i))
            {
                case OpKind.Memory:
                    key |= 1UL << shift++;
                    break;
                case OpKind.Immediate8:
                    key |= (ulong)instruction.Immediate8 << 32;
                    break;
                case OpKind.Immediate8_2nd:
                    key |= (ulong)instruction.Immediate8_2nd << 40;
                    break;
                case OpKind.Register when IsStack(instruction.GetOpRegister(i)):
                    key |= (ulong)(instruction.GetOpRegister(i) - Register.ST0) << (48 + (4 * i));
                    shift++;
                    break;
                default:
                    shift++;
                    break;
            }
        }

        return key;
    }

    private static bool IsStack(Register register) => register is >= Register.ST0 and <= Register.ST7;

    private Thunk* Make(in Instruction original)
    {
        var form = new Form(original, _info);
        _buffer.Clear();
        int careful = -1;
        int lightAt = -1;
        X87Light light = default;
        if (form.IsX87)
        {
            form.EmitX87(_buffer);
            light = X87Light.Of(original);
            if (light.Result != X87Result.NotLight)
            {
                _buffer.Align();
                lightAt = _buffer.Length;
                form.EmitLight(_buffer, light, original);
            }
        }
        else
        {
            form.EmitSimd(_buffer, isCareful: false);
            if (form.UsesMxcsr)
            {
                _buffer.Align();
                careful = _buffer.Length;
                form.EmitSimd(_buffer, isCareful: true);
            }
        }

        _buffer.Align();
        if (_buffer.HasFailed || _buffer.Length > ThunkLimit - _used)
        {
            return null;
        }

        // SAFETY: the length was checked against what is left of the code memory; both views show the same bytes.
        _buffer.Bytes.CopyTo(new Span<byte>((byte*)_code.WriteAddress + _used, _buffer.Length));
        byte* entry = (byte*)_code.ExecuteAddress + _used;
        _used += _buffer.Length;
        Thunk* thunk = NewEntry();
        thunk->Fast = (delegate* unmanaged<void*, void*, void*, void*, CpuContext*, uint>)entry;
        thunk->Careful = careful < 0
            ? null
            : (delegate* unmanaged<void*, void*, void*, void*, CpuContext*, uint>)(entry + careful);
        thunk->LightEntry = lightAt < 0
            ? null
            : (delegate* unmanaged<void*, void*, void*, void*, CpuContext*, uint>)(entry + lightAt);
        thunk->Light = light;
        thunk->MemoryBytes = form.MemoryBytes;
        thunk->MemoryOperand = form.MemoryOperand;
        thunk->IsStore = form.IsStore;
        thunk->WritesFlags = form.WritesFlags;
        thunk->ReadsFlags = form.ReadsFlags;
        thunk->Alignment = form.Alignment;
        thunk->HalfElements = original.Code switch
        {
            Code.VEX_Vcvtps2ph_xmmm64_xmm_imm8 => 4,
            Code.VEX_Vcvtps2ph_xmmm128_ymm_imm8 => 8,
            _ => 0,
        };
        thunk->HostAlignment = form.HostAlignment;
        return thunk;
    }

    private Thunk* NewEntry()
    {
        if (_entriesLeft == 0)
        {
            // SAFETY: EntriesPerChunk entries are handed out from the chunk, counted by _entriesLeft; _chunks owns
            // it.
            _nextEntry = (Thunk*)NativeMemory.AllocZeroed(EntriesPerChunk, (nuint)sizeof(Thunk));
            _chunks.Add((nint)_nextEntry);
            _entriesLeft = EntriesPerChunk;
        }

        _entriesLeft--;
        return _nextEntry++;
    }

    /// <summary>Bytes under construction; every instruction is encoded by Iced.</summary>
    private sealed class CodeBuffer : CodeWriter
    {
        private readonly byte[] _bytes = new byte[2048];
        private readonly Encoder _encoder;

        public CodeBuffer() => _encoder = Encoder.Create(64, this);

        public int Length { get; private set; }

        public bool HasFailed { get; private set; }

        public ReadOnlySpan<byte> Bytes => _bytes.AsSpan(0, Length);

        public override void WriteByte(byte value) => _bytes[Length++] = value;

        public void Clear()
        {
            Length = 0;
            HasFailed = false;
        }

        public void Align()
        {
            while ((Length & 15) != 0)
            {
                WriteByte(0xCC);
            }
        }

        public void Emit(in Instruction instruction) =>
            HasFailed |= !_encoder.TryEncode(instruction, (ulong)Length, out _, out _);

        /// <summary>JNE over code that is not written yet.</summary>
        public int JumpIfNotZero()
        {
            WriteByte(0x75);
            WriteByte(0);
            return Length;
        }

        /// <summary>JE, likewise.</summary>
        public int JumpIfZero()
        {
            WriteByte(0x74);
            WriteByte(0);
            return Length;
        }

        public void Land(int jump)
        {
            HasFailed |= Length - jump > 127;
            _bytes[jump - 1] = (byte)(Length - jump);
        }
    }

    /// <summary>The host form of one guest instruction.</summary>
    private sealed class Form
    {
        private static readonly Register[] s_pointers = [Register.RDI, Register.RSI, Register.RDX, Register.RCX];
        private static readonly Register[] s_general = [Register.RAX, Register.R9];

        private readonly Instruction _host;
        private readonly Register[] _registers = new Register[4];
        private readonly bool[] _isRead = new bool[4];
        private readonly bool[] _isWritten = new bool[4];
        private readonly bool _isVex;
        private readonly bool _usesMmx;
        private readonly bool _readsXmm0;
        private readonly bool _writesXmm0;
        private readonly bool _isExplicitString;
        private readonly bool _writesRcx;

        public Form(in Instruction original, InstructionInfoFactory infos)
        {
            OpCodeInfo opcode = original.OpCode;
            Instruction host = original;
            host.SegmentPrefix = Register.None;
            host.HasLockPrefix = false;
            host.HasRepPrefix = false;
            host.HasRepnePrefix = false;
            _isVex = opcode.Encoding == EncodingKind.VEX;
            MemoryOperand = -1;
            Alignment = 1;
            HostAlignment = 1;
            int generals = 0;
            for (int i = 0; i < original.OpCount; i++)
            {
                OpKind kind = original.GetOpKind(i);
                if (kind == OpKind.Memory)
                {
                    host.MemoryBase = s_pointers[i];
                    host.MemoryIndex = Register.None;
                    host.MemoryIndexScale = 1;
                    host.MemoryDisplacement64 = 0;
                    host.MemoryDisplSize = 0;
                    MemoryOperand = i;
                    MemoryBytes = original.MemorySize.GetSize();
                    Alignment = AlignmentOf(original, MemoryBytes, _isVex);
                    HostAlignment = !_isVex && MemoryBytes == 16 ? 16 : 1;
                    continue;
                }

                if (kind != OpKind.Register)
                {
                    continue;
                }

                Register register = original.GetOpRegister(i);
                if (IsStack(register))
                {
                    continue;
                }

                Register renamed = register switch
                {
                    _ when register.IsXMM() => Register.XMM1 + i,
                    _ when register.IsYMM() => Register.YMM1 + i,
                    _ when register.IsMM() => Register.MM0 + i,
                    _ when register.IsGPR64() => s_general[generals++],
                    _ => s_general[generals++].GetFullRegister32(),
                };
                host.SetOpRegister(i, renamed);
                _registers[i] = renamed;
                _usesMmx |= renamed.IsMM();
            }

            // Asked of the renamed instruction: for "xor x, x" Iced would say that x is not read.
            InstructionInfo info = infos.GetInfo(host);
            for (int i = 0; i < original.OpCount; i++)
            {
                OpAccess access = info.GetOpAccess(i);
                bool writes = access is OpAccess.Write or OpAccess.CondWrite or OpAccess.ReadWrite
                    or OpAccess.ReadCondWrite;
                if (i == MemoryOperand)
                {
                    IsStore = writes;
                }
                else if (_registers.Length > i && _registers[i] != Register.None)
                {
                    _isRead[i] = access is OpAccess.Read or OpAccess.CondRead or OpAccess.ReadWrite
                        or OpAccess.ReadCondWrite || (!_isVex && _registers[i].IsXMM());
                    _isWritten[i] = writes;
                }
            }

            Mnemonic mnemonic = original.Mnemonic;
            _readsXmm0 = !_isVex && mnemonic is Mnemonic.Blendvpd or Mnemonic.Blendvps or Mnemonic.Pblendvb
                or Mnemonic.Sha256rnds2;
            _writesXmm0 = mnemonic is Mnemonic.Pcmpistrm or Mnemonic.Pcmpestrm or Mnemonic.Pcmpestrm64
                or Mnemonic.Vpcmpistrm or Mnemonic.Vpcmpestrm or Mnemonic.Vpcmpestrm64;
            _writesRcx = mnemonic is Mnemonic.Pcmpistri or Mnemonic.Pcmpestri or Mnemonic.Pcmpestri64
                or Mnemonic.Vpcmpistri or Mnemonic.Vpcmpestri or Mnemonic.Vpcmpestri64;
            _isExplicitString = mnemonic is Mnemonic.Pcmpestri or Mnemonic.Pcmpestrm or Mnemonic.Pcmpestri64
                or Mnemonic.Pcmpestrm64 or Mnemonic.Vpcmpestri or Mnemonic.Vpcmpestrm or Mnemonic.Vpcmpestri64
                or Mnemonic.Vpcmpestrm64;
            IsX87 = SimdTraits.IsX87(original);
            WritesFlags = original.RflagsModified != RflagsBits.None && HasArithmeticFlags(original.RflagsModified);
            ReadsFlags = HasArithmeticFlags(original.RflagsRead);
            UsesMxcsr = !IsX87 && SimdTraits.UsesMxcsr(mnemonic);
            _host = host;
        }

        public bool IsX87 { get; }

        public bool UsesMxcsr { get; }

        public bool WritesFlags { get; }

        public bool ReadsFlags { get; }

        public bool IsStore { get; }

        public int MemoryBytes { get; }

        public int MemoryOperand { get; }

        public int Alignment { get; }

        public int HostAlignment { get; }

        public void EmitSimd(CodeBuffer to, bool isCareful)
        {
            for (int i = 0; i < 4; i++)
            {
                if (_registers[i] != Register.None && _isRead[i])
                {
                    EmitLoad(to, i);
                }
            }

            if (_readsXmm0)
            {
                to.Emit(Instruction.Create(
                    Code.Movups_xmm_xmmm128, Register.XMM0, InContext(XsaveLayout.Xmm + CpuContext.XsaveOffset)));
            }

            if (UsesMxcsr)
            {
                int from = isCareful ? VectorScratch.Offset + 0x80 : CpuContext.XsaveOffset + XsaveLayout.Mxcsr;
                to.Emit(Instruction.Create(Code.Ldmxcsr_m32, InContext(from)));
            }

            if (_isExplicitString)
            {
                to.Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RAX, InContext(0)));
                to.Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RDX, InContext(16)));
            }

            to.Emit(_host);
            if (WritesFlags)
            {
                to.Emit(Instruction.Create(Code.Pushfq));
                to.Emit(Instruction.Create(Code.Pop_r64, Register.R10));
            }

            int jump = 0;
            if (UsesMxcsr)
            {
                int into = isCareful ? VectorScratch.Offset + 0x84 : CpuContext.XsaveOffset + XsaveLayout.Mxcsr;
                to.Emit(Instruction.Create(Code.Stmxcsr_m32, InContext(into)));
                to.Emit(Instruction.Create(Code.Ldmxcsr_m32, InContext(VectorScratch.Offset + 0x8C)));
                if (isCareful)
                {
                    to.Emit(Instruction.Create(Code.Mov_r32_rm32, Register.R11D, InContext(into)));
                    to.Emit(Instruction.Create(
                        Code.And_r32_rm32, Register.R11D, InContext(VectorScratch.Offset + 0x88)));
                    jump = to.JumpIfNotZero();
                }
            }

            for (int i = 0; i < 4; i++)
            {
                if (_registers[i] != Register.None && _isWritten[i])
                {
                    EmitStore(to, i);
                }
            }

            if (_writesXmm0)
            {
                EmitStoreXmm0(to);
            }

            if (_writesRcx)
            {
                to.Emit(Instruction.Create(Code.Mov_rm64_r64, InContext(8), Register.RCX));
            }

            if (WritesFlags)
            {
                to.Emit(Instruction.Create(Code.Mov_rm64_r64, InContext(VectorScratch.Offset + 0x90), Register.R10));
            }

            if (isCareful)
            {
                to.Land(jump);
            }

            if (_usesMmx)
            {
                to.Emit(Instruction.Create(Code.Emms));
            }

            if (_isVex)
            {
                to.Emit(Instruction.Create(Code.VEX_Vzeroupper));
            }

            if (isCareful)
            {
                to.Emit(Instruction.Create(Code.Mov_r32_rm32, Register.EAX, Register.R11D));
            }

            to.Emit(Instruction.Create(Code.Retnq));
        }

        public void EmitX87(CodeBuffer to)
        {
            if (ReadsFlags || WritesFlags)
            {
                to.Emit(Instruction.Create(Code.Push_rm64, InContext(VectorScratch.Offset + 0x90)));
            }

            to.Emit(Instruction.Create(Code.Fxrstor64_m512byte, InContext(CpuContext.XsaveOffset)));
            if (ReadsFlags || WritesFlags)
            {
                to.Emit(Instruction.Create(Code.Popfq));
            }

            to.Emit(_host);
            if (WritesFlags)
            {
                to.Emit(Instruction.Create(Code.Pushfq));
                to.Emit(Instruction.Create(Code.Pop_r64, Register.R10));
                to.Emit(Instruction.Create(Code.Mov_rm64_r64, InContext(VectorScratch.Offset + 0x90), Register.R10));
            }

            to.Emit(Instruction.Create(Code.Fxsave64_m512byte, InContext(VectorScratch.Offset + 0x100)));
            to.Emit(Instruction.Create(Code.Fninit));
            to.Emit(Instruction.Create(Code.Ldmxcsr_m32, InContext(VectorScratch.Offset + 0x8C)));
            to.Emit(Instruction.Create(Code.Retnq));
        }

        public void EmitLight(CodeBuffer to, in X87Light light, in Instruction original)
        {
            MemoryOperand fcw = InContext(CpuContext.XsaveOffset + XsaveLayout.Fcw);
            to.Emit(Instruction.Create(Code.Cmp_rm16_imm16, fcw, (uint)XsaveLayout.FcwInit));
            int skipLoad = to.JumpIfZero();
            to.Emit(Instruction.Create(Code.Fldcw_m2byte, fcw));
            to.Land(skipLoad);
            int depth = 0;
            if (light.UsesOther)
            {
                to.Emit(Instruction.Create(Code.Fld_m80fp, new MemoryOperand(Register.RSI)));
                depth++;
            }

            if (light.UsesTop)
            {
                to.Emit(Instruction.Create(Code.Fld_m80fp, new MemoryOperand(Register.RDI)));
                depth++;
            }

            Instruction host = _host;
            for (int i = 0; i < host.OpCount; i++)
            {
                if (host.GetOpKind(i) == OpKind.Memory)
                {
                    host.MemoryBase = Register.RDX;
                }
                else if (host.GetOpKind(i) == OpKind.Register && host.GetOpRegister(i) != Register.ST0)
                {
                    host.SetOpRegister(i, Register.ST1);
                }
            }

            to.Emit(host);
            depth += (light.Result == X87Result.Pushed ? 1 : 0) - light.Pops;
            if (WritesFlags)
            {
                to.Emit(Instruction.Create(Code.Pushfq));
                to.Emit(Instruction.Create(Code.Pop_rm64, InContext(VectorScratch.Offset + 0x90)));
            }

            to.Emit(Instruction.Create(Code.Fnstsw_AX, Register.AX));
            if (light.Result == X87Result.Other && light.Pops == 0)
            {
                to.Emit(Instruction.Create(Code.Fstp_sti, Register.ST0));
                depth--;
            }

            if (light.Result is X87Result.Top or X87Result.Other or X87Result.Pushed)
            {
                Register into = light.Result switch
                {
                    X87Result.Top => Register.RDI,
                    X87Result.Other => Register.RSI,
                    _ => Register.RCX,
                };
                to.Emit(Instruction.Create(Code.Fstp_m80fp, new MemoryOperand(into)));
                depth--;
            }

            for (; depth > 0; depth--)
            {
                to.Emit(Instruction.Create(Code.Fstp_sti, Register.ST0));
            }

            // The host's flags are sticky: they must be clear when the next thunk starts.
            to.Emit(Instruction.Create(Code.Test_rm8_imm8, Register.AL, 0x7F));
            int skipClear = to.JumpIfZero();
            to.Emit(Instruction.Create(Code.Fnclex));
            to.Land(skipClear);
            to.Emit(Instruction.Create(Code.Cmp_rm16_imm16, fcw, (uint)XsaveLayout.FcwInit));
            int skipRestore = to.JumpIfZero();
            to.Emit(Instruction.Create(Code.Fldcw_m2byte, InContext(VectorScratch.Offset + 0x98)));
            to.Land(skipRestore);
            to.Emit(Instruction.Create(Code.Movzx_r32_rm16, Register.EAX, Register.AX));
            to.Emit(Instruction.Create(Code.Retnq));
        }

        // Legacy SSE demands alignment of 16-byte operands unless the instruction is one of those made for unaligned
        // data (SDM 1 10.4.1, 3A 6.15 #GP); VEX only of the aligned and non-temporal moves (SDM 1 14.9).
        private static int AlignmentOf(in Instruction instruction, int bytes, bool isVex)
        {
            switch (instruction.Mnemonic)
            {
                case Mnemonic.Vmovaps or Mnemonic.Vmovapd or Mnemonic.Vmovdqa or Mnemonic.Vmovntps
                    or Mnemonic.Vmovntpd or Mnemonic.Vmovntdq or Mnemonic.Vmovntdqa:
                    return bytes;
                case Mnemonic.Movups or Mnemonic.Movupd or Mnemonic.Movdqu or Mnemonic.Lddqu
                    or Mnemonic.Pcmpestri or Mnemonic.Pcmpestrm or Mnemonic.Pcmpistri or Mnemonic.Pcmpistrm
                    or Mnemonic.Pcmpestri64 or Mnemonic.Pcmpestrm64:
                    return 1;

                // The manuals list them with the aligned ones, but AMD's processors do not check.
                case Mnemonic.Sha1rnds4 or Mnemonic.Sha1nexte or Mnemonic.Sha1msg1 or Mnemonic.Sha1msg2
                    or Mnemonic.Sha256rnds2 or Mnemonic.Sha256msg1 or Mnemonic.Sha256msg2:
                    return 1;
                default:
                    return !isVex && bytes == 16 ? 16 : 1;
            }
        }

        private static bool HasArithmeticFlags(RflagsBits bits) => (bits &
            (RflagsBits.CF | RflagsBits.PF | RflagsBits.AF | RflagsBits.ZF | RflagsBits.SF | RflagsBits.OF)) != 0;

        private static MemoryOperand At(int operand, int displacement) => new(s_pointers[operand], displacement);

        private static MemoryOperand InContext(int offset) => new(Register.R8, offset);

        private void EmitLoad(CodeBuffer to, int i)
        {
            Register register = _registers[i];
            if (register.IsXMM())
            {
                Code move = _isVex ? Code.VEX_Vmovups_xmm_xmmm128 : Code.Movups_xmm_xmmm128;
                to.Emit(Instruction.Create(move, register, At(i, 0)));
            }
            else if (register.IsYMM())
            {
                Register low = Register.XMM0 + (register - Register.YMM0);
                to.Emit(Instruction.Create(Code.VEX_Vmovups_xmm_xmmm128, low, At(i, 0)));
                to.Emit(Instruction.Create(
                    Code.VEX_Vinsertf128_ymm_ymm_xmmm128_imm8, register, register, At(i, UpperHalf), 1));
            }
            else if (register.IsMM())
            {
                to.Emit(Instruction.Create(Code.Movq_mm_mmm64, register, At(i, 0)));
            }
            else if (register.IsGPR64())
            {
                to.Emit(Instruction.Create(Code.Mov_r64_rm64, register, At(i, 0)));
            }
            else
            {
                to.Emit(Instruction.Create(Code.Mov_r32_rm32, register, At(i, 0)));
            }
        }

        private void EmitStore(CodeBuffer to, int i)
        {
            Register register = _registers[i];
            if (register.IsXMM() || register.IsYMM())
            {
                EmitStoreVector(to, At(i, 0), At(i, UpperHalf), register);
            }
            else if (register.IsMM())
            {
                to.Emit(Instruction.Create(Code.Movq_mmm64_mm, At(i, 0), register));
                to.Emit(Instruction.Create(Code.Mov_rm16_imm16, At(i, 8), 0xFFFF));
            }
            else
            {
                // 32-bit results clear the upper half of the general register.
                to.Emit(Instruction.Create(Code.Mov_rm64_r64, At(i, 0), register.GetFullRegister()));
            }
        }

        private void EmitStoreXmm0(CodeBuffer to) => EmitStoreVector(
            to, InContext(CpuContext.XsaveOffset + XsaveLayout.Xmm),
            InContext(CpuContext.XsaveOffset + XsaveLayout.YmmHigh), Register.XMM0);

        private void EmitStoreVector(CodeBuffer to, MemoryOperand low, MemoryOperand high, Register register)
        {
            int number = register.IsYMM() ? register - Register.YMM0 : register - Register.XMM0;
            Register xmm = Register.XMM0 + number;
            Register ymm = Register.YMM0 + number;
            to.Emit(Instruction.Create(
                _isVex ? Code.VEX_Vmovups_xmmm128_xmm : Code.Movups_xmmm128_xmm, low, xmm));
            if (_isVex)
            {
                to.Emit(Instruction.Create(Code.VEX_Vextractf128_xmmm128_ymm_imm8, high, ymm, 1));
            }
        }
    }
}
