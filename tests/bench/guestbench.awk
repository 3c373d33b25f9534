# SPDX-License-Identifier: BSD-2-Clause
# Joins the three outputs of tests/bench/guestbench: files in the order native, tcg, soft.
function class(n) {
    if (n ~ /^(int_dep|int_alu|sieve8k|crc32_1k|sha256blk|lz4k|qsort1024|fib20|interp1000|vcall|div64|mul128|flags|ptrchase32k|loadsum16k|bytecopy1k|lockadd|cmpxchg)$/) return "integer"
    if (n ~ /^(fp_scalar|fp_divsqrt|sse_pd|sse_ps_axpy1k|sse_int|avx2_fma|x87|cvt|libm3|matmul48)$/) return "fp"
    if (n ~ /^(tlbwalk64m|memcpy4k|memcpy1m|repmovsb4k|repstosq4k|strlen256)$/) return "memory"
    if (n ~ /^(cpuid|rdtsc)$/) return "other"
    return "system"
}
FNR == 1 { file++ }
$1 == "BOOT" { boot[file] = $2 / 1e6 }
$1 == "BENCH" {
    split($3, t, "="); split($5, c, "=")
    time[file, $2] = t[2]; check[file, $2] = c[2]
    if (!($2 in seen)) { seen[$2] = 1; name[++n] = $2 }
}
END {
    printf "%-16s %12s %12s %12s %10s\n", "test", "native ns", "tcg ns", "soft ns", "tcg/soft"
    for (i = 1; i <= n; i++) {
        k = name[i]
        if (!((3, k) in time) || !((2, k) in time)) { printf "MISMATCH %s did not run\n", k; continue }
        r = time[2, k] / time[3, k]
        printf "%-16s %12.2f %12.2f %12.2f %10.3f\n", k, time[1, k], time[2, k], time[3, k], r
        if (check[1, k] != check[3, k]) printf "MISMATCH %s: host %s, soft %s\n", k, check[1, k], check[3, k]
        cl = class(k)
        sum[cl] += log(r); count[cl]++
        if (!(cl in worst) || r < worst[cl]) { worst[cl] = r; worstname[cl] = k }
    }
    for (cl in count) {
        g = exp(sum[cl] / count[cl])
        printf "class %-8s geomean of tcg/soft %.3f over %d tests, worst %s %.3f\n", cl, g, count[cl], worstname[cl], worst[cl]
        printf "bench soft-%s-speed-vs-tcg %.3f ratio 1\n", cl, g
    }
    printf "boot: tcg %.0f ms, soft %.0f ms\n", boot[2], boot[3]
    if (boot[3] > 0) printf "bench soft-boot-ms %.0f ms %.0f\n", boot[3], boot[2]
}
