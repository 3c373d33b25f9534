/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Prints what OsAbi declares about this operating system as the system's own
 * headers define it, one `kind name value` a line, under the names of OsAbi's
 * properties. A test of Vmm.Host compiles and runs this and compares, both
 * ways. A name that the system lacks prints 0, as OsAbi has it.
 */
#ifdef __linux__
#define	_GNU_SOURCE	/* F_OFD_SETLK, ECHONL */
#endif
#include <sys/types.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#ifndef __sun
#include <sys/file.h>
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <termios.h>
#if defined(__linux__) || defined(__FreeBSD__) || defined(__sun)
#include <sys/eventfd.h>
#endif

#ifndef MAP_NORESERVE
#define	MAP_NORESERVE	0
#endif
#ifdef __FreeBSD__
#undef MAP_NORESERVE	/* declared, and "never enforced" by mmap(2) */
#define	MAP_NORESERVE	0
#endif
#ifndef MADV_HUGEPAGE
#define	MADV_HUGEPAGE	0
#endif
#ifndef MADV_DONTFORK
#define	MADV_DONTFORK	0
#endif
#ifndef MADV_DONTDUMP
#ifdef MADV_NOCORE
#define	MADV_DONTDUMP	MADV_NOCORE
#else
#define	MADV_DONTDUMP	0
#endif
#endif
#ifdef __linux__
#define	DISCARD		MADV_DONTNEED
#else
#define	DISCARD		MADV_FREE
#endif
#ifndef MADV_REMOVE
#define	MADV_REMOVE	0
#endif
#ifndef F_OFD_SETLK
#define	F_OFD_SETLK	0
#define	F_OFD_GETLK	0
#endif

#define	NUM(name, n)	printf("number %s %llu\n", name, (unsigned long long)(n))
#define	ERR(n)		printf("errno %s %d\n", #n, n)

int
main(void)
{
	NUM("MapAnonymous", MAP_ANON);
	NUM("MapNoReserve", MAP_NORESERVE);
	NUM("AdviseHugePages", MADV_HUGEPAGE);
	NUM("AdviseDontFork", MADV_DONTFORK);
	NUM("AdviseDontDump", MADV_DONTDUMP);
	NUM("AdviseDiscard", DISCARD);
	NUM("AdviseRemove", MADV_REMOVE);
	NUM("OpenCreate", O_CREAT);
	NUM("OpenExclusive", O_EXCL);
	NUM("OpenTruncate", O_TRUNC);
	NUM("OpenNonBlocking", O_NONBLOCK);
	NUM("OpenCloseOnExec", O_CLOEXEC);
	NUM("OpenNoControllingTerminal", O_NOCTTY);
	NUM("OpenNoFollow", O_NOFOLLOW);
	NUM("OpenDirectory", O_DIRECTORY);
	NUM("EventFdCloseOnExec", EFD_CLOEXEC);
	NUM("EventFdNonBlocking", EFD_NONBLOCK);
	NUM("SignalBlock", SIG_BLOCK);
	NUM("SignalUnblock", SIG_UNBLOCK);
	NUM("KickSignal", SIGRTMIN + 3);
	NUM("FileLocks.GetLock", F_OFD_GETLK);
	NUM("FileLocks.SetLock", F_OFD_SETLK);
	NUM("FileLocks.ReadLock", F_RDLCK);
	NUM("FileLocks.WriteLock", F_WRLCK);
	NUM("FileLocks.Unlock", F_UNLCK);
	NUM("Termios.ControlCharsOffset", offsetof(struct termios, c_cc));
	NUM("Termios.MinIndex", VMIN);
	NUM("Termios.TimeIndex", VTIME);
	NUM("Termios.RawInputClear", IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR |
	    IGNCR | ICRNL | IXON);
	NUM("Termios.RawOutputClear", OPOST);
	NUM("Termios.RawControlClear", CSIZE | PARENB);
	NUM("Termios.RawControlSet", CS8);
	NUM("Termios.RawLocalClear", ECHO | ECHONL | ICANON | ISIG | IEXTEN);
	NUM("Termios.SetNow", TCSANOW);
	NUM("Termios.GetWindowSize", TIOCGWINSZ);
	ERR(EPERM);
	ERR(ENOENT);
	ERR(EINTR);
	ERR(EIO);
	ERR(ENXIO);
	ERR(E2BIG);
	ERR(EBADF);
	ERR(EAGAIN);
	ERR(ENOMEM);
	ERR(EACCES);
	ERR(EFAULT);
	ERR(EBUSY);
	ERR(EEXIST);
	ERR(ENODEV);
	ERR(ENOTDIR);
	ERR(EISDIR);
	ERR(EINVAL);
	ERR(ENFILE);
	ERR(EMFILE);
	ERR(ENOTTY);
	ERR(EFBIG);
	ERR(ENOSPC);
	ERR(ESPIPE);
	ERR(EROFS);
	ERR(EPIPE);
	ERR(ERANGE);
	ERR(EDEADLK);
	ERR(ENOSYS);
	ERR(ENOTEMPTY);
	ERR(EOPNOTSUPP);
	ERR(EADDRINUSE);
	ERR(ECONNRESET);
	ERR(ETIMEDOUT);
	ERR(ECONNREFUSED);
	ERR(EINPROGRESS);
	ERR(EDQUOT);
	return (0);
}
