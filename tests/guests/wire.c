/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What both ends of a guest test do that a shell cannot: streams whose every
 * byte is checked, datagrams, file system calls, memory, raw disks.
 *
 *	wire serve ADDRESS...		serve streams and datagrams until killed
 *	wire down ADDRESS BYTES		receive a stream, check it and its end
 *	wire up ADDRESS BYTES		send one; the server checks and answers
 *	wire rr ADDRESS COUNT SIZE	request and response, one at a time
 *	wire udp ADDRESS COUNT SIZE	the same in datagrams, repeated when lost
 *	wire quit ADDRESS		end the server
 *	wire files DIRECTORY		calls of POSIX on files in there
 *	wire eat MEGABYTES FILE		touch memory, wait for FILE, let go
 *	wire hold FILE...		keep files in the page cache until killed
 *	wire disk DEVICE read|write random|seq SIZE DEPTH SECONDS
 *	wire stamp DEVICE NAME ROUND	write rounds of blocks, flush each, tell
 *	wire stamped DEVICE ROUND	what rounds 1 to ROUND wrote is there
 *
 * ADDRESS is tcp:HOST:PORT, tcp:[V6]:PORT, udp:..., vsock:CID:PORT, or
 * unix:PATH:PORT, which asks a vsock proxy for PORT. HOST is numeric.
 *
 * down, up, rr, udp and disk end with "rate NUMBER UNIT"; a number that begins
 * with "~" for BYTES means that the content is not checked (for measuring).
 * A stream carries a header, then words that depend on their place, so that
 * lost, doubled and moved bytes are all seen.
 */
#define	_GNU_SOURCE
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <linux/vm_sockets.h>
#include <sys/ioctl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define	CHUNK	65536

struct header {
	char	 magic[4];
	uint32_t op;		/* 'd', 'u', 'r', 'q' */
	uint64_t bytes;
	uint64_t seed;		/* 0: zeroes, not checked */
};

