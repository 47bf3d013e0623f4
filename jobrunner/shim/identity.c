/*
 * Who the command is, and what it may: a name in the root's passwd and group files, a keyring, a uid and gid, no capability.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

#define COPY ".copy"		/* in the job's own root, which nobody sees yet */

/*
 * The line, and what the root has; so that the line is what is found of two that are alike. The copy is for everybody to read, so
 * what is not is left out: in a named root the name may be a link to it, or a FIFO.
 */
static int make_copy(int root, int original, const char *line)
{
	struct stat st;
	int copy = openat(root, COPY, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0644);
	if (copy >= 0 && fchmod(copy, 0644) == 0 && write_all(copy, line, strlen(line)) && fstat(original, &st) == 0 &&
	    (!S_ISREG(st.st_mode) || !(st.st_mode & S_IROTH) || copy_all(original, copy)))
		return copy;
	if (copy >= 0)
		close(copy);
	return -1;
}

/* Into the file, where the root can be written to and the file with it; over it, read-only, otherwise. */
static int put_copy(int root, const char *path, int copy, int target, bool writable)
{
	int file = writable ? open_in_root(root, path, O_WRONLY | O_TRUNC | O_NONBLOCK) : -1;
	if (file >= 0) {
		const bool written = lseek(copy, 0, SEEK_SET) == 0 && copy_all(copy, file);
		close(file);
		return written ? 0 : -1;
	}
	int mount = mount_clone(copy, "", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, false);
	if (mount < 0 || mount_put(mount, target) != 0)
		return -1;
	close(mount);
	return 0;
}

/* A root without this file does without. */
static int add_line(int root, const char *path, const char *line, bool writable, struct report *why)
{
	int target = open_inside(root, path);
	if (target < 0)
		return errno == ENOENT || errno == ENOTDIR ? 0 : fail(why, "identity", errno, path);
	int original = open_in_root(root, path, O_RDONLY | O_NONBLOCK);	/* a FIFO is no trap */
	int copy = original < 0 ? -1 : make_copy(root, original, line);
	if (copy < 0 || put_copy(root, path, copy, target, writable) != 0)
		return fail(why, "identity", errno, path);
	unlinkat(root, COPY, 0);	/* now: what has no name cannot be mounted */
	const int fds[] = {copy, original, target};
	for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
		close(fds[i]);
	return 0;
}

int name_user(int root, const struct plan *plan, struct report *why)
{
	char line[256];
	if (!plan->user_name || !*plan->user_name || plan->uid < 0 || !plan_has_root(plan))
		return 0;
	snprintf(line, sizeof line, "%s:x:%lld:%lld:job:/work:/bin/sh\n", plan->user_name, (long long)plan->uid,
		 (long long)plan->gid);
	if (add_line(root, "/etc/passwd", line, plan->writable, why) != 0)
		return -1;
	snprintf(line, sizeof line, "%s:x:%lld:\n", plan->user_name, (long long)plan->gid);
	return add_line(root, "/etc/group", line, plan->writable, why);
}

/* A session keyring of the job's own, empty: what is in the server's is not to be had (session-keyring(7)). */
static int new_keyring(struct report *why)
{
	if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) >= 0)
		return 0;
	/* A kernel without keys, or a filter around us (Docker's) that lets nobody near them, the job neither. */
	return errno == ENOSYS || errno == EPERM ? 0 : fail(why, "keyring", errno, "");
}

/* While CAP_SETPCAP is still there: what is not in the bounding set cannot come from a file either (capabilities(7)). */
static int drop_bounding(struct report *why)
{
	unsigned long capability = 0;
	while (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0)
		capability++;
	return errno == EINVAL && capability ? 0 : fail(why, "capabilities", errno, "bounding set");	/* the kernel knows no more */
}

static int drop_capabilities(struct report *why)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	const struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};
	/* The ambient set goes with the permitted and inheritable ones. */
	return syscall(SYS_capset, &header, none) == 0 ? 0 : fail(why, "capabilities", errno, "");
}

/* The job's output is its own, so that it can be opened again by its path, /dev/stdout. */
int own_output(const struct birth *birth, struct report *why)
{
	const struct plan *plan = birth->plan;
	if (plan->uid < 0)
		return 0;
	for (int i = 0; i < 2; i++)
		if (fchown(birth->output[i], (uid_t)plan->uid, (gid_t)plan->gid) != 0)
			return fail(why, "pipe", errno, "owner");
	return 0;
}

/* Order: each step takes away what the one before it needed. */
int become_the_job(const struct plan *plan, struct report *why)
{
	/* Whose it is pays for it: root may have as many as there are jobs, an ordinary user 200 (kernel.keys.maxkeys). */
	const bool pays = has_own_ids(plan), keyring = plan->protect & PROTECT_KEYRING;
	if (keyring && !pays && new_keyring(why) != 0)
		return -1;
	if (plan->protect & PROTECT_CAPABILITIES && drop_bounding(why) != 0)
		return -1;
	if (plan->uid >= 0 && (!plan->user_namespace || has_own_ids(plan))) {	/* where one id is mapped there is no other */
		const uid_t uid = (uid_t)plan->uid;
		const gid_t gid = (gid_t)plan->gid;
		if (setgroups(0, NULL) != 0 || setresgid(gid, gid, gid) != 0 || setresuid(uid, uid, uid) != 0)
			return fail(why, "uid", errno, "");
	}
	if (keyring && pays && new_keyring(why) != 0)
		return -1;
	if (plan->protect & PROTECT_CAPABILITIES && drop_capabilities(why) != 0)
		return -1;
	if (plan->protect & PROTECT_NO_NEW_PRIVS && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		return fail(why, "no-new-privs", errno, "");
	return 0;
}
