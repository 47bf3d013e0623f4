/*
 * What a job may write to and what is kept: its work directory, and the volumes that its server gives it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "jobrunner.h"

#define PLAIN (MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)

/* Takes the mount. */
static int put_at(int root, const struct plan *plan, const char *path, int mount, const char *step, const char *source,
		  struct report *why)
{
	int target = mount < 0 ? -1 : plan_has_root(plan) ? make_directory(root, path) : open_inside(root, path);
	if (target < 0 || mount_put(mount, target) != 0)
		return fail(why, step, errno, source);
	close(target);
	close(mount);
	return 0;
}

int mount_work(int root, const struct plan *plan, struct report *why)
{
	/* The server's own until now, and so ours to give: what it is root for elsewhere. */
	if (plan->work && has_own_ids(plan) &&
	    fchownat(AT_FDCWD, plan->work, (uid_t)plan->uid, (gid_t)plan->gid, AT_SYMLINK_NOFOLLOW) != 0)
		return fail(why, "work", errno, plan->work);
	if (plan->work)
		return put_at(root, plan, "/work", mount_clone(AT_FDCWD, plan->work, PLAIN, false), "work", plan->work, why);
	if (plan->work_size >= 0)
		return put_at(root, plan, "/work", mount_tmpfs(plan->work_size, "0700", plan->uid, plan->gid), "work", "tmpfs", why);
	int place = plan_has_root(plan) ? make_directory(root, "/work") : -1;	/* empty, for who starts there */
	if (place >= 0)
		close(place);
	return 0;
}

int mount_volumes(int root, const struct plan *plan, struct report *why)
{
	for (int i = 0; i < plan->n_volumes; i++) {
		const struct volume *volume = &plan->volumes[i];
		char target[PATH_MAX];
		snprintf(target, sizeof target, "%.*s", volume->target_length, volume->target);
		int mount = mount_directory(volume->source, PLAIN | (volume->read_only ? MOUNT_ATTR_RDONLY : 0));
		if (mount >= 0 && idmap_volume(i, mount) != 0)
			return fail(why, "idmap", errno, volume->source);
		if (put_at(root, plan, target, mount, "volume", volume->source, why) != 0)
			return -1;
	}
	return 0;
}
