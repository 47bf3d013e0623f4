/*
 * What is opened by path of what the server has made for a job: by the launcher what a birth needs, by the shim, while init is at work,
 * what it alone needs to supervise. What cannot be opened fails the start; a counter that is not there is not one of this host's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "jobrunner.h"

static int open_at(int dir, const char *path, int flags, const char *step, struct report *why)
{
	int fd = openat(dir, path, flags | O_CLOEXEC);
	if (fd < 0)
		fail(why, step, errno, path);
	return fd;
}

int open_places(const struct plan *plan, struct places *places, struct report *why)
{
	const int directory = O_RDONLY | O_DIRECTORY;
	places->null = open_at(AT_FDCWD, "/dev/null", O_RDWR, "pipe", why);
	places->dir = open_at(AT_FDCWD, plan->dir, directory, "args", why);
	if (places->dir >= 0)
		places->log = open_at(places->dir, "log", directory, "log", why);
	places->cgroup2_shim = places->cgroup2_job = places->oom_control = places->event_control = places->oom_events = -1;
	if (plan->cgroup2_shim)
		places->cgroup2_shim = open_at(AT_FDCWD, plan->cgroup2_shim, directory, "cgroup", why);
	if (plan->cgroup2_job)
		places->cgroup2_job = open_at(AT_FDCWD, plan->cgroup2_job, directory, "cgroup", why);
	for (int i = 0; i < plan->n_cgroup1_shim; i++)
		places->cgroup1_shim[i] = open_at(AT_FDCWD, plan->cgroup1_shim[i], O_WRONLY, "cgroup", why);
	for (int i = 0; i < plan->n_cgroup1_job; i++)
		places->cgroup1_job[i] = open_at(AT_FDCWD, plan->cgroup1_job[i], O_WRONLY, "cgroup", why);
	return why->kind == REPORT_FAILED ? -1 : 0;
}

/* The v1 memory.oom_control, and beside it the file that events are asked for in. */
static void open_oom_control(const char *path, struct places *places, struct report *why)
{
	char control[4096];
	snprintf(control, sizeof control, "%.*s/cgroup.event_control", (int)(strrchr(path, '/') - path), path);
	places->oom_control = open_at(AT_FDCWD, path, O_RDONLY, "cgroup", why);
	places->event_control = open_at(AT_FDCWD, control, O_WRONLY, "cgroup", why);
}

int open_watched(const struct plan *plan, struct places *places, struct report *why)
{
	if (plan->oom_control)
		open_oom_control(plan->oom_control, places, why);
	if (plan->oom_events)
		places->oom_events = open_at(AT_FDCWD, plan->oom_events, O_RDONLY, "cgroup", why);
	for (int i = 0; i < plan->n_cpu_quotas; i++) {
		places->cpu_quotas[places->n_cpu_quotas++] = open_at(AT_FDCWD, plan->cpu_quotas[i], O_WRONLY, "cgroup", why);
		places->no_quota = strstr(plan->cpu_quotas[i], "/cpu.max") ? "max" : "-1";	/* v2, v1 */
	}
	for (int i = 0; i < plan->n_io_limits; i++)
		places->io_limits[places->n_io_limits++] = open_at(AT_FDCWD, plan->io_limits[i], O_RDWR, "cgroup", why);
	counters_open();
	return why->kind == REPORT_FAILED ? -1 : 0;
}
