/*
 * A server that is not root: init is born into a user namespace (user_namespaces(7)) that the job's other namespaces belong to, and
 * in which the job's one uid and gid are the server's own on the host. More ids would need the set-uid helpers of subuid(5).
 *
 * init writes the maps itself, before anything else; until then it is nobody, and nothing of the job is there.
 *
 * So init has the command's uid, and what keeps them apart is another: init is not dumpable, so that its memory, descriptors and
 * files in /proc are not the command's (ptrace(2), proc(5)); it keeps a capability that the command has not, which alone would do,
 * and which keeps its priority from the command too; the kernel lets nobody end a namespace's pid 1 from within; and the filter denies
 * to change its limits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "jobrunner.h"

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

/*
 * The maps. Without a helper an ordinary user may map one id, his own, and a gid only where setgroups(2) is given up: the groups that
 * he has besides, the job keeps. No user namespace is made below this one, which the filter denies as well.
 */
int map_ids(const struct plan *plan, struct report *why)
{
	char uids[64], gids[64];
	if (!plan->user_namespace)
		return 0;
	if (host_uid == 0)		/* a job is never root of the host */
		return fail(why, "userns", EPERM, "root");
	snprintf(uids, sizeof uids, "%lld %u 1\n", (long long)plan->uid, host_uid);
	snprintf(gids, sizeof gids, "%lld %u 1\n", (long long)plan->gid, host_gid);
	if (write_own(plan, "/proc/self/uid_map", uids, why) != 0 || write_own(plan, "/proc/self/setgroups", "deny", why) != 0 ||
	    write_own(plan, "/proc/self/gid_map", gids, why) != 0)
		return -1;
	return write_own(plan, "/proc/sys/user/max_user_namespaces", "0\n", why);
}
