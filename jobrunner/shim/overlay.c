/*
 * A root that can be written to, and of which nothing is kept: an overlay (the kernel's Documentation/filesystems/overlayfs.rst) over
 * each directory that is shown, with the upper layers on one tmpfs, beside what the root has of its own.
 *
 * Nothing on disk is mapped to the job's uid. It would be the owner of all that is root's then, /etc/shadow and every key of mode 0600
 * with it, and no list of masks could follow what the host makes while the job runs. To a file on disk the job stays the stranger that
 * it is without an overlay. What it owns is in the upper layer, made before it is born: each directory that everybody may list and
 * enter is there once more, as the job's own. So it may make what it likes in it, and remove, rename and replace what is there. Files
 * of /etc that everybody may read are there as copies, because these are appended to rather than replaced. Whatever is closed to
 * everybody is in no upper layer, and what is below it neither.
 *
 * It costs a walk over the directories, which the job pays for: it is in its cgroups by now.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

#define PLAIN (MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
#define OPEN_TO_ALL (S_IROTH | S_IXOTH)
#define MAX_DEPTH 128		/* two descriptors each; what is deeper stays read-only */
#define MAX_COPY (1 << 20)	/* bytes of a file of /etc; larger ones can be replaced as files elsewhere can */
#define MOST_INODES "4194304"	/* while the layers are made; then what is used, and the share of the size that tmpfs has in a job */

static int layers = -1;		/* the tmpfs that they are on; nobody has a path to it once the root is entered */
static int n_layers;
static char *mounts;		/* the host's, as mountinfo tells them */

static int make_own(int directory, const char *name, mode_t mode, const struct plan *plan)
{
	if (mkdirat(directory, name, mode) != 0)
		return -1;
	return plan->uid < 0 ? 0 : fchownat(directory, name, (uid_t)plan->uid, (gid_t)plan->gid, AT_SYMLINK_NOFOLLOW);
}

static int give_open(int fd, const struct plan *plan)
{
	return plan->uid < 0 ? 0 : fchown(fd, (uid_t)plan->uid, (gid_t)plan->gid);
}

/* What is on the same mount: what is mounted here has a layer of its own. */
static int open_here(int directory, const char *name, uint64_t flags)
{
	struct open_how how = {.flags = flags | O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, .resolve = RESOLVE_NO_XDEV};
	return (int)syscall(SYS_openat2, directory, name, &how, sizeof how);
}

/* Another mount, what was removed meanwhile, what may not even be opened: read-only to the job as it is. */
static bool is_passed_over(int error)
{
	return error == EXDEV || error == ENOENT || error == ENOTDIR || error == ELOOP || error == EACCES;
}

static int copy_file(int lower, int upper, const char *name, const struct plan *plan)
{
	struct stat st;
	int from = open_here(lower, name, 0), to = -1, result = -1;
	if (from < 0)
		return is_passed_over(errno) ? 0 : -1;
	if (fstat(from, &st) != 0 || !S_ISREG(st.st_mode) || !(st.st_mode & S_IROTH) || st.st_size > MAX_COPY) {
		close(from);
		return 0;
	}
	to = openat(upper, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, (st.st_mode & 0777) | S_IRUSR | S_IWUSR);
	const struct timespec times[2] = {st.st_atim, st.st_mtim};
	if (to >= 0 && copy_all(from, to) && give_open(to, plan) == 0)
		result = futimens(to, times);
	const int error = errno;
	close(from);
	if (to >= 0)
		close(to);
	errno = error;
	return result;
}

static int fill_layer(int lower, int upper, bool files, int depth, const struct plan *plan);

