/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Talks over AF_VSOCK for tests/guests/virtio: `vsock connect CID PORT` copies
 * between standard input/output and a connection, `vsock listen PORT` echoes
 * one connection.
 */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void
need(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(1);
	}
}

static void
put(int fd, const char *data, ssize_t length)
{
	while (length > 0) {
		ssize_t n = write(fd, data, (size_t)length);

		need(n > 0, "write");
		data += n;
		length -= n;
	}
}

int
main(int argc, char **argv)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK };
	static char data[65536];
	ssize_t n;
	int s;

	need(argc >= 3, "usage");
	need((s = socket(AF_VSOCK, SOCK_STREAM, 0)) >= 0, "socket");
	if (strcmp(argv[1], "listen") == 0) {
		int c;

		address.svm_cid = VMADDR_CID_ANY;
		address.svm_port = (unsigned)atoi(argv[2]);
		need(bind(s, (struct sockaddr *)&address, sizeof(address)) == 0,
		    "bind");
		need(listen(s, 1) == 0, "listen");
		need((c = accept(s, NULL, NULL)) >= 0, "accept");
		while ((n = read(c, data, sizeof(data))) > 0)
			put(c, data, n);
		return (0);
	}

	need(argc >= 4, "usage");
	address.svm_cid = (unsigned)atoi(argv[2]);
	address.svm_port = (unsigned)atoi(argv[3]);
	need(connect(s, (struct sockaddr *)&address, sizeof(address)) == 0,
	    "connect");
	struct pollfd both[2] = { { .fd = 0, .events = POLLIN },
	    { .fd = s, .events = POLLIN } };
	for (;;) {
		need(poll(both, 2, 20000) > 0, "poll");
		if (both[1].revents != 0) {
			if ((n = read(s, data, sizeof(data))) <= 0)
				return (0);
			put(1, data, n);
		}
		if (both[0].revents != 0) {
			if ((n = read(0, data, sizeof(data))) <= 0) {
				(void)shutdown(s, SHUT_WR);
				both[0].fd = -1;
			} else
				put(s, data, n);
		}
	}
}
