/*
 * The root that a job sees, made by init in its own mount namespace while the host's is still its root, and entered at the end.
 *
 *   /                  an empty tmpfs, read-only in the end
 *   /usr /etc ...      what `show` lists of the host, or what `root` has: read-only, nosuid, nodev, with all that is mounted below;
 *                      with `writable` an overlay of it (overlay.c)
 *   /proc /sys         fresh (procfs.c)
 *   /dev               a few devices, terminals of its own (dev.c)
 *   /tmp /dev/shm      tmpfs of their own
 *   /work /volumes ... what may be written to and is kept (volume.c)
 *
 * Nothing else of the host is there: a read-only /run would still let a job connect to every socket in it. Without `show` and `root`
 * the job keeps the host's root, and what else was asked for is done there.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

#define SEALED (MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)

/* What is always the job's own, whatever a named root has there. */
static const char *const OWN[] = {"proc", "sys", "dev", "tmp", "work", "volumes", "workspace"};

/* What is at `source` (below `at`, itself if it is empty), with all that is mounted below. */
int show_sealed(int root, const char *path, int at, const char *source, bool directory, struct report *why)
{
	int mount = mount_clone(at, source, SEALED, true);
	int target = mount < 0 ? -1 : directory ? make_directory(root, path) : make_file(root, path);
	if (target < 0 || mount_put(mount, target) != 0)
		return fail(why, "root", errno, *source ? source : path);
	close(mount);
	close(target);
	return 0;
}

/* One entry of the host's at its place; what the host lacks is no loss. */
static int show(int root, const struct plan *plan, const char *path, const char *source, struct report *why)
{
	struct stat st;
	char link[PATH_MAX];
	if (lstat(source, &st) != 0)
		return errno == ENOENT || errno == ENOTDIR ? 0 : fail(why, "root", errno, source);
	if (S_ISLNK(st.st_mode)) {
		ssize_t length = readlink(source, link, sizeof link - 1);
		if (length < 0)
			return fail(why, "root", errno, source);
		link[length] = '\0';
		return symlinkat(link, root, path + 1) == 0 || errno == EEXIST ? 0 : fail(why, "root", errno, path);
	}
	if (plan->writable && S_ISDIR(st.st_mode))
		return overlay_show(root, plan, path, source, why);
	return show_sealed(root, path, AT_FDCWD, source, S_ISDIR(st.st_mode), why);
}

static bool is_own(const char *name)
{
	for (size_t i = 0; i < sizeof OWN / sizeof *OWN; i++)
		if (strcmp(name, OWN[i]) == 0)
			return true;
	return false;
}

/*
 * A named root, entry by entry: so the job's own directories need no place in it, and the directory itself is never written to.
 */
static int show_entries(int root, const struct plan *plan, struct report *why)
{
	const char *directory = plan->root;
	DIR *entries = opendir(directory);
	if (!entries)
		return fail(why, "root", errno, directory);
	int result = 0;
	for (struct dirent *entry; result == 0 && (entry = readdir(entries));) {
		char path[PATH_MAX], source[PATH_MAX];
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 || is_own(entry->d_name))
			continue;
		snprintf(path, sizeof path, "/%s", entry->d_name);
		if ((size_t)snprintf(source, sizeof source, "%s/%s", directory, entry->d_name) >= sizeof source)
			result = fail(why, "root", ENAMETOOLONG, directory);
		else
			result = show(root, plan, path, source, why);
	}
	closedir(entries);
	return result;
}

/* What programs look names up with is often a link into /run; with the host's network it has to lead somewhere. */
static int show_resolver(int root, const struct plan *plan, struct report *why)
{
	char source[PATH_MAX];
	if (!realpath("/etc/resolv.conf", source))
		return 0;
	int there = open_inside(root, source);
	if (there >= 0) {
		close(there);
		return 0;
	}
	return show(root, plan, source, source, why);
}

static int make_tmp(int root, const struct plan *plan, struct report *why)
{
	int target = plan_has_root(plan) ? make_directory(root, "/tmp") : open_inside(root, "/tmp");
	int mount = target < 0 ? -1 : mount_tmpfs(plan->tmp_size, "1777", -1, 0);
	if (mount < 0 || mount_put(mount, target) != 0)
		return fail(why, "mount", errno, "/tmp");
	close(mount);
	close(target);
	return 0;
}

