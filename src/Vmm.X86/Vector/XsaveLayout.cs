// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

/// <summary>Offsets in a standard-format XSAVE area (SDM 1 13.4).</summary>
internal static class XsaveLayout
{
    public const int Fcw = 0;
    public const int Fsw = 2;
    public const int Ftw = 4;
    public const int Fop = 6;
    public const int Fip = 8;
    public const int Fdp = 16;
    public const int Mxcsr = 24;
    public const int MxcsrMask = 28;
    public const int St = 32;
    public const int Xmm = 160;

    /// <summary>Behind XMM15: 416 to 463 reserved, 464 to 511 free for software.</summary>
    public const int LegacyEnd = 416;

    public const int Header = 512;
    public const int XstateBv = 512;
    public const int XcompBv = 520;
    public const int HeaderEnd = 576;
    public const int YmmHigh = 576;

    public const ulong X87Bit = 1;
    public const ulong SseBit = 2;
    public const ulong AvxBit = 4;
    public const ulong PkruBit = 1UL << 9;

    public const ushort FcwInit = 0x37F;
    public const uint MxcsrInit = 0x1F80;
}
