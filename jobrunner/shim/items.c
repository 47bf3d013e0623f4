/* Item lists (docs/formats.md): `key=value` items, each ended by a NUL. What is not known is refused. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "shim.h"

/* The value of an item if its key is this one. */
static char *value_of(char *item, const char *key)
{
	size_t length = strlen(key);
	return strncmp(item, key, length) == 0 && item[length] == '=' ? item + length + 1 : NULL;
}

static bool parse_number(const char *text, int64_t low, int64_t high, int64_t *number)
{
	char *end;
	if (*text < '0' || *text > '9')
		return false;
	errno = 0;
	long long parsed = strtoll(text, &end, 10);
	if (errno || *end || parsed < low || parsed > high)
		return false;
	*number = parsed;
	return true;
}

static bool keep_text(const char **slot, char *value)
{
	bool first = !*slot;
	*slot = value;
	return first;
}

static bool keep_more(const char **slots, int *count, int most, char *value)
{
	if (*count == most)
		return false;
	slots[(*count)++] = value;
	return true;
}

static bool take_number(struct plan *plan, char *item, bool *known)
{
	char *value;
	int64_t number = 0;
	*known = true;
	if ((value = value_of(item, "merge")) && parse_number(value, 0, 1, &number)) {
		plan->merge = number;
		return true;
	}
	if ((value = value_of(item, "stop-signal")) && parse_number(value, 1, SIGRTMAX, &number)) {
		plan->stop_signal = (int)number;
		return true;
	}
	if ((value = value_of(item, "segment-bytes")) && parse_number(value, 1, INT64_MAX, &number)) {
		plan->segment_bytes = (uint64_t)number;
		return true;
	}
	if ((value = value_of(item, "grace-ms")))
		return parse_number(value, 0, INT64_MAX / 2000000, &plan->grace_ms);
	if ((value = value_of(item, "timeout-ms")))
		return parse_number(value, 0, INT64_MAX / 2000000, &plan->timeout_ms);
	if ((value = value_of(item, "idle-timeout-ms")))
		return parse_number(value, 0, INT64_MAX / 2000000, &plan->idle_timeout_ms);
	if ((value = value_of(item, "open-files")))
		return parse_number(value, 1, INT64_MAX, &plan->open_files);
	*known = false;
	return false;
}

static bool take_text(struct plan *plan, char *item)
{
	char *value;
	if ((value = value_of(item, "dir")))
		return value[0] == '/' && keep_text(&plan->dir, value);
	if ((value = value_of(item, "cgroup2-shim")))
		return keep_text(&plan->cgroup2_shim, value);
	if ((value = value_of(item, "cgroup2-job")))
		return keep_text(&plan->cgroup2_job, value);
	if ((value = value_of(item, "cgroup1-shim")))
		return keep_more(plan->cgroup1_shim, &plan->n_cgroup1_shim, MAX_CGROUPS, value);
	if ((value = value_of(item, "cgroup1-job")))
		return keep_more(plan->cgroup1_job, &plan->n_cgroup1_job, MAX_CGROUPS, value);
	if ((value = value_of(item, "oom-control")))
		return keep_text(&plan->oom_control, value);
	if ((value = value_of(item, "counter")))
		return keep_more(plan->counters, &plan->n_counters, MAX_COUNTERS, value);
	if ((value = value_of(item, "hostname")))
		return keep_text(&plan->hostname, value);
	if ((value = value_of(item, "cwd")))
		return value[0] == '/' && keep_text(&plan->cwd, value);
	return false;
}

int parse_plan(char *list, size_t size, struct plan *plan, struct failure *failure)
{
	if (size == 0 || list[size - 1] != '\0' || strcmp(list, "jobrunner-launch=1") != 0)
		return fail(failure, "args", 0, "not a launch list of version 1"), -1;
	size_t items = 0;
	for (size_t at = 0; at < size; at++)
		items += list[at] == '\0';
	/* Room for every item in both vectors; pages that are not touched cost nothing. */
	char **vectors = mmap(NULL, 2 * (items + 1) * sizeof *vectors, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (vectors == MAP_FAILED)
		return fail(failure, "args", errno, ""), -1;
	plan->vectors_size = 2 * (items + 1) * sizeof *vectors;
	plan->argv = vectors;
	plan->envp = vectors + items + 1;
	plan->stop_signal = SIGTERM;
	plan->grace_ms = 10000;
	plan->timeout_ms = plan->idle_timeout_ms = plan->open_files = -1;
	size_t n_arg = 0, n_env = 0;
	for (char *item = list + strlen(list) + 1; item < list + size; item += strlen(item) + 1) {
		char *value;
		bool known;
		if ((value = value_of(item, "arg")))
			plan->argv[n_arg++] = value;
		else if ((value = value_of(item, "env")) && strchr(value, '='))
			plan->envp[n_env++] = value;
		else if (!take_number(plan, item, &known) && (known || !take_text(plan, item)))
			/* Without its value: it may be a secret. */
			return strchr(item, '=') ? (void)(*strchr(item, '=') = '\0') : (void)0, fail(failure, "args", 0, item), -1;
	}
	if (!plan->dir || !plan->cwd || !plan->hostname || !plan->segment_bytes || !n_arg || !plan->argv[0][0])
		return fail(failure, "args", 0, "dir, cwd, hostname, segment-bytes or arg is missing"), -1;
	return 0;
}

int parse_stop(char *list, size_t size, struct stop_request *request)
{
	int64_t number;
	if (size == 0 || list[size - 1] != '\0' || strcmp(list, "jobrunner-stop=1") != 0)
		return -1;
	request->cause = CAUSE_NONE;
	request->signal = 0;
	request->grace_ms = -1;
	for (char *item = list + strlen(list) + 1; item < list + size; item += strlen(item) + 1) {
		char *value;
		if ((value = value_of(item, "reason")))
			request->cause = strcmp(value, "shutdown") == 0 ? CAUSE_SHUTDOWN : strcmp(value, "stopped") == 0 ? CAUSE_STOPPED : CAUSE_NONE;
		else if ((value = value_of(item, "signal")) && parse_number(value, 1, SIGRTMAX, &number))
			request->signal = (int)number;
		else if ((value = value_of(item, "grace-ms")) && parse_number(value, 0, INT64_MAX / 2000000, &number))
			request->grace_ms = number;
		else if (!value_of(item, "by"))
			return -1;
	}
	return request->cause != CAUSE_NONE && request->signal && request->grace_ms >= 0 ? 0 : -1;
}
