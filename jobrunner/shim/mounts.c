/*
 * Mounts by descriptor (Linux 5.2; mount_setattr(2) is of 5.12): what is mounted is whole, and has its flags, before it is anywhere,
 * and where it goes is a directory that was looked at and not a path that is looked up again.
 *
 * Called by number: libc has these calls since 2.36 only, and its <sys/mount.h> and the kernel's cannot both be included.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

/* A new file system that is nowhere yet; options end with a NULL key, a NULL value makes a flag. -1 and errno on failure. */
int mount_new(const char *type, const struct mount_option *options, unsigned int attributes)
{
	int mount = -1, fs = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
	if (fs < 0)
		return -1;
	for (; options && options->key; options++)
		if (syscall(SYS_fsconfig, fs, options->value ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG, options->key, options->value, 0))
			goto out;
	if (syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
		mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes);
out:;
	int error = errno;
	close(fs);
	errno = error;
	return mount;
}

int mount_change(int mount, uint64_t set, unsigned int flags)
{
	struct mount_attr attributes = {.attr_set = set};
	return (int)syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH | flags, &attributes, sizeof attributes);
}

/* A second mount of what is at `path` (of `dir` itself if it is empty), with everything below if `recursive`, that is nowhere yet. */
int mount_clone(int dir, const char *path, uint64_t attributes, bool recursive)
{
	const unsigned int below = recursive ? AT_RECURSIVE : 0, empty = *path ? 0 : AT_EMPTY_PATH;
	int mount = (int)syscall(SYS_open_tree, dir, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_SYMLINK_NOFOLLOW | below | empty);
	if (mount >= 0 && attributes && mount_change(mount, attributes, below) != 0) {
		int error = errno;
		close(mount);
		errno = error;
		return -1;
	}
	return mount;
}

/* Mount it on what `target` is open on. The descriptors stay open. */
int mount_put(int mount, int target)
{
	return (int)syscall(SYS_move_mount, mount, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* A path as a process would find it whose root this is: no link leads out of it. */
int open_in_root(int root, const char *path, uint64_t flags)
{
	struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
	return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

int open_inside(int root, const char *path)
{
	return open_in_root(root, path, O_PATH);
}

/*
 * A directory of the host's that a job gets: no name on the way to it is a link, because a job may have put it there. Nothing is mounted
 * but what was found, so nobody can change it in between.
 */
int mount_directory(const char *path, uint64_t attributes)
{
	struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS};
	int directory = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
	int mount = directory < 0 ? -1 : mount_clone(directory, "", attributes, true);
	int error = errno;
	if (directory >= 0)
		close(directory);
	errno = error;
	return mount;
}

/*
 * The directory `path` below `root`, made with those above it where it is not there. One name at a time, each in a directory that was
 * found inside: a link of the root's (a named root is anybody's) would lead mkdirat(2) out to the host, whose root is still ours.
 */
int make_directory(int root, const char *path)
{
	char partial[PATH_MAX];
	snprintf(partial, sizeof partial, "%s", path);
	int directory = root;
	for (char *name = partial + 1; name && directory >= 0;) {
		char *end = strchr(name, '/');
		if (end)
			*end = '\0';
		mkdirat(directory, name, 0755);		/* one that is there, or cannot be made, shows when it is opened */
		if (directory != root)
			close(directory);
		directory = open_inside(root, partial);
		if (end)
			*end = '/';
		name = end ? end + 1 : NULL;
	}
	return directory;
}

/* The same for a file, to mount another one on. */
int make_file(int root, const char *path)
{
	char above[PATH_MAX];
	const char *name = strrchr(path, '/') + 1;
	snprintf(above, sizeof above, "%.*s", (int)(name - 1 - path), path);
	int directory = *above ? make_directory(root, above) : open_inside(root, "/");
	if (directory < 0)
		return -1;
	int file = openat(directory, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0444);
	if (file >= 0)
		close(file);
	close(directory);
	return open_inside(root, path);
}