/* A directory of the lower layer in the upper one, and all below it. */
static int fill_below(int lower, int upper, const char *name, bool files, int depth, const struct plan *plan)
{
	struct stat st;
	int below = open_here(lower, name, O_DIRECTORY), own = -1, result = -1;
	if (below < 0)
		return is_passed_over(errno) ? 0 : -1;
	if (fstat(below, &st) != 0 || (st.st_mode & OPEN_TO_ALL) != OPEN_TO_ALL || depth == MAX_DEPTH) {
		close(below);
		return 0;
	}
	if (mkdirat(upper, name, (st.st_mode & 0777) | S_IRWXU) == 0)
		own = openat(upper, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	/* Order: its time last, or it would be that of its last entry; caches of fonts go by it. Two links: no directory is in it. */
	const struct timespec times[2] = {st.st_atim, st.st_mtim};
	if (own >= 0 && give_open(own, plan) == 0 &&
	    ((st.st_nlink == 2 && !files) || fill_layer(below, own, files, depth + 1, plan) == 0))
		result = futimens(own, times);
	const int error = errno;
	close(below);
	if (own >= 0)
		close(own);
	errno = error;
	return result;
}

static int fill_layer(int lower, int upper, bool files, int depth, const struct plan *plan)
{
	const int again = fcntl(lower, F_DUPFD_CLOEXEC, 0);
	DIR *entries = again < 0 ? NULL : fdopendir(again);
	int result = entries ? 0 : -1;
	for (struct dirent *entry; result == 0 && (entry = readdir(entries));) {
		unsigned char type = entry->d_type;
		struct stat st;
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		if (type == DT_UNKNOWN && fstatat(lower, entry->d_name, &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) == 0)
			type = IFTODT(st.st_mode);
		if (type == DT_DIR)
			result = fill_below(lower, upper, entry->d_name, files, depth, plan);
		else if (type == DT_REG && files)
			result = copy_file(lower, upper, entry->d_name, plan);
	}
	const int error = errno;
	if (entries)
		closedir(entries);
	errno = error;
	return result;
}

/* By descriptor, because a path may have characters that the options of an overlay give a meaning to. */
static int mount_overlay(int lower, int upper, int work, const struct plan *plan)
{
	char paths[3][32];
	const int fds[3] = {lower, upper, work};
	for (int i = 0; i < 3; i++)
		snprintf(paths[i], sizeof paths[i], "/proc/self/fd/%d", fds[i]);
	/* Whatever the kernel was built with, no directory is moved from where a mask or a mode holds it. The attributes in which an
	 * overlay takes its notes are the host's root's otherwise. */
	const struct mount_option options[] = {{"lowerdir", paths[0]}, {"upperdir", paths[1]}, {"workdir", paths[2]},
					       {"redirect_dir", "nofollow"}, {"metacopy", "off"}, {"index", "off"},
					       {plan->user_namespace ? "userxattr" : NULL, NULL}, {NULL, NULL}};
	return mount_new("overlay", options, PLAIN);
}

/* The next layer's directory of this kind, open; -1 and errno. */
static int new_layer(const char *kind, mode_t mode, const struct plan *plan)
{
	char name[32];
	snprintf(name, sizeof name, "%s%d", kind, n_layers);
	return make_own(layers, name, mode, plan) != 0 ? -1 : openat(layers, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* One mount of the host's, open at `lower`, at `path`. */
static int cover(int root, const struct plan *plan, const char *path, int lower, mode_t mode)
{
	const bool files = strcmp(path, "/etc") == 0 || strncmp(path, "/etc/", 5) == 0;
	int upper = new_layer("upper", (mode & 0777) | S_IRWXU, plan), work = new_layer("work", S_IRWXU, plan);
	int mount = -1, target = -1;
	n_layers++;
	if (upper >= 0 && work >= 0 && fill_layer(lower, upper, files, 0, plan) == 0)
		mount = mount_overlay(lower, upper, work, plan);
	if (mount >= 0)
		target = make_directory(root, path);
	const int result = target < 0 ? -1 : mount_put(mount, target);
	const int error = errno, fds[] = {upper, work, mount, target};
	for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	errno = error;
	return result;
}

/* A directory that is open to all gets a layer, everything else is as in a root that cannot be written to. Takes `place`. */
static int show_mount(int root, const struct plan *plan, const char *path, int place, struct report *why)
{
	struct stat st;
	int lower = -1, result;
	if (fstat(place, &st) != 0) {
		result = fail(why, "overlay", errno, path);
	} else if (!S_ISDIR(st.st_mode) || (st.st_mode & OPEN_TO_ALL) != OPEN_TO_ALL) {
		result = show_sealed(root, path, place, "", S_ISDIR(st.st_mode), why);
	} else {
		lower = openat(place, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		result = lower < 0 ? -1 : cover(root, plan, path, lower, st.st_mode);
		if (result != 0)
			fail(why, "overlay", errno, path);
	}
	close(place);
	if (lower >= 0)
		close(lower);
	return result;
}

/* -1 and ENOENT if it is not there any more. */
static int open_place(const char *source, uint64_t resolve)
{
	struct open_how how = {.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC, .resolve = resolve};
	int place = (int)syscall(SYS_openat2, AT_FDCWD, source, &how, sizeof how);
	if (place < 0 && errno == ELOOP && resolve)
		errno = ENOENT;
	return place;
}

/* The mount point of a line of mountinfo, in which a space is \040 (proc(5)); false if it is none. */
static bool mount_point(const char *line, char point[PATH_MAX])
{
	size_t length = 0;
	for (int field = 0; field < 4; field++) {
		line = strchr(line, ' ');
		if (!line++)
			return false;
	}
	while (*line && *line != ' ' && length < PATH_MAX - 1) {
		const bool escaped = line[0] == '\\' && strspn(line + 1, "01234567") >= 3;
		point[length++] = escaped ? (char)((line[1] - '0') << 6 | (line[2] - '0') << 3 | (line[3] - '0')) : *line;
		line += escaped ? 4 : 1;
	}
	point[length] = '\0';
	return *line == ' ';
}

/*
 * An overlay shows what is under the mounts of its lower layer. So these are shown by themselves, in the order of mountinfo. In a named
 * root that is a volume too a job may have put a link where mountinfo had a directory: there is no mount then.
 */
static int show_mounts_below(int root, const struct plan *plan, const char *path, const char *source, struct report *why)
{
	char top[PATH_MAX], point[PATH_MAX], place[PATH_MAX], link[32];
	/* No link that it has become meanwhile: a named root may be a volume, which jobs write to. */
	const int directory = open(source, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
	const ssize_t size = directory < 0 ? -1 : readlink(link, top, sizeof top - 1);
	if (size < 0)
		return fail(why, "overlay", errno, source);
	close(directory);
	top[size] = '\0';
	const size_t length = (size_t)size;
	for (const char *line = mounts; line; line = (line = strchr(line, '\n')) ? line + 1 : NULL) {
		if (!mount_point(line, point) || strncmp(point, top, length) != 0 || point[length] != '/')
			continue;
		if ((size_t)snprintf(place, sizeof place, "%s%s", path, point + length) >= sizeof place)
			return fail(why, "overlay", ENAMETOOLONG, point);
		const int mount = open_place(point, RESOLVE_NO_SYMLINKS);
		if (mount < 0 && errno != ENOENT)
			return fail(why, "overlay", errno, point);
		if (mount >= 0 && show_mount(root, plan, place, mount, why) != 0)
			return -1;
	}
	return 0;
}

/* Order: before anything of the job's own is mounted, which would be in it. */
static int read_mounts(struct report *why)
{
	size_t size = 0;
	FILE *file = fopen("/proc/self/mountinfo", "re");
	if (!file || getdelim(&mounts, &size, '\0', file) < 0)
		return fail(why, "overlay", errno, "mountinfo");
	fclose(file);
	return 0;
}

int overlay_show(int root, const struct plan *plan, const char *path, const char *source, struct report *why)
{
	const int before = n_layers, place = open_place(source, 0);
	if (place < 0)
		return errno == ENOENT ? 0 : fail(why, "overlay", errno, source);
	if (show_mount(root, plan, path, place, why) != 0)
		return -1;
	return n_layers == before ? 0 : show_mounts_below(root, plan, path, source, why);	/* one that is sealed has them */
}

/*
 * The root itself: a directory of the tmpfs that has the layers beside it. Both are on "/" for now, the root above, so that they are
 * in the namespace: an overlay takes no layers from elsewhere.
 */
int overlay_begin(const struct plan *plan, struct report *why)
{
	if (read_mounts(why) != 0)
		return -1;
	char size[32];
	struct mount_option options[] = {{"mode", "0700"}, {"nr_inodes", MOST_INODES}, {NULL, NULL}, {NULL, NULL}};
	snprintf(size, sizeof size, "%lld", (long long)plan->tmp_size);
	if (plan->tmp_size >= 0)
		options[2] = (struct mount_option){"size", size};
	layers = mount_new("tmpfs", options, PLAIN);
	int above = layers < 0 ? -1 : open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), root = -1;
	if (above >= 0 && mount_put(layers, above) == 0 && make_own(layers, "root", 0755, plan) == 0)
		root = mount_clone(layers, "root", PLAIN, false);
	if (root < 0 || mount_put(root, above) != 0)
		return fail(why, "overlay", errno, "tmpfs");
	close(above);
	return root;
}

/* The directories that were made on the way to where something is mounted are the job's own too. */
static int own_all(int directory, const struct plan *plan)
{
	const int again = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *entries = again < 0 ? NULL : fdopendir(again);
	int result = entries && give_open(again, plan) == 0 ? 0 : -1;
	for (struct dirent *entry; result == 0 && (entry = readdir(entries));) {
		if (entry->d_type != DT_DIR || strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		int below = open_here(directory, entry->d_name, O_DIRECTORY);
		if (below >= 0) {
			result = own_all(below, plan);
			close(below);
		} else if (!is_passed_over(errno))
			result = -1;
	}
	const int error = errno;
	if (entries)
		closedir(entries);
	errno = error;
	return result;
}

/* tmpfs bounds its files by number too, or empty ones would fill the memory: what is there now is not the job's to pay for. */
static int bound_inodes(const struct plan *plan)
{
	char inodes[32];
	struct statfs now;
	if (plan->tmp_size < 0)
		return 0;
	int fs = (int)syscall(SYS_fspick, layers, "", FSPICK_EMPTY_PATH | FSPICK_CLOEXEC), result = -1;
	if (fs >= 0 && fstatfs(layers, &now) == 0) {
		const long long used = (long long)(now.f_files - now.f_ffree);
		snprintf(inodes, sizeof inodes, "%lld", used + (long long)plan->tmp_size / 2048 + 64);
		if (syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "nr_inodes", inodes, 0) == 0)
			result = (int)syscall(SYS_fsconfig, fs, FSCONFIG_CMD_RECONFIGURE, NULL, NULL, 0);
	}
	const int error = errno;
	if (fs >= 0)
		close(fs);
	errno = error;
	return result;
}

/* When everything is in its place. */
int overlay_end(int root, const struct plan *plan, struct report *why)
{
	if (own_all(root, plan) != 0 || bound_inodes(plan) != 0)
		return fail(why, "overlay", errno, "/");
	close(layers);
	free(mounts);
	return 0;
}
