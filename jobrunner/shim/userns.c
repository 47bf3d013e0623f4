/*
 * A server that is not root: init is born into a user namespace (user_namespaces(7)) that the job's other namespaces belong to, and
 * which init's uid is the server's own on the host.
 *
 * With the set-uid helpers newuidmap(1) and newgidmap(1) the job has an id of its own, one of the server's user's subordinate ones
 * (subuid(5)), which is the same number inside and on the host; init is 0 inside. They are run by the shim; until they have been init
 * waits, and is nobody.
 *
 * Without them init writes the maps itself, of one uid and one gid, which are the server's own on the host. So init has the command's
 * uid then, and what keeps them apart is another: init is not dumpable, so that its memory, descriptors and
 * files in /proc are not the command's (ptrace(2), proc(5)); it keeps a capability that the command has not, which alone would do,
 * and which keeps its priority from the command too; the kernel lets nobody end a namespace's pid 1 from within; and the filter denies
 * to change its limits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jobrunner.h"

#define HELPER_NS (10000 * MS)
#define SHARE 8		/* of what the server's user has, one job may have so much: one in */

static uid_t host_uid;
static gid_t host_gid;

/* The flag that init is cloned with, if any. Called by its parent: inside, the host's ids cannot be told any more. */
uint64_t user_namespace(const struct plan *plan)
{
	host_uid = geteuid();
	host_gid = getegid();
	return plan->user_namespace ? CLONE_NEWUSER : 0;
}

/*
 * A file of one's own in /proc, to be written to. They are root's while one is not dumpable, so a process in a user namespace is for
 * as long as it opens one: there is nobody in its PID namespace yet but init and what becomes the command.
 */
int open_own(const struct plan *plan, const char *path)
{
	if (plan->user_namespace)
		prctl(PR_SET_DUMPABLE, 1);
	int file = open(path, O_WRONLY | O_CLOEXEC), error = errno;
	if (plan->user_namespace)
		prctl(PR_SET_DUMPABLE, 0);
	errno = error;
	return file;
}

static int write_own(const struct plan *plan, const char *path, const char *text, struct report *why)
{
	int file = open_own(plan, path);
	bool written = file >= 0 && write_all(file, text, strlen(text));
	int error = errno;
	if (file >= 0)
		close(file);
	return written ? 0 : fail(why, "userns", error, path);
}

bool has_own_ids(const struct plan *plan)
{
	return plan->uid_helper;
}

/* What a helper says on its standard error, until it closes it; false if it is not done in time. */
static bool hear_helper(int from, char *text, size_t size)
{
	const int64_t until = now_ns(CLOCK_BOOTTIME) + HELPER_NS;
	struct pollfd fd = {.fd = from, .events = POLLIN};
	size_t length = 0;
	for (;;) {
		if (poll_until(&fd, 1, until) <= 0)
			return false;
		ssize_t n = read(from, scratch, sizeof scratch);
		if (n == 0 || (n < 0 && errno != EINTR))
			break;
		for (ssize_t i = 0; i < n && length + 1 < size; i++)
			text[length++] = scratch[i];
	}
	text[length] = '\0';
	return true;
}

/* One map of init's: 0 is the server's own, and the job's id itself. */
static int run_helper(const char *helper, pid_t init, unsigned int own, int64_t id, struct report *why)
{
	char number[16], outside[16], job[24], text[200] = "";
	int told[2], status = -1, pidfd;
	snprintf(number, sizeof number, "%d", init);
	snprintf(outside, sizeof outside, "%u", own);
	snprintf(job, sizeof job, "%lld", (long long)id);
	char *const arguments[] = {(char *)helper, number, "0", outside, "1", job, job, "1", NULL};
	if (pipe2(told, O_CLOEXEC) != 0)
		return fail(why, "userns", errno, "pipe");
	pid_t pid = spawn(0, -1, &pidfd);
	if (pid == 0) {
		char *const environment[] = {NULL};
		dup2(told[1], STDERR_FILENO);
		execve(helper, arguments, environment);
		dprintf(STDERR_FILENO, "%s: %s", helper, strerror(errno));
		_exit(127);
	}
	close(told[1]);
	if (pid < 0) {
		close(told[0]);
		return fail(why, "userns", errno, helper);
	}
	const bool done = hear_helper(told[0], text, sizeof text);
	close(told[0]);
	if (!done)
		send_signal(pidfd, SIGKILL);
	close(pidfd);
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return !done ? fail(why, "userns", ETIMEDOUT, helper) : status == 0 ? 0 : fail(why, "userns", 0, *text ? text : helper);
}

