/*
 * /dev as a job sees it: the devices that every program expects, terminals and message queues of its own, and nothing else of the
 * host's. The devices are mounted from the host's /dev: to make them is not allowed in a user namespace, nor to a container without
 * CAP_MKNOD.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "jobrunner.h"

static const char *const DEVICES[] = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"};
static const char *const LINKS[][2] = {{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
				       {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}};
#define QUIET (MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)

/* `bytes` -1: as much as tmpfs takes by itself, half of the memory. A file of each page, and as many empty ones, may be in it. */
int mount_tmpfs(int64_t bytes, const char *mode, int64_t uid, int64_t gid)
{
	char size[32], inodes[32], owner[32], group[32];
	struct mount_option options[] = {{"mode", mode}, {NULL, NULL}, {NULL, NULL}, {NULL, NULL}, {NULL, NULL}, {NULL, NULL}};
	int n = 1;
	if (bytes >= 0) {
		snprintf(size, sizeof size, "%lld", (long long)bytes);
		snprintf(inodes, sizeof inodes, "%lld", (long long)bytes / 2048 + 64);
		options[n++] = (struct mount_option){"size", size};
		options[n++] = (struct mount_option){"nr_inodes", inodes};
	}
	if (uid >= 0) {
		snprintf(owner, sizeof owner, "%lld", (long long)uid);
		snprintf(group, sizeof group, "%lld", (long long)gid);
		options[n++] = (struct mount_option){"uid", owner};
		options[n++] = (struct mount_option){"gid", group};
	}
	return mount_new("tmpfs", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
}

/* On a new directory of /dev. Takes the mount. */
static int put_below(int dev, const char *name, int mount, struct report *why)
{
	int target = -1;
	if (mount >= 0 && mkdirat(dev, name, 0755) == 0)
		target = openat(dev, name, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (target < 0 || mount_put(mount, target) != 0)
		return fail(why, "dev", errno, name);
	close(target);
	close(mount);
	return 0;
}

static int bind_device(int dev, const char *path, struct report *why)
{
	const char *name = path + sizeof "/dev/" - 1;
	int mount = mount_clone(AT_FDCWD, path, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, false);
	int target = mount < 0 ? -1 : openat(dev, name, O_CREAT | O_EXCL | O_RDONLY | O_CLOEXEC, 0666);
	if (target < 0 || mount_put(mount, target) != 0)
		return fail(why, "dev", errno, path);
	close(target);
	close(mount);
	return 0;
}

int mount_dev(int root, const struct plan *plan, struct report *why)
{
	const struct mount_option small[] = {{"mode", "0755"}, {"size", "64k"}, {"nr_inodes", "64"}, {NULL, NULL}};
	/* The kernel has some thousands for all: pty(7), /proc/sys/kernel/pty/max. */
	const struct mount_option terminals[] = {{"newinstance", NULL}, {"ptmxmode", "0666"}, {"mode", "0620"}, {"max", "128"},
						 {NULL, NULL}};
	int target = make_directory(root, "/dev"), dev = mount_new("tmpfs", small, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
	if (target < 0 || dev < 0 || mount_put(dev, target) != 0)
		return fail(why, "dev", errno, "/dev");
	close(target);
	for (size_t i = 0; i < sizeof DEVICES / sizeof *DEVICES; i++)
		if (bind_device(dev, DEVICES[i], why) != 0)
			return -1;
	for (size_t i = 0; i < sizeof LINKS / sizeof *LINKS; i++)
		if (symlinkat(LINKS[i][0], dev, LINKS[i][1]) != 0)
			return fail(why, "dev", errno, LINKS[i][1]);
	if (put_below(dev, "pts", mount_new("devpts", terminals, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC), why) != 0 ||
	    put_below(dev, "shm", mount_tmpfs(plan->tmp_size, "1777", -1, 0), why) != 0)
		return -1;
	int queues = mount_new("mqueue", NULL, QUIET);
	if (queues >= 0 && put_below(dev, "mqueue", queues, why) != 0)	/* a kernel may have none */
		return -1;
	if (mount_change(dev, MOUNT_ATTR_RDONLY, 0) != 0)
		return fail(why, "dev", errno, "read-only");
	close(dev);
	return 0;
}
