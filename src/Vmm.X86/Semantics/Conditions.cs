// SPDX-License-Identifier: BSD-2-Clause
namespace Vmm.X86;

internal readonly unsafe struct CondO : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Overflow(cpu);
}

internal readonly unsafe struct CondNo : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Overflow(cpu);
}

internal readonly unsafe struct CondB : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Carry(cpu);
}

internal readonly unsafe struct CondAe : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Carry(cpu);
}

internal readonly unsafe struct CondE : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Zero(cpu);
}

internal readonly unsafe struct CondNe : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Zero(cpu);
}

internal readonly unsafe struct CondBe : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Carry(cpu) || Flags.Zero(cpu);
}

internal readonly unsafe struct CondA : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Carry(cpu) && !Flags.Zero(cpu);
}

internal readonly unsafe struct CondS : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Sign(cpu);
}

internal readonly unsafe struct CondNs : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Sign(cpu);
}

internal readonly unsafe struct CondP : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Parity(cpu);
}

internal readonly unsafe struct CondNp : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Parity(cpu);
}

internal readonly unsafe struct CondL : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Less(cpu);
}

internal readonly unsafe struct CondGe : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Less(cpu);
}

internal readonly unsafe struct CondLe : ICondition
{
    public static bool Test(CpuContext* cpu) => Flags.Zero(cpu) || Flags.Less(cpu);
}

internal readonly unsafe struct CondG : ICondition
{
    public static bool Test(CpuContext* cpu) => !Flags.Zero(cpu) && !Flags.Less(cpu);
}