int map_for(const struct plan *plan, pid_t init, struct report *why)
{
	return run_helper(plan->uid_helper, init, host_uid, plan->uid, why) != 0 ||
	       run_helper(plan->gid_helper, init, host_gid, plan->gid, why) != 0 ? -1 : 0;
}

/*
 * What the kernel counts by user it counts, in a user namespace, for the owner of that too: the server's own user, who needs an inotify
 * instance, and all his jobs. What a host lacks needs no bound.
 */
static int share_inotify(const struct plan *plan, struct report *why)
{
	static const char *const kinds[] = {"instances", "watches"};
	char path[64], share[24];
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		snprintf(path, sizeof path, "/proc/sys/fs/inotify/max_user_%s", kinds[i]);
		int file = open(path, O_RDONLY | O_CLOEXEC);
		const bool known = file >= 0 && read_text(file);
		if (file >= 0)
			close(file);
		if (!known)
			continue;
		snprintf(share, sizeof share, "%lld\n", atoll(scratch) / SHARE);
		snprintf(path, sizeof path, "/proc/sys/user/max_inotify_%s", kinds[i]);
		if (write_own(plan, path, share, why) != 0)
			return -1;
	}
	return 0;
}

/* The same of what is limited by process and counted by user. */
void share_limits(void)
{
	static const int shared[] = {RLIMIT_MSGQUEUE, RLIMIT_SIGPENDING};
	struct rlimit limit;
	for (size_t i = 0; i < sizeof shared / sizeof *shared; i++) {
		if (getrlimit((__rlimit_resource_t)shared[i], &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
			continue;
		limit.rlim_cur = limit.rlim_max = limit.rlim_cur / SHARE;
		setrlimit((__rlimit_resource_t)shared[i], &limit);
	}
}

/* No user namespace is made below this one, which the filter denies as well. */
static int bound_namespace(const struct plan *plan, struct report *why)
{
	return write_own(plan, "/proc/sys/user/max_user_namespaces", "0\n", why) != 0 ? -1 : share_inotify(plan, why);
}

/*
 * The maps. Without a helper an ordinary user may map one id, his own, and a gid only where setgroups(2) is given up: the groups that
 * he has besides, the job keeps.
 */
int map_ids(const struct plan *plan, struct report *why)
{
	char uids[64], gids[64];
	if (!plan->user_namespace)
		return 0;
	if (host_uid == 0)		/* a job is never root of the host */
		return fail(why, "userns", EPERM, "root");
	if (has_own_ids(plan)) {
		prctl(PR_SET_DUMPABLE, 0);	/* mapped by now */
		return bound_namespace(plan, why);
	}
	snprintf(uids, sizeof uids, "%lld %u 1\n", (long long)plan->uid, host_uid);
	snprintf(gids, sizeof gids, "%lld %u 1\n", (long long)plan->gid, host_gid);
	if (write_own(plan, "/proc/self/uid_map", uids, why) != 0 || write_own(plan, "/proc/self/setgroups", "deny", why) != 0 ||
	    write_own(plan, "/proc/self/gid_map", gids, why) != 0)
		return -1;
	return bound_namespace(plan, why);
}
