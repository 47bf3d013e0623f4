/*
 * jobrunner-shim: starts one job and stays with it.
 *
 * Theory of operation
 *
 *   server ── launcher ── shim ── init (pid 1 of the job) ── command
 *
 * One program, four processes, each made by the one before; only the command is another program.
 *
 * The launcher (this file) is the server's child for a few milliseconds. It waits until the job's record is durable, reads the item
 * list from its standard input, opens all that can be refused early, makes the shim, and hands on one line. It leaves at once when the job was started, and after the shim
 * when it was not: a start that failed leaves no process.
 *
 * The shim (shim.c, supervise.c, copy.c, ctl.c) is the job's only supervisor and outlives the server, of which it holds nothing: no
 * descriptor, no terminal, no cgroup. It copies the job's output into the log (log.c), in a thread of its own, because a disk may
 * stall; it is told through the FIFO `ctl`, and alone signals, by a pidfd, so that no number can come to mean somebody else.
 *
 * init (init.c, userns.c, isolate.c, and root.c, overlay.c, dev.c, procfs.c, volume.c for what the job sees) is pid 1 of the job's PID
 * namespace: when it is gone so is every process in there, and the kernel has waited for them. It dies with the shim. It reaps, passes
 * on the one signal that the shim asks for, and tells the command's end.
 *
 * Pipes
 *   stdout    server <-> launcher         socket: one byte when the record is durable, then the launcher's line
 *   answer    shim -> launcher            struct report: STARTED or FAILED
 *   report    init, command -> shim       struct report: READY or FAILED; its end-of-file after READY is execve's close-on-exec
 *   channel   shim <-> init               socket pair of struct message; its hang-up tells each of the other's death
 *   output    job -> shim                 stdout and stderr, or one pipe for both
 *   ctl       server -> shim              FIFO; the shim has its only reading end, so ENXIO and POLLERR tell of its death
 *
 * Order, and who may still fail
 *   1. launcher: list parsed; directory, cgroups, counters opened            nothing exists yet
 *   2. shim: enters its cgroups; `ctl` gets its name without replacing       whoever makes `ctl` owns the start; a server that
 *      (EEXIST: it is somebody else's, nothing in the directory is touched)  recovers may have been first
 *   3. shim: first segment of the log, pipes; init is born in the job's cgroups, or enters them before anything else
 *   4. init: namespaces finished       shim, meanwhile: exit record allocated and synced, so that a full disk cannot lose it
 *   5. shim: GO                        until here nothing of the job has run
 *   6. init: makes the command (command.c): descriptors, limits, keyring, uid, capabilities, no_new_privs (identity.c), directory,
 *      filter of system calls (seccomp.c), READY, execve
 *   7. shim: READY and end-of-file heard, STARTED is told
 * From 7 on failure may no longer exit: whatever goes wrong (full disk, no server, no launcher to tell), the shim goes on until
 * init is gone, and records what it knows.
 *
 * The end: init is gone -> what is left in the pipes -> counters -> log synced -> exit record, synced -> END in the log -> exit.
 * If the shim is killed, init dies of it, and the directory says so: `ctl` without a reader and a record that says `running`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jobrunner.h"

/* Standard descriptors that are closed would be given to the next file that is opened. */
static void fill_standard_descriptors(void)
{
	int fd;
	do
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd <= STDERR_FILENO);
	close_from(STDERR_FILENO + 1);
}

static int open_at(int dir, const char *path, int flags, const char *step, struct report *why)
{
	int fd = openat(dir, path, flags | O_CLOEXEC);
	if (fd < 0)
		fail(why, step, errno, path);
	return fd;
}

/* The v1 memory.oom_control, and beside it the file that events are asked for in. */
static void open_oom_control(const char *path, struct places *places, struct report *why)
{
	char control[4096];
	snprintf(control, sizeof control, "%.*s/cgroup.event_control", (int)(strrchr(path, '/') - path), path);
	places->oom_control = open_at(AT_FDCWD, path, O_RDONLY, "cgroup", why);
	places->event_control = open_at(AT_FDCWD, control, O_WRONLY, "cgroup", why);
}

