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
 * list from its standard input, opens all that can be refused early, makes the shim, and hands on one line. It leaves at once when the
 * job was started, and after the shim when it was not: a start that failed leaves no process.
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
 *   1. launcher: list parsed; directory and cgroups opened (places.c)        nothing exists yet
 *   2. shim: enters its cgroups; `ctl` gets its name without replacing       whoever makes `ctl` owns the start; a server that
 *      (EEXIST: it is somebody else's, nothing in the directory is touched)  recovers may have been first
 *   3. shim: pipes; init is born in the job's cgroups, or enters them before anything else
 *   4. init: namespaces finished       shim, meanwhile: what it watches opened, the first segment of the log made, the exit record
 *                                      allocated and synced, so that a full disk cannot lose it
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
static int launch(struct plan *plan, struct places *places, struct report *why)
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
	if (plan_read(STDIN_FILENO, &plan, &why) == 0 && open_places(&plan, &places, &why) == 0 && counters_parse(&plan, &why) == 0)
		launch(&plan, &places, &why);
	_exit(tell_server(&why));
}
