/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * arch.c: the processor extensions of a build for real hardware.
 */
#include "vmk_arch.h"

const struct vmk_arch_ops *const vmk_arch_all[] = {
	&vmk_svm_ops,
	&vmk_vmx_ops,
	NULL
};