static int open_places(const struct plan *plan, struct places *places, struct report *why)
{
	const int directory = O_RDONLY | O_DIRECTORY;
	places->null = open_at(AT_FDCWD, "/dev/null", O_RDWR, "pipe", why);
	places->dir = open_at(AT_FDCWD, plan->dir, directory, "args", why);
	if (places->dir >= 0)
		places->log = open_at(places->dir, "log", directory, "log", why);
	places->cgroup2_shim = places->cgroup2_job = places->oom_control = places->event_control = places->oom_events = -1;
	if (plan->cgroup2_shim)
		places->cgroup2_shim = open_at(AT_FDCWD, plan->cgroup2_shim, directory, "cgroup", why);
	if (plan->cgroup2_job)
		places->cgroup2_job = open_at(AT_FDCWD, plan->cgroup2_job, directory, "cgroup", why);
	for (int i = 0; i < plan->n_cgroup1_shim; i++)
		places->cgroup1_shim[i] = open_at(AT_FDCWD, plan->cgroup1_shim[i], O_WRONLY, "cgroup", why);
	for (int i = 0; i < plan->n_cgroup1_job; i++)
		places->cgroup1_job[i] = open_at(AT_FDCWD, plan->cgroup1_job[i], O_WRONLY, "cgroup", why);
	if (plan->oom_control)
		open_oom_control(plan->oom_control, places, why);
	if (plan->oom_events)
		places->oom_events = open_at(AT_FDCWD, plan->oom_events, O_RDONLY, "cgroup", why);
	for (int i = 0; i < plan->n_cpu_quotas; i++) {
		places->cpu_quotas[places->n_cpu_quotas++] = open_at(AT_FDCWD, plan->cpu_quotas[i], O_WRONLY, "cgroup", why);
		places->no_quota = strstr(plan->cpu_quotas[i], "/cpu.max") ? "max" : "-1";	/* v2, v1 */
	}
	for (int i = 0; i < plan->n_io_limits; i++)
		places->io_limits[places->n_io_limits++] = open_at(AT_FDCWD, plan->io_limits[i], O_RDWR, "cgroup", why);
	return why->kind == REPORT_FAILED ? -1 : 0;
}

/*
 * What the shim says; false if it died before it said anything. Its death is watched too, and not only the end of file: a child of
 * its own, stuck in its first instructions, may still hold the other end.
 */
static bool hear_shim(int answer, int shim, struct report *heard)
{
	struct pollfd fds[] = {{.fd = answer, .events = POLLIN}, {.fd = shim, .events = POLLIN}};
	const struct timespec at_once = {0};
	while (ppoll(fds, 2, NULL, NULL) < 0)
		;
	/* Order: it may have said something and died between the looks at the two; what it said is there now. */
	if (!fds[0].revents)
		ppoll(fds, 1, &at_once, NULL);
	return fds[0].revents && hear(answer, heard);
}

static int wait_for(int pidfd)
{
	siginfo_t info = {0};
	while (waitid(P_PIDFD, (id_t)pidfd, &info, WEXITED) != 0 && errno == EINTR)
		;
	return info.si_code == CLD_EXITED ? 0 : info.si_status;
}

/* 0 if the job was started. */
static int launch(struct plan *plan, const struct places *places, struct report *why)
{
	int answer[2], shim = -1;
	if (pipe2(answer, O_CLOEXEC) != 0)
		return fail(why, "pipe", errno, "");
	pid_t pid = spawn(0, places->cgroup2_shim, &shim);
	if (pid == 0) {
		close(answer[0]);
		close(shim);
		shim_main(plan, places, answer[1]);
	}
	if (pid < 0)
		return spawn_failed(places->cgroup2_shim, plan->cgroup2_shim, "shim", why);
	close(answer[1]);
	struct report heard = {0};
	if (hear_shim(answer[0], shim, &heard) && heard.kind == REPORT_STARTED)
		return 0;
	int signal = wait_for(shim);
	if (heard.kind == REPORT_FAILED)
		return fail(why, heard.step, heard.error, heard.detail);
	snprintf(heard.detail, sizeof heard.detail, "the job's shim died of signal %d", signal);
	return fail(why, "init", 0, heard.detail);
}

/* One line, whatever a path in it contains. A server that is gone is no reason to do anything about the job. */
int tell_server(const struct report *why)
{
	char line[sizeof *why + 64] = "started\n";
	if (why->kind == REPORT_FAILED) {
		int length = snprintf(line, sizeof line, "failed %s %d %s", why->step, why->error, why->detail);
		for (char *at = line; *at; at++)
			if ((unsigned char)*at < ' ' || *at == 0x7f)
				*at = '?';
		line[length] = '\n';
		line[length + 1] = '\0';
	}
	write_all(STDOUT_FILENO, line, strlen(line));
	return why->kind == REPORT_FAILED ? 1 : 0;
}

/* The list is written, and the job's record is on the disk. A server that is gone says nothing more. */
static bool is_let_go(void)
{
	char go;
	ssize_t n;
	while ((n = read(STDOUT_FILENO, &go, 1)) < 0 && errno == EINTR)
		;
	return n == 1;
}

int main(int argc, char **argv)
{
	static struct plan plan;
	static struct places places;
	struct report why = {0};

	signal(SIGPIPE, SIG_IGN);
	fill_standard_descriptors();
	if (argc == 2 && strcmp(argv[1], "probe") == 0) {
		probe_all();
		_exit(0);
	}
	if (argc == 2 && strcmp(argv[1], "wait") == 0 && !is_let_go())
		_exit(1);
	if (plan_read(STDIN_FILENO, &plan, &why) == 0 && open_places(&plan, &places, &why) == 0 && counters_open(&plan, &why) == 0)
		launch(&plan, &places, &why);
	_exit(tell_server(&why));
}
