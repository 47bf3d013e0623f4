/* Small things that more than one process of a job needs. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

/* Keep the first failure; later ones follow from it. */
bool fail(struct failure *failure, const char *step, int error, const char *detail)
{
	if (!failure->step[0]) {
		snprintf(failure->step, sizeof failure->step, "%s", step);
		snprintf(failure->detail, sizeof failure->detail, "%s", detail);
		failure->error = error;
	}
	return false;
}

void say_failure(int fd, const struct failure *failure)
{
	char line[224];
	int size = snprintf(line, sizeof line, "failed %s %d %s\n", failure->step, failure->error, failure->detail);
	for (char *at = line; at < line + size - 1; at++)
		if (*at == '\n')
			*at = ' ';
	write_all(fd, line, (size_t)size);
}

_Noreturn void report_failure(int fd, const char *step, int error, const char *detail)
{
	struct failure failure = {0};
	fail(&failure, step, error, detail);
	say_failure(fd, &failure);
	_exit(127);
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

int64_t now_ns(int clock)
{
	struct timespec ts;
	clock_gettime(clock, &ts);
	return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* fork(2) into namespaces and a cgroup v2 directory (-1: none) in one step; the child is never anywhere else (clone3(2)). */
pid_t birth_of(uint64_t flags, int cgroup, int *pidfd)
{
	struct clone_args args = {.flags = flags, .exit_signal = SIGCHLD};
	if (pidfd) {
		args.flags |= CLONE_PIDFD;
		args.pidfd = (uint64_t)(uintptr_t)pidfd;
	}
	if (cgroup >= 0) {
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (uint64_t)cgroup;
	}
	return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* Writing 0 to `tasks` moves the calling thread and takes no RCU grace period, unlike a pid written to cgroup.procs. */
int enter_cgroups(const int *tasks, int count)
{
	for (int i = 0; i < count; i++)
		if (write(tasks[i], "0", 1) != 1)
			return i;
	return -1;
}

/*
 * Give back the pages of the program that only the birth needed: they are clean and the file's, so whatever is called again is mapped
 * again from the page cache. Of half a megabyte, this leaves a loop's few pages, for as long as the job runs.
 */
void forget_birth(void)
{
	extern char __executable_start, etext;
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t first = ((uintptr_t)&__executable_start + page - 1) & ~(page - 1), end = (uintptr_t)&etext & ~(page - 1);
	madvise((void *)first, end - first, MADV_DONTNEED);
}

void close_above(unsigned int first)
{
	syscall(SYS_close_range, first, ~0U, 0);
}
