/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What FreeBSD's and illumos' C libraries do with the calls by which a VM's process gives things up, as far as arguments go:
 * each takes what its manual page allows, refuses the rest with EINVAL, and writes down what it was asked. The numbers are
 * those of FreeBSD's sys/procctl.h, sys/wait.h and sys/cpuset.h and of illumos' sys/priv.h and sys/procset.h, by hand.
 */
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char record[4096];

static int
note(int ok, const char *format, ...)
{
	size_t at = strlen(record);
	va_list list;

	va_start(list, format);
	vsnprintf(record + at, sizeof(record) - at, format, list);
	va_end(list);
	if (ok)
		return (0);
	errno = EINVAL;
	return (-1);
}

const char *
other_systems_record(void)
{
	return (record);
}

void
other_systems_clear(void)
{
	record[0] = '\0';
}

/* procctl(2): idtype P_PID 0; PROC_TRACE_CTL 7 with PROC_TRACE_CTL_DISABLE 2; PROC_NO_NEW_PRIVS_CTL 19 with _ENABLE 1. */
int
procctl(int id_type, int64_t id, int command, int *data)
{
	int self = id_type == 0 && id == getpid();

	if (command == 19)
		return (note(self && *data == 1, "no new privileges;"));
	if (command == 7)
		return (note(self && *data == 2, "not traced;"));
	return (note(0, "procctl %d;", command));
}

/* priv_str_to_set(3C): "basic" and names with "!"; the set is its text here. */
static const char *const privileges[] = { "basic", "!proc_exec", "!proc_fork", "!proc_info", "!proc_session", "!file_link_any" };

void *
priv_str_to_set(const char *text, const char *separators, const char **end)
{
	static char set[256];
	char copy[256], *word, *rest;
	size_t i;

	(void)end;
	snprintf(set, sizeof(set), "%s", text);
	snprintf(copy, sizeof(copy), "%s", text);
	for (word = strtok_r(copy, separators, &rest); word != NULL; word = strtok_r(NULL, separators, &rest)) {
		for (i = 0; i < sizeof(privileges) / sizeof(privileges[0]) && strcmp(word, privileges[i]) != 0; i++)
			;
		if (i == sizeof(privileges) / sizeof(privileges[0]))
			return (NULL);
	}
	return (set);
}

/* setppriv(2): PRIV_SET 2. */
int
setppriv(int operation, const char *which, const void *set)
{
	int known = strcmp(which, "Permitted") == 0 || strcmp(which, "Limit") == 0;

	return (note(operation == 2 && known && set != NULL, "%s=%s;", which, (const char *)set));
}

/* cpuset_setaffinity(2): CPU_LEVEL_WHICH 3, CPU_WHICH_TID 1, id -1; a release before 14, whose set is 32 bytes, and two processors. */
int
cpuset_setaffinity(int level, int which, int64_t id, size_t size, const uint64_t *mask)
{
	if (size != 32) {
		errno = ERANGE;
		return (-1);
	}
	return (note(level == 3 && which == 1 && id == -1 && (mask[0] == 1 || mask[0] == 2), "thread on %#llx;",
	    (unsigned long long)mask[0]));
}

/* processor_bind(2): P_LWPID 8, P_MYID -1; two processors. */
int
processor_bind(int id_type, int id, int processor, int *old)
{
	return (note(id_type == 8 && id == -1 && processor < 2 && old == NULL, "lwp on %d;", processor));
}
