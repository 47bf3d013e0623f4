/*
 * `jobrunner-shim probe`: whether this process may do what a job's birth does, tried one by one in children that leave at once.
 *
 * One line on standard output for each: its name and the launcher's report (docs/formats.md). What is tried is what a birth does, by
 * the same functions where it has one: reading settings instead would be wrong wherever a seccomp filter or a security module decides.
 * Some are no failure of a birth by themselves: pivot_root has a substitute, a keyring that nobody can have needs no hiding, and root
 * needs a user namespace for volumes alone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jobrunner.h"

static int try_nothing(struct report *why)
{
	(void)why;
	return 0;
}

static int try_hostname(struct report *why)
{
	return sethostname("probe", 5) == 0 ? 0 : fail(why, "hostname", errno, "");
}

static int try_cgroup_namespace(struct report *why)
{
	return unshare(CLONE_NEWCGROUP) == 0 ? 0 : fail(why, "clone", errno, "");
}

/* A file system over "/" that could be a job's root; -1 on failure. */
static int empty_root(struct report *why)
{
	int root = mount_new("tmpfs", NULL, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	int above = root < 0 ? -1 : open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (private_mounts(why) != 0 || above < 0 || mount_put(root, above) != 0)
		return fail(why, "mount", errno, "tmpfs");
	return root;
}

static int try_root(struct report *why)
{
	int root = empty_root(why);
	return root < 0 ? -1 : enter_root(root, why);
}

static int try_pivot(struct report *why)
{
	int root = empty_root(why);
	if (root < 0)
		return -1;
	return fchdir(root) == 0 && syscall(SYS_pivot_root, ".", ".") == 0 ? 0 : fail(why, "pivot", errno, "");
}

/* A filter that lets everything pass: one instruction, BPF_RET with SECCOMP_RET_ALLOW, in the byte order of this machine. */
static int try_filter(struct report *why)
{
	const uint16_t one = 1;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		return fail(why, "no-new-privs", errno, "");
	return filter_calls(*(const char *)&one ? "060000000000ff7f" : "000600007fff0000", why);
}

static int try_keyring(struct report *why)
{
	return syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) >= 0 ? 0 : fail(why, "keyring", errno, "");
}

/* A server that is not root has everything but the first in a user namespace. */
static struct plan plan = {.uid = 1, .gid = 1};

static const struct probe {
	const char *name;
	uint64_t namespaces;
	int (*try)(struct report *why);
} probes[] = {
	{"clone3", 0, try_nothing},
	{"user", CLONE_NEWUSER | CLONE_NEWNS, private_mounts},
	{"pid", CLONE_NEWPID, try_nothing},
	{"mount", CLONE_NEWNS, private_mounts},
	{"network", CLONE_NEWNET, bring_up_loopback},
	{"ipc", CLONE_NEWIPC, try_nothing},
	{"uts", CLONE_NEWUTS, try_hostname},
	{"cgroup", 0, try_cgroup_namespace},
	{"proc", CLONE_NEWPID | CLONE_NEWNS, fresh_proc},
	{"root", CLONE_NEWNS, try_root},
	{"seccomp", 0, try_filter},
	{"pivot", CLONE_NEWNS, try_pivot},
	{"keyring", 0, try_keyring},
};

static void run(const struct probe *probe)
{
	struct report why = {0};
	int status = 0, pidfd = -1;
	pid_t child = spawn(probe->namespaces | user_namespace(&plan), -1, &pidfd);
	if (child == 0) {
		if (map_ids(&plan, &why) == 0)
			probe->try(&why);
		_exit(tell_server(&why));
	}
	if (child < 0) {
		fail(&why, "clone", errno, "");
		tell_server(&why);
	} else if (waitpid(child, &status, 0) == child && WIFSIGNALED(status)) {
		fail(&why, "init", 0, "killed, as by a seccomp filter");
		tell_server(&why);
	}
	close(pidfd);
}

void probe_all(void)
{
	for (size_t i = 0; i < sizeof probes / sizeof *probes; i++) {
		plan.user_namespace = i > 0 && geteuid() != 0;
		write_all(STDOUT_FILENO, probes[i].name, strlen(probes[i].name));
		write_all(STDOUT_FILENO, " ", 1);
		run(&probes[i]);
	}
}
