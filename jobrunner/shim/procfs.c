/*
 * /proc, /sys and the job's own cgroups, and everything that is hidden. What is hidden and what is read-only of /proc and /sys is what
 * runc does by default (its spec's maskedPaths and readonlyPaths, and those that Docker adds).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "jobrunner.h"

static const char *const MASKED[] = {
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
	"/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
};
static const char *const READ_ONLY[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"};
#define QUIET (MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)

/* What hides: put somewhere once, and cloned from there after that; a mount that is nowhere cannot be cloned before Linux 6.15. */
struct cover {
	int mount;
	bool put;
};

static int hide_by(struct cover *cover, int target)
{
	int mount = cover->put ? mount_clone(cover->mount, "", 0, false) : cover->mount;
	int result = mount < 0 ? -1 : mount_put(mount, target);
	if (cover->put && mount >= 0)
		close(mount);
	cover->put = cover->put || result == 0;
	return result;
}

/* Hides a file by /dev/null, a directory by an empty one. What is not there needs no hiding. */
static int mask(int root, const char *path, struct cover *file, struct cover *directory, const struct plan *plan, struct report *why)
{
	struct stat st;
	int target = open_inside(root, path);
	/* What an init that has the command's uid cannot reach, the command cannot either. */
	if (target < 0)
		return errno == ENOENT || errno == ENOTDIR || (errno == EACCES && plan->user_namespace) ? 0 : fail(why, "mask", errno, path);
	if (fstat(target, &st) != 0 || hide_by(S_ISDIR(st.st_mode) ? directory : file, target) != 0)
		return fail(why, "mask", errno, path);
	close(target);
	return 0;
}

static int make_read_only(int root, const char *path, struct report *why)
{
	int target = open_inside(root, path);
	if (target < 0)
		return errno == ENOENT || errno == ENOTDIR ? 0 : fail(why, "mask", errno, path);
	int mount = mount_clone(target, "", MOUNT_ATTR_RDONLY | QUIET, true);
	if (mount < 0 || mount_put(mount, target) != 0)
		return fail(why, "mask", errno, path);
	close(mount);
	close(target);
	return 0;
}

int mask_all(int root, const struct plan *plan, struct report *why)
{
	const bool proc = plan->protect & PROTECT_PROC;
	const struct mount_option none[] = {{"mode", "0555"}, {"size", "4k"}, {"nr_inodes", "2"}, {NULL, NULL}};
	if (!proc && !plan->n_mask)
		return 0;
	struct cover file = {.mount = mount_clone(AT_FDCWD, "/dev/null", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, false)};
	struct cover directory = {.mount = mount_new("tmpfs", none, QUIET | MOUNT_ATTR_RDONLY)};
	if (file.mount < 0 || directory.mount < 0)
		return fail(why, "mask", errno, "");
	for (int i = 0; i < plan->n_mask; i++)
		if (mask(root, plan->mask[i], &file, &directory, plan, why) != 0)
			return -1;
	for (size_t i = 0; proc && i < sizeof READ_ONLY / sizeof *READ_ONLY; i++)
		if (make_read_only(root, READ_ONLY[i], why) != 0)
			return -1;
	for (size_t i = 0; proc && i < sizeof MASKED / sizeof *MASKED; i++)
		if (mask(root, MASKED[i], &file, &directory, plan, why) != 0)
			return -1;
	close(file.mount);
	close(directory.mount);
	return 0;
}

/* A proc of the new PID namespace: the host's would show the host's processes. */
int mount_proc(int root, bool make, struct report *why)
{
	int target = make ? make_directory(root, "/proc") : open_inside(root, "/proc");
	int mount = mount_new("proc", NULL, QUIET);
	if (target < 0 || mount < 0 || mount_put(mount, target) != 0)
		return fail(why, "mount", errno, "/proc");
	close(target);
	close(mount);
	return 0;
}

/*
 * The job's own cgroups, so that programs find their limits: `NAME PATH`, at /sys/fs/cgroup/NAME, which is in `tmpfs`; "." is that
 * directory itself, and then there is none.
 */
static int show_cgroup(int root, int tmpfs, const char *view, struct report *why)
{
	char name[NAME_MAX];
	const char *path = strchr(view, ' ') + 1;
	snprintf(name, sizeof name, "%.*s", (int)(path - view) - 1, view);
	int mount = mount_clone(AT_FDCWD, path, QUIET | MOUNT_ATTR_RDONLY, false), target = -1;
	if (mount >= 0 && tmpfs < 0)
		target = open_inside(root, "/sys/fs/cgroup");
	else if (mount >= 0 && mkdirat(tmpfs, name, 0755) == 0)
		target = openat(tmpfs, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (target < 0 || mount_put(mount, target) != 0)
		return fail(why, "mount", errno, name);
	close(mount);
	close(target);
	return 0;
}

int mount_sys(int root, const struct plan *plan, struct report *why)
{
	const struct mount_option small[] = {{"mode", "0755"}, {"size", "64k"}, {"nr_inodes", "32"}, {NULL, NULL}};
	int target = make_directory(root, "/sys"), mount = mount_new("sysfs", NULL, QUIET | MOUNT_ATTR_RDONLY);
	/* A new sysfs shows a network namespace, and only to whose it is; the host's is not a user namespace's. */
	const bool clone = mount < 0 && errno == EPERM && plan->user_namespace && plan->network_host;
	if (clone)
		mount = mount_clone(AT_FDCWD, "/sys", QUIET | MOUNT_ATTR_RDONLY, true);
	if (target < 0 || mount < 0 || mount_put(mount, target) != 0)
		return fail(why, "mount", errno, "/sys");
	close(target);
	close(mount);
	if (plan->n_cgroup_views == 0 && !clone)
		return 0;
	/* v1 has a directory for each hierarchy, which sysfs has no place for; what was cloned has the host's. */
	int tmpfs = -1;
	if (plan->n_cgroup_views == 0 || plan->cgroup_views[0][0] != '.') {
		tmpfs = mount_new("tmpfs", small, QUIET);
		target = open_inside(root, "/sys/fs/cgroup");
		if (tmpfs < 0 || target < 0 || mount_put(tmpfs, target) != 0)
			return fail(why, "mount", errno, "/sys/fs/cgroup");
		close(target);
	}
	for (int i = 0; i < plan->n_cgroup_views; i++)
		if (show_cgroup(root, tmpfs, plan->cgroup_views[i], why) != 0)
			return -1;
	if (tmpfs >= 0 && mount_change(tmpfs, MOUNT_ATTR_RDONLY, 0) != 0)
		return fail(why, "mount", errno, "/sys/fs/cgroup");
	if (tmpfs >= 0)
		close(tmpfs);
	return 0;
}
