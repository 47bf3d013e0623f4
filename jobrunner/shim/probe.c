/*
 * `jobrunner-shim probe`: whether this process may do what a job's birth does, tried one by one in children that leave at once.
 *
 * One line on standard output for each: its name and the launcher's report (docs/formats.md). What is tried is what init does, by the
 * same functions: reading settings instead would be wrong wherever a seccomp filter or a security module decides.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
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

/* A server that is not root has everything but the first in a user namespace. */
static struct plan plan = {.uid = 1, .gid = 1};

static const struct probe {
	const char *name;
	uint64_t namespaces;
	int (*try)(struct report *why);
} probes[] = {
	{"clone3", 0, try_nothing},
	{"user", 0, try_nothing},
	{"pid", CLONE_NEWPID, try_nothing},
	{"mount", CLONE_NEWNS, private_mounts},
	{"network", CLONE_NEWNET, bring_up_loopback},
	{"ipc", CLONE_NEWIPC, try_nothing},
	{"uts", CLONE_NEWUTS, try_hostname},
	{"cgroup", 0, try_cgroup_namespace},
	{"proc", CLONE_NEWPID | CLONE_NEWNS, fresh_proc},
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
