/* Small things that more than one process of a job needs. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

char scratch[SCRATCH_SIZE];

int64_t now_ns(clockid_t clock)
{
	struct timespec ts;
	clock_gettime(clock, &ts);
	return (int64_t)ts.tv_sec * 1000 * MS + ts.tv_nsec;
}

/* ppoll(2) until a time of CLOCK_BOOTTIME; 0 when it has come, and not because of a signal. */
int poll_until(struct pollfd *fds, nfds_t count, int64_t until)
{
	for (;;) {
		const int64_t now = now_ns(CLOCK_BOOTTIME), rest = until > now ? until - now : 0;
		const struct timespec timeout = {rest / (1000 * MS), rest % (1000 * MS)};
		const int ready = ppoll(fds, count, until == NEVER ? NULL : &timeout, NULL);
		if (ready >= 0 || errno != EINTR)
			return ready;
	}
}

/* Always -1. Only the first failure is kept: what fails after it follows from it. */
int fail(struct report *why, const char *step, int error, const char *detail)
{
	if (why->kind != REPORT_FAILED) {
		*why = (struct report){.kind = REPORT_FAILED, .error = error};
		snprintf(why->step, sizeof why->step, "%s", step);
		snprintf(why->detail, sizeof why->detail, "%s", detail);
	}
	return -1;
}

bool write_all(int fd, const void *data, size_t size)
{
	const char *at = data;
	while (size) {
		ssize_t n = write(fd, at, size);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		at += n;
		size -= (size_t)n;
	}
	return true;
}

/* The whole file in `scratch`, as text; false if it cannot be read. */
bool read_text(int fd)
{
	size_t size = 0;
	ssize_t n;
	while ((n = pread(fd, scratch + size, sizeof scratch - 1 - size, (off_t)size)) > 0)
		size += (size_t)n;
	scratch[size] = '\0';
	return n == 0;
}

/* What is left of a file, through `scratch`. */
bool copy_all(int from, int to)
{
	ssize_t n;
	while ((n = read(from, scratch, sizeof scratch)) > 0 || (n < 0 && errno == EINTR))
		if (n > 0 && !write_all(to, scratch, (size_t)n))
			return false;
	return n == 0;
}

/* CRC-32 of IEEE 802.3, bit by bit: it is taken of a few bytes, beside system calls. */
uint32_t crc32_of(const void *data, size_t size)
{
	uint32_t crc = UINT32_MAX;
	for (const uint8_t *at = data; size--; at++) {
		crc ^= *at;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
	}
	return ~crc;
}

bool say(int fd, const struct report *report)
{
	return write_all(fd, report, sizeof *report);
}

/* The next report; false at end-of-file. */
bool hear(int fd, struct report *report)
{
	ssize_t n;
	do
		n = read(fd, report, sizeof *report);
	while (n < 0 && errno == EINTR);
	return n == (ssize_t)sizeof *report;
}

/*
 * A child in new namespaces and in a cgroup v2 directory (-1: the parent's) from its first instruction on (clone3(2)). Without
 * CLONE_VM this is fork(2) by another name; called directly because libc has no such call.
 */
pid_t spawn(uint64_t flags, int cgroup2, int *pidfd)
{
	struct clone_args args = {.flags = flags | CLONE_PIDFD, .exit_signal = SIGCHLD, .pidfd = (uint64_t)(uintptr_t)pidfd};
	if (cgroup2 >= 0) {
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (uint64_t)cgroup2;
	}
	return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* A clone3 that failed: CLONE_INTO_CGROUP has errors of its own, the others say that there may be no child. */
int spawn_failed(int cgroup2, const char *path, const char *what, struct report *why)
{
	const int error = errno;
	const bool refused = error == EBADF || error == EBUSY || error == EOPNOTSUPP || error == EACCES || error == ENODEV;
	return cgroup2 >= 0 && refused ? fail(why, "cgroup", error, path) : fail(why, "clone", error, what);
}

/* `0` in a v1 `tasks` file moves the writer itself and waits for no RCU grace period, as a pid in cgroup.procs would. */
int enter_cgroups(const int *tasks, char const *const *paths, int count, struct report *why)
{
	for (int i = 0; i < count; i++)
		if (write(tasks[i], "0", 1) != 1)
			return fail(why, "cgroup", errno, paths[i]);
	return 0;
}

int send_signal(int pidfd, int signal)
{
	return (int)syscall(SYS_pidfd_send_signal, pidfd, signal, NULL, 0);
}

/*
 * Give back the pages of the program that only the birth needed. They are the file's and clean: what is called again comes from the
 * page cache. It leaves a loop's few pages of half a megabyte, for as long as the job runs.
 */
void forget_birth(void)
{
	extern char __executable_start, etext;
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t first = ((uintptr_t)&__executable_start + page - 1) & -page, end = (uintptr_t)&etext & -page;
	madvise((void *)first, end - first, MADV_DONTNEED);
}

void close_from(unsigned int first)
{
	syscall(SYS_close_range, first, ~0U, 0);
}
