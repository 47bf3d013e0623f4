/*
 * Counters of the job's cgroups (docs/formats.md, Counters). Their files are opened before its command is let go and read when it is
 * gone.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "jobrunner.h"

static const char *const NAMES[N_COUNTERS] = {
	[CPU_USER] = "cpu_user_ns", [CPU_SYSTEM] = "cpu_system_ns", [MEMORY_PEAK] = "memory_peak", [PIDS_PEAK] = "pids_peak",
	[READ_BYTES] = "read_bytes", [WRITE_BYTES] = "write_bytes", [READ_OPS] = "read_ops", [WRITE_OPS] = "write_ops",
	[THROTTLED] = "throttled_ns", [OOM_KILLS] = "oom_kills",
};
static const char SEPARATORS[] = " \t\n=";

static struct source {
	int counter, fd;
	uint64_t scale;
	const char *path;
	char key[32];
} sources[MAX_COUNTERS];
static int n_sources;

static int counter_named(const char *name, size_t length)
{
	for (int i = 0; i < N_COUNTERS; i++)
		if (strlen(NAMES[i]) == length && memcmp(NAMES[i], name, length) == 0)
			return i;
	return -1;
}

/* `FIELD SCALE KEY PATH`. */
static bool parse_source(const char *item, struct source *source)
{
	size_t name = strcspn(item, " ");
	source->counter = counter_named(item, name);
	if (source->counter < 0 || item[name] != ' ' || item[name + 1] < '0' || item[name + 1] > '9')
		return false;
	char *at;
	errno = 0;
	source->scale = strtoull(item + name + 1, &at, 10);
	if (errno || *at++ != ' ')
		return false;
	size_t key = strcspn(at, " ");
	if (!key || key >= sizeof source->key || at[key] != ' ' || at[key + 1] != '/')
		return false;
	memcpy(source->key, at, key);
	source->path = at + key + 1;
	return true;
}

int counters_parse(const struct plan *plan, struct report *why)
{
	for (; n_sources < plan->n_counters; n_sources++)
		if (!parse_source(plan->counters[n_sources], &sources[n_sources]))
			return fail(why, "args", EINVAL, "bad value of counter");
	return 0;
}

/* One that is not there is not an error: this host does not count it. */
void counters_open(void)
{
	for (int i = 0; i < n_sources; i++)
		sources[i].fd = open(sources[i].path, O_RDONLY | O_CLOEXEC);
}

static bool is_there(const char *device, const char *what)
{
	char path[80];
	return snprintf(path, sizeof path, "/sys/dev/block/%s/%s", device, what) < (int)sizeof path && access(path, F_OK) == 0;
}

static bool has_members(const char *device)
{
	char path[80];
	snprintf(path, sizeof path, "/sys/dev/block/%s/slaves", device);
	DIR *members = opendir(path);
	int n = 0;
	while (members && n < 3 && readdir(members))
		n++;
	if (members)
		closedir(members);
	return n > 2; /* . and .. */
}

/* Of md: a thread of the kernel's own writes to the members. */
static bool is_parity_raid(const char *device)
{
	char path[80], level[8] = "";
	snprintf(path, sizeof path, "/sys/dev/block/%s/md/level", device);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	bool known = read(fd, level, sizeof level - 1) > 0;
	close(fd);
	return known && (strncmp(level, "raid4", 5) == 0 || strncmp(level, "raid5", 5) == 0 || strncmp(level, "raid6", 5) == 0);
}

/*
 * Take the lines out of `scratch` that begin with a block device which passes on what it is asked, as a logical volume does: those that
 * it is made of have lines for it (linux/disk.py).
 */
static void leave_out_stacked(void)
{
	char last[24] = "", *to = scratch;
	bool out = false;
	for (char *line = scratch, *next; *line; line = next) {
		next = line + strcspn(line, "\n");
		next += *next == '\n';
		size_t length = strspn(line, "0123456789:");
		if (length && length < sizeof last && line[length] == ' ' && (strlen(last) != length || memcmp(line, last, length))) {
			memcpy(last, line, length);
			last[length] = '\0';
			out = has_members(last) && !is_there(last, "mq") && !is_parity_raid(last);
		} else if (!length) {
			out = false;
		}
		if (!out) {
			memmove(to, line, (size_t)(next - line));
			to += next - line;
		}
	}
	*to = '\0';
}

/*
 * The first word, or the sum of all that follow a word `key`; UNKNOWN if there is none that is a number. An empty text is one that has
 * nothing to tell yet, as io.stat has before the first operation: 0 of every key.
 */
static uint64_t find_value(const char *key)
{
	bool first = strcmp(key, "-") == 0, wanted = first;
	uint64_t sum = *scratch || first ? UNKNOWN : 0;
	for (char *save, *word = strtok_r(scratch, SEPARATORS, &save); word; word = strtok_r(NULL, SEPARATORS, &save)) {
		char *end;
		uint64_t number = strtoull(word, &end, 10);
		if (wanted && *word >= '0' && *word <= '9' && !*end)
			sum = (sum == UNKNOWN ? 0 : sum) + number;
		if (first)
			break;
		wanted = strcmp(word, key) == 0;
	}
	return sum;
}

/* One number of a file that is open. */
uint64_t counter_in(int fd, const char *key)
{
	if (!read_text(fd))
		return UNKNOWN;
	leave_out_stacked();
	return find_value(key);
}

/* All counters as they are now; UNKNOWN where the host does not tell. */
void counters_read(uint64_t counters[N_COUNTERS])
{
	for (int i = 0; i < N_COUNTERS; i++)
		counters[i] = UNKNOWN;
	for (int i = 0; i < n_sources; i++) {
		uint64_t value = sources[i].fd < 0 ? UNKNOWN : counter_in(sources[i].fd, sources[i].key);
		if (value != UNKNOWN)
			counters[sources[i].counter] = value * sources[i].scale;
	}
}
