/*
 * Files of one owner that are another's: an id-mapped mount (mount_setattr(2)). What is `owner`'s on disk is the job's inside, and
 * what the job makes is `owner`'s on disk; everybody else's files are nobody's there, and can be neither written to nor made.
 *
 * The kernel takes the mapping from a user namespace. One is made by a child that does nothing else, and is mapped from here: before
 * the job's root is on "/", because the kernel makes none for a process whose root is not that of its mount namespace, and so by the
 * /proc of the host, in which the child has another number than here (the pidfd's fdinfo tells it, pidfd_open(2)).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jobrunner.h"

static int namespaces[MAX_VOLUMES];	/* by volume; -1: not mapped */

static int write_map(const char *process, const char *name, int64_t on_disk, int64_t inside)
{
	char path[64], line[64];
	snprintf(path, sizeof path, "%s/%s", process, name);
	int length = snprintf(line, sizeof line, "%lld %lld 1\n", (long long)on_disk, (long long)inside);
	int file = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t written = file < 0 ? -1 : write(file, line, (size_t)length);	/* whole or not at all: user_namespaces(7) */
	int error = errno;
	if (file >= 0)
		close(file);
	errno = error;
	return written == length ? 0 : -1;
}

/* The directory of a process in the /proc that is mounted. */
static int find_process(int pidfd, char process[32])
{
	char path[64], text[512];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = file < 0 ? -1 : read(file, text, sizeof text - 1);
	if (file >= 0)
		close(file);
	text[size > 0 ? size : 0] = '\0';
	const char *found = strstr(text, "\nPid:");
	int number = found ? atoi(found + 5) : 0;
	if (number <= 0) {
		errno = ESRCH;
		return -1;
	}
	snprintf(process, 32, "/proc/%d", number);
	return 0;
}

static int mapped_namespace(const struct plan *plan, const struct volume *volume)
{
	char process[32], path[64];
	int pidfd, namespace = -1;
	/*
	 * It is dumpable, unlike us: the namespaces of a process that is not are opened with CAP_SYS_PTRACE alone (ptrace(2)), which a
	 * container's root lacks. There is nobody yet in our PID namespace who could look at either.
	 */
	prctl(PR_SET_DUMPABLE, 1);
	pid_t child = spawn(CLONE_NEWUSER, -1, &pidfd);
	int failed = errno;
	prctl(PR_SET_DUMPABLE, child == 0);
	errno = failed;
	if (child < 0)
		return -1;
	if (child == 0)
		for (;;)
			pause();	/* it dies with us, by the end of this PID namespace, if not before */
	if (find_process(pidfd, process) == 0 && write_map(process, "uid_map", volume->uid, plan->uid) == 0 &&
	    write_map(process, "gid_map", volume->gid, plan->gid) == 0) {
		snprintf(path, sizeof path, "%s/ns/user", process);
		namespace = open(path, O_RDONLY | O_CLOEXEC);
	}
	int error = errno;
	send_signal(pidfd, SIGKILL);
	close(pidfd);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	errno = error;
	return namespace;
}

/* A volume whose files are the job's already, or stay whose they are, needs none. */
static bool needs_map(const struct plan *plan, const struct volume *volume)
{
	return volume->uid >= 0 && (volume->uid != plan->uid || volume->gid != plan->gid);
}

int idmap_prepare(const struct plan *plan, struct report *why)
{
	for (int i = 0; i < plan->n_volumes; i++) {
		const struct volume *volume = &plan->volumes[i];
		namespaces[i] = -1;
		if (!needs_map(plan, volume))
			continue;
		if (plan->uid < 0 || plan->gid < 0)
			return fail(why, "idmap", EINVAL, "no uid");
		namespaces[i] = mapped_namespace(plan, volume);
		if (namespaces[i] < 0)
			return fail(why, "idmap", errno, "user namespace");
	}
	return 0;
}

/* Map a volume's mount that is nowhere yet, and all below it. EINVAL: a file system of it cannot do that. */
int idmap_volume(int i, int mount)
{
	if (namespaces[i] < 0)
		return 0;
	struct mount_attr attributes = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)namespaces[i]};
	int result = (int)syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes);
	int error = errno;
	close(namespaces[i]);
	errno = error;
	return result;
}