static void
fail(const char *what)
{
	fprintf(stderr, "wire: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void
need(int ok, const char *what)
{
	if (!ok)
		fail(what);
}

static double
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return ((double)t.tv_sec + (double)t.tv_nsec / 1e9);
}

static uint64_t
word(uint64_t seed, uint64_t place)
{
	uint64_t x = seed + place * 0x9e3779b97f4a7c15ULL;

	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9ULL;
	return (x ^ x >> 32);
}

/* Fills or checks what stands at a place of the stream (a multiple of 8). */
static void
fill(char *data, size_t length, uint64_t seed, uint64_t at)
{
	uint64_t value;
	size_t i;

	for (i = 0; i < length; i += 8) {
		value = word(seed, (at + i) / 8);
		memcpy(data + i, &value, length - i < 8 ? length - i : 8);
	}
}

static int
is_filled(const char *data, size_t length, uint64_t seed, uint64_t at)
{
	size_t i;

	for (i = 0; i < length; i++, at++) {
		uint64_t value;

		if (at % 8 == 0 && length - i >= 8) {
			value = word(seed, at / 8);
			if (memcmp(data + i, &value, 8) != 0)
				return (0);
			i += 7;
			at += 7;
			continue;
		}
		value = word(seed, at / 8);
		if (data[i] != ((const char *)&value)[at % 8])
			return (0);
	}
	return (1);
}

/* All of it, one way or the other. */
static int
transfer(int fd, char *data, size_t length, int out)
{
	while (length > 0) {
		ssize_t n = out ? write(fd, data, length) :
		    read(fd, data, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return (0);
		data += n;
		length -= (size_t)n;
	}
	return (1);
}

static int
put(int fd, const void *from, size_t length)
{
	return (transfer(fd, (char *)(uintptr_t)from, length, 1));
}

static int
get(int fd, void *into, size_t length)
{
	return (transfer(fd, into, length, 0));
}

static int
send_stream(int fd, uint64_t bytes, uint64_t seed)
{
	static char data[CHUNK];
	uint64_t at = 0;

	memset(data, 0, sizeof(data));
	while (at < bytes) {
		size_t part = bytes - at < CHUNK ? (size_t)(bytes - at) : CHUNK;

		if (seed != 0)
			fill(data, part, seed, at);
		if (!put(fd, data, part))
			return (0);
		at += part;
	}
	return (1);
}

/* Receives to the end of the stream; 0 unless it was exactly that stream. */
static int
receive_stream(int fd, uint64_t bytes, uint64_t seed, uint64_t *count)
{
	static char data[CHUNK];
	uint64_t at = 0;
	int good = 1;
	ssize_t n;

	while ((n = read(fd, data, sizeof(data))) > 0) {
		if (seed != 0 && good && !is_filled(data, (size_t)n, seed, at)) {
			fprintf(stderr, "wire: wrong after byte %llu\n",
			    (unsigned long long)at);
			good = 0;
		}
		at += (uint64_t)n;
	}
	*count = at;
	if (n < 0)
		perror("wire: receive");
	return (good && n == 0 && at == bytes);
}

/* Splits "kind:host:port"; the host may stand in brackets. */
static const char *
split(const char *address, char *host, size_t size, const char **port)
{
	const char *rest = strchr(address, ':'), *end;
	size_t length;

	need(rest != NULL, "an address is kind:host:port");
	rest++;
	*port = strrchr(rest, ':');
	need(*port != NULL, "an address is kind:host:port");
	end = *port;
	(*port)++;
	if (*rest == '[' && end[-1] == ']') {
		rest++;
		end--;
	}
	length = (size_t)(end - rest);
	need(length < size, "host is too long");
	memcpy(host, rest, length);
	host[length] = '\0';
	return (host);
}

static int
open_socket(const char *address, int listening)
{
	char host[256];
	const char *port;
	int on = 1, fd;

	split(address, host, sizeof(host), &port);
	if (strncmp(address, "vsock:", 6) == 0) {
		struct sockaddr_vm vm = { .svm_family = AF_VSOCK };

		vm.svm_cid = listening ? VMADDR_CID_ANY : (unsigned)atoi(host);
		vm.svm_port = (unsigned)atoi(port);
		need((fd = socket(AF_VSOCK, SOCK_STREAM, 0)) >= 0, "socket");
		need((listening ? bind : connect)(fd, (struct sockaddr *)&vm,
		    sizeof(vm)) == 0, address);
		need(!listening || listen(fd, 8) == 0, "listen");
	} else if (strncmp(address, "unix:", 5) == 0) {
		struct sockaddr_un un = { .sun_family = AF_UNIX };
		char line[64], c = 0;

		need((size_t)snprintf(un.sun_path, sizeof(un.sun_path),
		    "%s%s%s", host, listening ? "_" : "",
		    listening ? port : "") < sizeof(un.sun_path), "path");
		need((fd = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0, "socket");
		need((listening ? bind : connect)(fd, (struct sockaddr *)&un,
		    sizeof(un)) == 0, address);
		if (listening) {
			need(listen(fd, 8) == 0, "listen");
			return (fd);
		}
		snprintf(line, sizeof(line), "CONNECT %s\n", port);
		need(put(fd, line, strlen(line)), "CONNECT");
		for (size_t i = 0; c != '\n'; i++) {
			need(get(fd, &c, 1), "the proxy refused");
			need(i != 0 || c == 'O', "the proxy refused");
		}
	} else {
		int udp = strncmp(address, "udp:", 4) == 0;
		struct addrinfo hints, *found;

		memset(&hints, 0, sizeof(hints));
		hints.ai_socktype = udp ? SOCK_DGRAM : SOCK_STREAM;
		hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
		need(getaddrinfo(host, port, &hints, &found) == 0, address);
		need((fd = socket(found->ai_family, found->ai_socktype, 0)) >= 0,
		    "socket");
		(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		if (!udp)
			(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on,
			    sizeof(on));
		need((listening ? bind : connect)(fd, found->ai_addr,
		    found->ai_addrlen) == 0, address);
		need(!listening || udp || listen(fd, 32) == 0, "listen");
		freeaddrinfo(found);
	}
	return (fd);
}

static void
serve_stream(int fd)
{
	struct header h;
	uint64_t count;
	char *message;

	if (!get(fd, &h, sizeof(h)) || memcmp(h.magic, "WIRE", 4) != 0)
		return;
	switch (h.op) {
	case 'd':
		if (!send_stream(fd, h.bytes, h.seed))
			perror("wire: send");
		(void)shutdown(fd, SHUT_WR);
		(void)get(fd, &h, 1);
		break;
	case 'u':
		if (!receive_stream(fd, h.bytes, h.seed, &count))
			count = UINT64_MAX;
		(void)put(fd, &count, sizeof(count));
		break;
	case 'r':
		if (h.bytes > 1 << 20 || (message = malloc(h.bytes)) == NULL)
			return;
		while (get(fd, message, h.bytes) && put(fd, message, h.bytes))
			;
		free(message);
		break;
	case 'q':
		(void)kill(getppid(), SIGTERM);
		break;
	}
}

static int
serve(int count, char **addresses)
{
	struct pollfd fds[16];
	int udp[16];
	static char data[65536];

	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	need(count > 0 && count <= 16, "1 to 16 addresses");
	for (int i = 0; i < count; i++) {
		udp[i] = strncmp(addresses[i], "udp:", 4) == 0;
		fds[i].fd = open_socket(addresses[i], 1);
		fds[i].events = POLLIN;
	}
	for (;;) {
		if (poll(fds, (nfds_t)count, -1) < 0 && errno != EINTR)
			fail("poll");
		for (int i = 0; i < count; i++) {
			struct sockaddr_storage from;
			socklen_t length = sizeof(from);
			ssize_t n;
			int fd;

			if ((fds[i].revents & POLLIN) == 0)
				continue;
			if (udp[i]) {
				n = recvfrom(fds[i].fd, data, sizeof(data), 0,
				    (struct sockaddr *)&from, &length);
				if (n >= 0)
					(void)sendto(fds[i].fd, data, (size_t)n, 0,
					    (struct sockaddr *)&from, length);
				continue;
			}
			if ((fd = accept(fds[i].fd, NULL, NULL)) < 0)
				continue;
			if (fork() == 0) {
				int on = 1;

				(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY,
				    &on, sizeof(on));
				serve_stream(fd);
				_exit(0);
			}
			close(fd);
		}
	}
}

static int
stream(const char *verb, const char *address, const char *amount, size_t size)
{
	struct header h = { .magic = { 'W', 'I', 'R', 'E' } };
	uint64_t count = 0;
	int fd, checked = amount[0] != '~';
	double start;

	h.op = (uint32_t)verb[0];
	h.bytes = strtoull(amount + !checked, NULL, 0);
	h.seed = checked ? 0x5eed0001ULL ^ h.bytes << 20 : 0;
	fd = open_socket(address, 0);
	start = now();
	if (h.op == 'r') {
		char *out = malloc(size), *in = malloc(size);
		uint64_t rounds = h.bytes;

		need(in != NULL && out != NULL, "memory");
		h.bytes = size;
		need(put(fd, &h, sizeof(h)), "send");
		for (count = 0; count < rounds; count++) {
			fill(out, size, h.seed + count, 0);
			need(put(fd, out, size), "send");
			need(get(fd, in, size), "receive");
			need(memcmp(in, out, size) == 0, "another answer");
		}
		printf("rate %.1f requests/s\n", (double)count / (now() - start));
		return (0);
	}
	need(put(fd, &h, sizeof(h)), "send");
	if (h.op == 'q')
		return (0);
	if (h.op == 'd') {
		if (!receive_stream(fd, h.bytes, h.seed, &count)) {
			fprintf(stderr, "wire: received %llu of %llu\n",
			    (unsigned long long)count,
			    (unsigned long long)h.bytes);
			return (1);
		}
	} else {
		need(send_stream(fd, h.bytes, h.seed), "send");
		need(shutdown(fd, SHUT_WR) == 0, "shutdown");
		need(get(fd, &count, sizeof(count)), "no answer");
		if (count != h.bytes) {
			fprintf(stderr, "wire: the server got %lld of %llu\n",
			    (long long)count, (unsigned long long)h.bytes);
			return (1);
		}
	}
	printf("rate %.3f MB/s\n", (double)h.bytes / 1e6 / (now() - start));
	return (0);
}

static int
datagrams(const char *address, int rounds, size_t size)
{
	char *out = malloc(size), *in = malloc(65536);
	int fd = open_socket(address, 0), repeated = 0;
	double start = now();

	need(in != NULL && out != NULL && size >= 8, "size");
	for (int i = 0; i < rounds; i++) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		int tries = 0;

		fill(out, size, (uint64_t)i + 1, 0);
		for (;;) {
			if (p.revents == 0)
				need(send(fd, out, size, 0) == (ssize_t)size ||
				    errno == ECONNREFUSED, "send");
			need(poll(&p, 1, 2000) >= 0, "poll");
			if (p.revents == 0) {
				need(++tries < 10, "datagrams do not come back");
				repeated++;
				continue;
			}
			/* An answer to an earlier copy may still come. */
			if (recv(fd, in, 65536, 0) == (ssize_t)size &&
			    memcmp(in, out, size) == 0)
				break;
		}
	}
	printf("rate %.1f datagrams/s\nrepeated %d\n",
	    (double)rounds / (now() - start), repeated);
	return (0);
}

/* Each line of files() is a promise of POSIX that a file server can break. */
#define	CHECK(condition) do {						\
	if (!(condition)) {						\
		fprintf(stderr, "wire: files: line %d: %s (%s)\n",	\
		    __LINE__, #condition, strerror(errno));		\
		return (1);						\
	}								\
} while (0)

static int
files(const char *directory)
{
	char data[8192], back[8192], name[64];
	struct timespec times[2] = { { .tv_sec = 1000000 }, { .tv_sec = 2000000 } };
	struct statvfs vfs;
	struct stat st, other;
	struct dirent *entry;
	int fd, second, count = 0;
	DIR *d;

	CHECK(chdir(directory) == 0);
	CHECK(mkdir("t", 0755) == 0 && chdir("t") == 0);
	CHECK(mkdir("../t", 0755) == -1 && errno == EEXIST);
	fill(data, sizeof(data), 7, 0);

	CHECK((fd = open("a", O_RDWR | O_CREAT | O_EXCL, 0640)) >= 0);
	CHECK(open("a", O_RDWR | O_CREAT | O_EXCL, 0640) == -1 && errno == EEXIST);
	CHECK(open("none", O_RDONLY) == -1 && errno == ENOENT);
	CHECK(open("a/b", O_RDONLY) == -1 && errno == ENOTDIR);
	CHECK(write(fd, data, sizeof(data)) == sizeof(data));
	CHECK(pread(fd, back, sizeof(back), 0) == sizeof(back));
	CHECK(memcmp(data, back, sizeof(data)) == 0);
	CHECK(pwrite(fd, "xyz", 3, 100000) == 3);
	CHECK(fstat(fd, &st) == 0 && st.st_size == 100003);
	CHECK(pread(fd, back, 10, 50000) == 10 && back[0] == 0 && back[9] == 0);
	CHECK(pread(fd, back, 10, 200000) == 0);
	CHECK(ftruncate(fd, 5) == 0 && fstat(fd, &st) == 0 && st.st_size == 5);
	CHECK(fsync(fd) == 0 && fdatasync(fd) == 0);
	CHECK((st.st_mode & 07777) == 0640 && S_ISREG(st.st_mode));
	CHECK(fchmod(fd, 0604) == 0 && stat("a", &st) == 0);
	CHECK((st.st_mode & 07777) == 0604);
	CHECK(futimens(fd, times) == 0 && stat("a", &st) == 0);
	CHECK(st.st_atime == 1000000 && st.st_mtime == 2000000);
	CHECK(close(fd) == 0);
	CHECK((fd = open("a", O_WRONLY | O_APPEND)) >= 0);
	CHECK(write(fd, "12", 2) == 2 && write(fd, "34", 2) == 2 && close(fd) == 0);
	CHECK(stat("a", &st) == 0 && st.st_size == 9);
	CHECK((fd = open("a", O_WRONLY | O_TRUNC)) >= 0 && close(fd) == 0);
	CHECK(stat("a", &st) == 0 && st.st_size == 0);

	CHECK(link("a", "hard") == 0 && stat("hard", &other) == 0);
	CHECK(stat("a", &st) == 0 && st.st_ino == other.st_ino && st.st_nlink == 2);
	CHECK(link("a", "hard") == -1 && errno == EEXIST);
	CHECK(unlink("hard") == 0 && stat("a", &st) == 0 && st.st_nlink == 1);
	CHECK(symlink("a", "soft") == 0 && lstat("soft", &st) == 0);
	CHECK(S_ISLNK(st.st_mode) && readlink("soft", back, sizeof(back)) == 1);
	CHECK(symlink("soft2", "soft2") == 0);
	CHECK(open("soft2", O_RDONLY) == -1 && errno == ELOOP);

	CHECK(mkdir("d", 0755) == 0 && mkdir("d/e", 0755) == 0);
	CHECK(rmdir("d") == -1 && (errno == ENOTEMPTY || errno == EEXIST));
	CHECK(rename("a", "d/e/moved") == 0 && access("a", F_OK) == -1);
	CHECK((fd = open("over", O_RDWR | O_CREAT, 0600)) >= 0);
	CHECK(write(fd, "new", 3) == 3);
	CHECK(rename("over", "d/e/moved") == 0);
	CHECK(stat("d/e/moved", &st) == 0 && st.st_size == 3);
	CHECK(rename("d/e", "d/f") == 0 && stat("d/f/moved", &st) == 0);
	CHECK(rename("d", "d/f/in-itself") == -1 && errno == EINVAL);
	CHECK(rmdir("d/f/moved") == -1 && errno == ENOTDIR);
	CHECK(unlink("d/f") == -1 && (errno == EISDIR || errno == EPERM));

	/* An open file lives on without its name. */
	CHECK(unlink("d/f/moved") == 0);
	CHECK(pread(fd, back, 3, 0) == 3 && memcmp(back, "new", 3) == 0);
	CHECK(pwrite(fd, "old", 3, 3) == 3 && close(fd) == 0);
	CHECK(rmdir("d/f") == 0 && rmdir("d") == 0);

	for (int i = 0; i < 300; i++) {
		snprintf(name, sizeof(name), "a-name-of-some-length-%03d", i);
		CHECK((second = open(name, O_WRONLY | O_CREAT, 0644)) >= 0);
		CHECK(close(second) == 0);
	}
	CHECK((d = opendir(".")) != NULL);
	while ((entry = readdir(d)) != NULL)
		count += strncmp(entry->d_name, "a-name", 6) == 0;
	closedir(d);
	CHECK(count == 300);
	for (int i = 0; i < 300; i++) {
		snprintf(name, sizeof(name), "a-name-of-some-length-%03d", i);
		CHECK(unlink(name) == 0);
	}
	CHECK(unlink("soft") == 0 && unlink("soft2") == 0);
	CHECK(statvfs(".", &vfs) == 0 && vfs.f_blocks > 0 && vfs.f_namemax >= 255);
	CHECK(chdir("..") == 0 && rmdir("t") == 0);
	return (0);
}

static int
eat(size_t megabytes, const char *file)
{
	size_t length = megabytes << 20;
	char *memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(memory != MAP_FAILED, "mmap");
	for (size_t i = 0; i < length; i += 4096)
		memory[i] = (char)(i >> 12 | 1);
	printf("# eaten\n");
	fflush(stdout);
	while (access(file, F_OK) != 0)
		usleep(100000);
	return (0);
}

/*
 * A host that is itself a guest may lose its page cache at any time, and then
 * one monitor is measured with the cache and the next one with the disk.
 */
static void
hold(char **files)
{
	for (; *files != NULL; files++) {
		struct stat st;
		int fd = open(*files, O_RDONLY);
		void *at;

		need(fd >= 0 && fstat(fd, &st) == 0, *files);
		at = mmap(NULL, (size_t)st.st_size, PROT_READ,
		    MAP_SHARED | MAP_POPULATE, fd, 0);
		need(at != MAP_FAILED, "mmap");
		if (mlock(at, (size_t)st.st_size) != 0)
			perror("wire: mlock");
	}
	for (;;)
		pause();
}

/* Keeps DEPTH requests under way past the page cache. */
static int
disk(char **a)
{
	int writing = a[1][0] == 'w', random = a[2][0] == 'r';
	size_t size = strtoull(a[3], NULL, 0);
	unsigned depth = (unsigned)atoi(a[4]);
	double seconds = atof(a[5]), start, end;
	int fd = open(a[0], (writing ? O_RDWR : O_RDONLY) | O_DIRECT);
	struct iocb *blocks = calloc(depth, sizeof(*blocks)), *one;
	struct io_event *events = calloc(depth, sizeof(*events));
	uint64_t length, place = 0, state = 88172645463325252ULL, done = 0;
	aio_context_t context = 0;
	unsigned flying = 0;
	char *data;

	need(fd >= 0, a[0]);
	need(ioctl(fd, BLKGETSIZE64, &length) == 0, "size");
	need(posix_memalign((void **)&data, 4096, size * depth) == 0, "memory");
	memset(data, 0x5a, size * depth);
	need(syscall(SYS_io_setup, depth, &context) == 0, "io_setup");
	start = now();
	end = start + seconds;
	for (unsigned i = 0; i < depth; i++) {
		blocks[i].aio_fildes = (unsigned)fd;
		blocks[i].aio_lio_opcode = writing ? IOCB_CMD_PWRITE :
		    IOCB_CMD_PREAD;
		blocks[i].aio_buf = (uintptr_t)(data + size * i);
		blocks[i].aio_nbytes = size;
		events[i].obj = (uintptr_t)&blocks[i];
	}
	for (long ready = depth; ready > 0 || flying > 0;) {
		for (long i = 0; i < ready && now() < end; i++) {
			one = (struct iocb *)(uintptr_t)events[i].obj;
			if (random) {
				state ^= state << 13;
				state ^= state >> 7;
				state ^= state << 17;
				place = state % (length / size) * size;
			}
			one->aio_offset = (int64_t)place;
			if (!random)
				place = place + 2 * size <= length ?
				    place + size : 0;
			need(syscall(SYS_io_submit, context, 1, &one) == 1,
			    "io_submit");
			flying++;
		}
		if (flying == 0)
			break;
		ready = syscall(SYS_io_getevents, context, 1, depth, events,
		    NULL);
		need(ready > 0, "io_getevents");
		for (long i = 0; i < ready; i++)
			need(events[i].res == (int64_t)size, "a request failed");
		flying -= (unsigned)ready;
		done += (uint64_t)ready;
	}
	seconds = now() - start;
	if (random)
		printf("rate %.0f requests/s\n", (double)done / seconds);
	else
		printf("rate %.1f MB/s\n", (double)(done * size) / 1e6 / seconds);
	return (0);
}

/*
 * Rounds of writes for a disk whose machine is killed: each round stamps some
 * blocks of the first megabytes with its number, flushes, and says so. After a
 * round was flushed, none of its blocks may hold what stood there before. What
 * later rounds wrote may be there as well, wholly or in part, since the line
 * about a round may be lost with the machine; but no block is ever damaged.
 */
#define	STAMPS		1024		/* blocks of 4 KiB */
#define	STAMP_WORDS	512
#define	PER_ROUND	24
#define	BEYOND		4096		/* rounds that were not reported */

static uint32_t
stamp_place(uint64_t round, int i)
{
	return ((uint32_t)(word(round, (uint64_t)i) % STAMPS));
}

static void
stamp_fill(uint64_t *block, uint32_t place, uint64_t round)
{
	block[0] = place;
	block[1] = round;
	fill((char *)(block + 2), (STAMP_WORDS - 2) * 8, round * STAMPS + place, 0);
}

static void
stamp(const char *device, const char *name, uint64_t round)
{
	int fd = open(device, O_RDWR | O_DIRECT);
	uint64_t *block;

	need(fd >= 0, device);
	need(posix_memalign((void **)&block, 4096, 4096) == 0, "memory");
	for (;;) {
		round++;
		for (int i = 0; i < PER_ROUND; i++) {
			uint32_t place = stamp_place(round, i);

			stamp_fill(block, place, round);
			need(pwrite(fd, block, 4096, (off_t)place * 4096) == 4096, "pwrite");
		}
		need(fdatasync(fd) == 0, "fdatasync");
		printf("# %s %llu\n", name, (unsigned long long)round);
		fflush(stdout);
	}
}

static int
writes_place(uint64_t round, uint32_t place)
{
	for (int i = 0; i < PER_ROUND; i++)
		if (stamp_place(round, i) == place)
			return (1);
	return (0);
}

static int
stamped(const char *device, uint64_t rounds)
{
	static uint64_t last[STAMPS];
	int fd = open(device, O_RDONLY | O_DIRECT), bad = 0;
	uint64_t *block, ought[STAMP_WORDS];

	need(fd >= 0, device);
	need(posix_memalign((void **)&block, 4096, 4096) == 0, "memory");
	for (uint64_t round = 1; round <= rounds; round++)
		for (int i = 0; i < PER_ROUND; i++)
			last[stamp_place(round, i)] = round;
	for (uint32_t place = 0; place < STAMPS; place++) {
		uint64_t found;
		int good;

		need(pread(fd, block, 4096, (off_t)place * 4096) == 4096, "pread");
		found = block[1];
		if (found == 0)
			memset(ought, 0, sizeof(ought));
		else
			stamp_fill(ought, place, found);
		good = found == last[place] || (found > rounds &&
		    found - rounds <= BEYOND && writes_place(found, place));
		if (good && memcmp(block, ought, 4096) == 0)
			continue;
		if (bad++ < 5)
			fprintf(stderr, "wire: block %u: round %llu stands there, "
			    "%llu was flushed%s\n", place, (unsigned long long)found,
			    (unsigned long long)last[place], good ? "; damaged" : "");
	}
	return (bad != 0);
}

int
main(int argc, char **argv)
{
	const char *verb = argc > 1 ? argv[1] : "";

	if (argc >= 3 && strcmp(verb, "serve") == 0)
		return (serve(argc - 2, argv + 2));
	if (argc == 4 && (strcmp(verb, "down") == 0 || strcmp(verb, "up") == 0))
		return (stream(verb, argv[2], argv[3], 0));
	if (argc == 5 && strcmp(verb, "rr") == 0)
		return (stream(verb, argv[2], argv[3], (size_t)atol(argv[4])));
	if (argc == 3 && strcmp(verb, "quit") == 0)
		return (stream(verb, argv[2], "0", 0));
	if (argc == 5 && strcmp(verb, "udp") == 0)
		return (datagrams(argv[2], atoi(argv[3]), (size_t)atol(argv[4])));
	if (argc == 3 && strcmp(verb, "files") == 0)
		return (files(argv[2]));
	if (argc == 4 && strcmp(verb, "eat") == 0)
		return (eat((size_t)atol(argv[2]), argv[3]));
	if (argc >= 3 && strcmp(verb, "hold") == 0)
		hold(argv + 2);
	if (argc == 8 && strcmp(verb, "disk") == 0)
		return (disk(argv + 2));
	if (argc == 5 && strcmp(verb, "stamp") == 0)
		stamp(argv[2], argv[3], strtoull(argv[4], NULL, 0));
	if (argc == 4 && strcmp(verb, "stamped") == 0)
		return (stamped(argv[2], strtoull(argv[3], NULL, 0)));
	fprintf(stderr, "wire: see the top of wire.c\n");
	return (64);
}
