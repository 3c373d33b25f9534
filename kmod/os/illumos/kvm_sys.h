/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * kvm_sys.h: the system headers of kvm_illumos.c, in a file of their own so
 * that tests/kmod/illumos can put its small DDI in their place.
 */
#ifndef KVM_SYS_H
#define	KVM_SYS_H

#include <sys/types.h>
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/archsystm.h>
#include <sys/avl.h>
#include <sys/cmn_err.h>
#include <sys/conf.h>
#include <sys/cpuvar.h>
#include <sys/cred.h>
#include <sys/cyclic.h>
#include <sys/disp.h>
#include <sys/fcntl.h>
#include <sys/file.h>
#include <sys/fs/snode.h>
#include <sys/hma.h>
#include <sys/id_space.h>
#include <sys/kfpu.h>
#include <sys/kmem.h>
#include <sys/mman.h>
#include <sys/modctl.h>
#include <sys/note.h>
#include <sys/open.h>
#include <sys/proc.h>
#include <sys/schedctl.h>
#include <sys/signal.h>
#include <sys/smt.h>
#include <sys/spl.h>
#include <sys/stat.h>
#include <sys/stdbool.h>
#include <sys/thread.h>
#include <sys/uio.h>
#include <sys/vnode.h>
#include <sys/x86_archext.h>
#include <sys/x_call.h>
#include <sys/zone.h>
#include <vm/as.h>
#include <vm/hat.h>
#include <vm/hat_i86.h>
#include <vm/page.h>
#include <sys/ddi.h>
#include <sys/sunddi.h>

#endif /* !KVM_SYS_H */