static int make_sealed(struct report *why)
{
	const struct mount_option options[] = {{"mode", "0755"}, {"size", "4m"}, {"nr_inodes", "4096"}, {NULL, NULL}};
	int root = mount_new("tmpfs", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	/* On "/", over the host's root: so it is in the namespace, and nobody's root before it is entered. */
	int above = root < 0 ? -1 : open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (above < 0 || mount_put(root, above) != 0)
		return fail(why, "root", errno, "tmpfs");
	close(above);
	return root;
}

static int make_root(const struct plan *plan, struct report *why)
{
	int root = plan->writable ? overlay_begin(plan, why) : make_sealed(why);
	if (root < 0 || make_tmp(root, plan, why) != 0)	/* first: what is shown may be below it */
		return -1;
	int result = plan->root ? show_entries(root, plan, why) : 0;
	for (int i = 0; i < plan->n_show && result == 0; i++)
		result = show(root, plan, plan->show[i], plan->show[i], why);
	if (result == 0 && plan->network_host && plan->n_show)
		result = show_resolver(root, plan, why);
	return result == 0 ? root : -1;
}

/* Whether something is mounted over it: `..` of a root leads there. -1 if nobody can tell. */
static int is_covered(int root)
{
	struct statx own, above;
	if (statx(root, "", AT_EMPTY_PATH, STATX_MNT_ID, &own) != 0 || statx(root, "..", 0, STATX_MNT_ID, &above) != 0)
		return -1;
	if (!(own.stx_mask & above.stx_mask & STATX_MNT_ID)) {
		errno = ENOSYS;
		return -1;
	}
	return own.stx_mnt_id != above.stx_mnt_id;
}

/*
 * Enter it, and let go of the host's. Where pivot_root(2) is not allowed (a filter of a container's) or not possible (the root is the
 * kernel's first file system, which nothing is below) the host's root stays mounted under the job's own: out of reach without a
 * capability that no job has, and not gone.
 */
int enter_root(int root, struct report *why)
{
	int covered;
	if (fchdir(root) != 0)
		return fail(why, "pivot", errno, "");
	if (syscall(SYS_pivot_root, ".", ".") == 0) {
		/* Order: all that was on "/" is above it now, the last one topmost: an overlay's layers, and then the host's root. */
		while ((covered = is_covered(root)) > 0)
			if (syscall(SYS_umount2, ".", 2 /* MNT_DETACH */) != 0)
				return fail(why, "pivot", errno, "the old root");
		if (covered < 0)
			return fail(why, "pivot", errno, "the old root");
	} else if ((errno != EPERM && errno != EINVAL) || chroot(".") != 0) {
		return fail(why, "pivot", errno, "");
	}
	return chdir("/") == 0 ? 0 : fail(why, "pivot", errno, "/");
}

bool plan_has_root(const struct plan *plan)
{
	return plan->root || plan->n_show;
}

int private_root(const struct plan *plan, struct report *why)
{
	const bool own = plan_has_root(plan);
	if (plan->writable && !own)
		return fail(why, "overlay", EINVAL, "no root of the job's own");
	if (idmap_prepare(plan, why) != 0)	/* first */
		return -1;
	int root = own ? make_root(plan, why) : open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		return fail(why, "root", errno, "/");
	/* Order: while there is nothing but the root: a link of a named one must not lead init, who may all, into /proc or a volume. */
	if (name_user(root, plan, why) != 0 || mount_proc(root, own, why) != 0)
		return -1;
	if (own && (mount_sys(root, plan, why) != 0 || mount_dev(root, plan, why) != 0))
		return -1;
	if (!own && plan->tmp_size >= 0 && make_tmp(root, plan, why) != 0)
		return -1;
	if (mount_work(root, plan, why) != 0 || mount_volumes(root, plan, why) != 0 || mask_all(root, plan, why) != 0)
		return -1;
	if (plan->writable && overlay_end(root, plan, why) != 0)
		return -1;
	if (own && !plan->writable && mount_change(root, MOUNT_ATTR_RDONLY, 0) != 0)
		return fail(why, "root", errno, "read-only");
	if (own && enter_root(root, why) != 0)
		return -1;
	close(root);
	return 0;
}
