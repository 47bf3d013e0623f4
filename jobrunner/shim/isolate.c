/*
 * The job's namespaces, finished from within by init: cgroups, mounts and root (root.c), host name, network.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <net/if.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

/* Nothing that is mounted from here on may reach the host, and nothing of the host's may reach the job later. */
int private_mounts(struct report *why)
{
	struct mount_attr private = {.propagation = 1UL << 18 /* MS_PRIVATE */};
	if (syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &private, sizeof private) != 0)
		return fail(why, "mount", errno, "/");
	return 0;
}

/* For the probe: what every birth needs of mounts. */
int fresh_proc(struct report *why)
{
	const int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	return private_mounts(why) != 0 ? -1 : mount_proc(root, false, why);
}

/* The only interface that a new network namespace has, down at first (network_namespaces(7), netdevice(7)). */
int bring_up_loopback(struct report *why)
{
	struct ifreq lo = {.ifr_name = "lo"};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), error = 0;
	if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &lo) != 0)
		error = errno;
	lo.ifr_flags |= IFF_UP;
	if (!error && ioctl(fd, SIOCSIFFLAGS, &lo) != 0)
		error = errno;
	if (fd >= 0)
		close(fd);
	return error ? fail(why, "network", error, "lo") : 0;
}

int isolate(const struct birth *birth, struct report *why)
{
	const struct plan *plan = birth->plan;
	/* Before anything else: nothing that the job could cause runs outside its limits. */
	if (enter_cgroups(birth->places->cgroup1_job, plan->cgroup1_job, plan->n_cgroup1_job, why) != 0)
		return -1;
	/* Order: after entering, because a cgroup namespace is rooted where its maker is (cgroup_namespaces(7)). */
	if (unshare(CLONE_NEWCGROUP) != 0)
		return fail(why, "clone", errno, "cgroup namespace");
	if (chdir("/") != 0)
		return fail(why, "mount", errno, "/");
	if (private_mounts(why) != 0 || private_root(plan, why) != 0)
		return -1;
	if (sethostname(plan->hostname, strlen(plan->hostname)) != 0)
		return fail(why, "hostname", errno, plan->hostname);
	return plan->network_host ? 0 : bring_up_loopback(why);
}
