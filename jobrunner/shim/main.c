/*
 * jobrunner-shim: starts one job and stays with it.
 *
 * Theory of operation
 *
 *   server ── launcher ── shim ── init (pid 1 of the job) ── command
 *
 * One program, four processes, each forked from the one before; only the command is another program.
 *
 * The launcher is the server's child for a few milliseconds. It reads the item list from its standard input, opens what can be
 * refused early, makes the shim and waits for one line from it, which it hands on. It leaves at once when the job was started, and
 * after the shim when it was not: a start that failed leaves no process.
 *
 * The shim is the job's only supervisor and outlives the server. It holds nothing of the server's: no descriptor, no controlling
 * terminal, no cgroup. It copies the job's output into the log, is told what to do through the FIFO `ctl`, and alone signals: by
 * a pidfd, so that no pid number can come to mean somebody else.
 *
 * init is pid 1 of the job's PID namespace: when it is gone, so is every process in there, and the kernel has waited for them. It dies
 * with the shim (PR_SET_PDEATHSIG). It reaps, passes on signals that the shim asks for, and reports the command's wait status.
 *
 * Pipes
 *   report   shim -> launcher    one line: started, or failed STEP ERRNO DETAIL
 *   birth    init, command -> shim    one line in the same form; end-of-file after `ready`, which execve(2) makes by close-on-exec
 *   channel  shim <-> init       a socket pair of struct message
 *   stdout, stderr   job -> shim
 *   ctl      server -> shim      a FIFO; the shim holds its only reading end, so ENXIO and POLLERR tell of its death
 *
 * Order
 *   1. launcher: list parsed, directory and cgroups opened      nothing exists yet: failure is an answer
 *   2. shim: in its cgroups; `ctl` renamed into place without replacing; whoever makes `ctl` owns the start (recovery may be first)
 *   3. shim: log, pipes; init born into the job's cgroups, or entering them before its first other act
 *   4. init: namespaces finished; command forked: limits, directory, READY, execve
 *   5. shim, meanwhile: exit record allocated and synced, so that a full disk cannot lose it
 *   6. shim: READY and end-of-file read: `started` is reported
 * From 6 on failure may no longer exit: whatever goes wrong (a full disk, a lost server, a broken ctl), the shim goes on until
 * init is gone, and tells in the exit record what it knows.
 *
 * End: init is gone -> pipes read until they are empty -> counters -> log synced -> exit record, synced -> END in the log -> exit.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shim.h"

#define MAX_LIST (4 << 20)

/* Failing here is an answer to the server. */
static _Noreturn void refuse(const struct failure *failure)
{
	say_failure(STDOUT_FILENO, failure);
	_exit(1);
}

static char *read_list(size_t *size, struct failure *failure)
{
	struct stat st;
	if (fstat(STDIN_FILENO, &st) != 0 || st.st_size <= 0 || st.st_size > MAX_LIST) {
		fail(failure, "args", 0, "standard input is no item list");
		return NULL;
	}
	*size = (size_t)st.st_size;
	/* Private and writable, so that the parser may cut strings; its own copy, so that nobody changes it meanwhile. */
	char *list = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (list == MAP_FAILED) {
		fail(failure, "args", errno, "");
		return NULL;
	}
	for (size_t done = 0; done < *size;) {
		ssize_t n = pread(STDIN_FILENO, list + done, *size - done, (off_t)done);
		if (n <= 0) {
			fail(failure, "args", n < 0 ? errno : 0, "standard input is no item list");
			return NULL;
		}
		done += (size_t)n;
	}
	return list;
}

static int open_place(const char *path, int flags, const char *step, struct failure *failure)
{
	int fd = open(path, flags | O_CLOEXEC);
	if (fd < 0)
		fail(failure, step, errno, path);
	return fd;
}

static void open_places(const struct plan *plan, struct places *places, struct failure *failure)
{
	places->dir = open_place(plan->dir, O_RDONLY | O_DIRECTORY, "args", failure);
	places->cgroup2_shim = places->cgroup2_job = -1;
	if (plan->cgroup2_shim)
		places->cgroup2_shim = open_place(plan->cgroup2_shim, O_RDONLY | O_DIRECTORY, "cgroup", failure);
	if (plan->cgroup2_job)
		places->cgroup2_job = open_place(plan->cgroup2_job, O_RDONLY | O_DIRECTORY, "cgroup", failure);
	for (int i = 0; i < plan->n_cgroup1_shim; i++)
		places->cgroup1_shim[i] = open_place(plan->cgroup1_shim[i], O_WRONLY, "cgroup", failure);
	for (int i = 0; i < plan->n_cgroup1_job; i++)
		places->cgroup1_job[i] = open_place(plan->cgroup1_job[i], O_WRONLY, "cgroup", failure);
}

/* Standard descriptors that are closed would be given to the next file opened. */
static void fill_standard_descriptors(void)
{
	int fd;
	do
		fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd > STDERR_FILENO)
		close(fd);
}

int main(void)
{
	static struct plan plan;
	static struct places places;
	struct failure failure = {0};
	size_t size = 0;

	signal(SIGPIPE, SIG_IGN);
	fill_standard_descriptors();
	close_above(STDERR_FILENO + 1);
	char *list = read_list(&size, &failure);
	if (!list || parse_plan(list, size, &plan, &failure) != 0)
		refuse(&failure);
	open_places(&plan, &places, &failure);
	if (failure.step[0])
		refuse(&failure);

	int report[2];
	if (pipe2(report, O_CLOEXEC) != 0) {
		fail(&failure, "pipe", errno, "");
		refuse(&failure);
	}
	pid_t shim = birth_of(0, places.cgroup2_shim, NULL);
	if (shim == 0) {
		close(report[0]);
		shim_main(&plan, &places, report[1], list, size);
	}
	if (shim < 0) {
		fail(&failure, "clone", errno, "shim");
		refuse(&failure);
	}
	close(report[1]);

	char line[256];
	size_t length = 0;
	ssize_t n;
	while ((n = read(report[0], line + length, sizeof line - length)) > 0 || (n < 0 && errno == EINTR))
		length += n > 0 ? (size_t)n : 0;
	bool started = length == 8 && memcmp(line, "started\n", 8) == 0;
	if (!started)
		waitpid(shim, NULL, 0);
	if (length)
		write_all(STDOUT_FILENO, line, length);
	_exit(started ? 0 : 1);
}
