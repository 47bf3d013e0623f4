/*
 * Item lists (docs/formats.md): `key=value` items, each ended by a NUL, the first of which names the format and its version.
 *
 * Whatever is not known, does not parse, is missing or is given twice is refused and named: the step is `args`, the errno EINVAL. A
 * value is never told, because it may be that of an environment variable.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "jobrunner.h"

#define MAX_MS INT64_C(1000000000000)	/* 31 years; in ns still far from overflow when it is added to a clock */
#define MAX_NUMBER INT64_MAX
#define MIN_OUTPUT (64 << 10)	/* job.py */

enum kind { TEXT, PATH, NUMBER, CHOICE, TEXTS, PATHS, VIEWS, VOLUMES, WORDS, FILTER, ENV, ARG };

struct key {
	const char *name;
	enum kind kind;
	bool mandatory;
	size_t offset, count_offset;	/* of the field, and of the count if it is an array */
	int64_t low, high;		/* of a number; the most items of an array; which of CHOICES */
};

/* The field is 0 for the first word and 1 for the second. */
enum { OUTPUT_POLICY, ON_WRITE_ERROR, NETWORK };
static const char *const CHOICES[][2] = {
	[OUTPUT_POLICY] = {"drop-oldest", "stop"}, [ON_WRITE_ERROR] = {"continue", "stop"}, [NETWORK] = {"none", "host"},
};

/* In the order of the bits of `protect`. */
static const char *const PROTECTIONS[] = {"capabilities", "no-new-privs", "keyring", "proc"};
#define COUNT(array) (sizeof(array) / sizeof *(array))
#define MAX_ID INT64_C(0xfffffffe)	/* the last one means none (chown(2)) */
#define MAX_BYTES (INT64_C(1) << 60)

#define AT(type, field) offsetof(struct type, field)
static const struct key PLAN_KEYS[] = {
	{"dir", PATH, true, AT(plan, dir), 0, 0, 0},
	{"cgroup2-shim", PATH, false, AT(plan, cgroup2_shim), 0, 0, 0},
	{"cgroup2-job", PATH, false, AT(plan, cgroup2_job), 0, 0, 0},
	{"cgroup1-shim", TEXTS, false, AT(plan, cgroup1_shim), AT(plan, n_cgroup1_shim), 0, MAX_CGROUPS},
	{"cgroup1-job", TEXTS, false, AT(plan, cgroup1_job), AT(plan, n_cgroup1_job), 0, MAX_CGROUPS},
	{"oom-control", PATH, false, AT(plan, oom_control), 0, 0, 0},
	{"oom-events", PATH, false, AT(plan, oom_events), 0, 0, 0},
	{"cpu-quota", PATHS, false, AT(plan, cpu_quotas), AT(plan, n_cpu_quotas), 0, MAX_QUOTAS},
	{"io-limit", PATHS, false, AT(plan, io_limits), AT(plan, n_io_limits), 0, MAX_CGROUPS},
	{"counter", TEXTS, false, AT(plan, counters), AT(plan, n_counters), 0, MAX_COUNTERS},
	{"hostname", TEXT, true, AT(plan, hostname), 0, 0, 0},
	{"cwd", PATH, true, AT(plan, cwd), 0, 0, 0},
	{"merge", NUMBER, true, AT(plan, merge), 0, 0, 1},
	{"stop-signal", NUMBER, true, AT(plan, stop_signal), 0, 1, 64},
	{"grace-ms", NUMBER, true, AT(plan, grace_ms), 0, 0, MAX_MS},
	{"birth-ms", NUMBER, false, AT(plan, birth_ms), 0, 1, MAX_MS},
	{"timeout-ms", NUMBER, false, AT(plan, timeout_ms), 0, 0, MAX_MS},
	{"idle-timeout-ms", NUMBER, false, AT(plan, idle_timeout_ms), 0, 0, MAX_MS},
	{"segment-bytes", NUMBER, true, AT(plan, segment_bytes), 0, 1, MAX_NUMBER},
	{"output-limit", NUMBER, false, AT(plan, output_limit), 0, MIN_OUTPUT, MAX_NUMBER},
	{"output-policy", CHOICE, false, AT(plan, limit_stops), 0, OUTPUT_POLICY, 0},
	{"on-write-error", CHOICE, false, AT(plan, error_stops), 0, ON_WRITE_ERROR, 0},
	{"open-files", NUMBER, false, AT(plan, open_files), 0, 0, MAX_NUMBER},
	{"processes", NUMBER, false, AT(plan, processes), 0, 2, MAX_NUMBER},
	{"uid", NUMBER, false, AT(plan, uid), 0, 0, MAX_ID},
	{"gid", NUMBER, false, AT(plan, gid), 0, 0, MAX_ID},
	{"user-namespace", NUMBER, false, AT(plan, user_namespace), 0, 0, 1},
	{"uid-helper", PATH, false, AT(plan, uid_helper), 0, 0, 0},
	{"gid-helper", PATH, false, AT(plan, gid_helper), 0, 0, 0},
	{"user-name", TEXT, false, AT(plan, user_name), 0, 0, 0},
	{"show", PATHS, false, AT(plan, show), AT(plan, n_show), 0, MAX_PATHS},
	{"root", PATH, false, AT(plan, root), 0, 0, 0},
	{"writable", NUMBER, false, AT(plan, writable), 0, 0, 1},
	{"mask", PATHS, false, AT(plan, mask), AT(plan, n_mask), 0, MAX_PATHS},
	{"cgroup-view", VIEWS, false, AT(plan, cgroup_views), AT(plan, n_cgroup_views), 0, MAX_CGROUPS},
	{"volume", VOLUMES, false, AT(plan, volumes), AT(plan, n_volumes), 0, MAX_VOLUMES},
	{"work", PATH, false, AT(plan, work), 0, 0, 0},
	{"work-size", NUMBER, false, AT(plan, work_size), 0, 4096, MAX_BYTES},
	{"tmp-size", NUMBER, false, AT(plan, tmp_size), 0, 4096, MAX_BYTES},
	{"network", CHOICE, false, AT(plan, network_host), 0, NETWORK, 0},
	{"seccomp", FILTER, false, AT(plan, seccomp), 0, 0, 0},
	{"protect", WORDS, false, AT(plan, protect), 0, 0, 0},
	{"env", ENV, false, 0, 0, 0, 0},
	{"arg", ARG, true, 0, 0, 0, 0},
};

struct stop_items {
	const char *reason, *by;
	int64_t signal, grace_ms;
};
static const struct key STOP_KEYS[] = {
	{"reason", TEXT, true, AT(stop_items, reason), 0, 0, 0},
	{"signal", NUMBER, true, AT(stop_items, signal), 0, 1, 64},
	{"grace-ms", NUMBER, true, AT(stop_items, grace_ms), 0, 0, MAX_MS},
	{"by", TEXT, false, AT(stop_items, by), 0, 0, 0},
};

/* Decimal, nothing before or after it; leading zeros are refused, because somebody may take them for octal. */
static bool parse_number(const char *text, int64_t low, int64_t high, int64_t *number)
{
	uint64_t value = 0;
	if (!*text || (text[0] == '0' && text[1]))
		return false;
	for (; *text; text++) {
		if (*text < '0' || *text > '9' || value > (UINT64_MAX - 9) / 10)
			return false;
		value = value * 10 + (uint64_t)(*text - '0');
	}
	if (value > (uint64_t)high || (int64_t)value < low)
		return false;
	*number = (int64_t)value;
	return true;
}

static bool parse_choice(const char *const words[2], const char *text, int64_t *choice)
{
	*choice = strcmp(text, words[1]) == 0;
	return *choice || strcmp(text, words[0]) == 0;
}

/* Absolute, and every component the name of something: nothing that leads back up. */
static bool is_clean_path(const char *path, size_t length)
{
	if (length < 2 || length >= PATH_MAX || *path != '/')
		return false;
	for (const char *at = path, *end = path + length; at < end;) {
		const char *name = at + 1;
		for (at = name; at < end && *at != '/';)
			at++;
		size_t size = (size_t)(at - name);
		if (size == 0 || (name[0] == '.' && (size == 1 || (size == 2 && name[1] == '.'))))
			return false;
	}
	return true;
}

/* One number of `UID:GID`, up to `end`; where the text goes on, NULL if it is none. */
static const char *parse_id(const char *text, char end, int64_t *id)
{
	char digits[16];
	size_t length = strcspn(text, (const char[]){end, '\0'});
	if (text[length] != end || length >= sizeof digits)
		return NULL;
	memcpy(digits, text, length);
	digits[length] = '\0';
	return parse_number(digits, 0, MAX_ID, id) ? text + length + 1 : NULL;
}

/* MODE OWNER TARGET SOURCE, cut at the first three spaces. */
static bool parse_volume(const char *text, struct volume *volume)
{
	if (strncmp(text, "ro ", 3) != 0 && strncmp(text, "rw ", 3) != 0)
		return false;
	*volume = (struct volume){.read_only = text[1] == 'o', .uid = -1, .gid = -1};
	text += 3;
	if (strncmp(text, "- ", 2) == 0)
		text += 2;
	else if (!(text = parse_id(text, ':', &volume->uid)) || !(text = parse_id(text, ' ', &volume->gid)))
		return false;
	const char *space = strchr(text, ' ');
	if (!space || !is_clean_path(text, (size_t)(space - text)))
		return false;
	volume->target = text;
	volume->target_length = (int)(space - text);
	volume->source = space + 1;
	return *volume->source == '/';
}

/* NAME PATH: the name of a directory, or "." */
static bool is_view(const char *text)
{
	size_t length = strcspn(text, " /");
	return length > 0 && length < NAME_MAX && text[length] == ' ' && text[length + 1] == '/' && strncmp(text, "..", 2) != 0;
}

static bool parse_word(const char *text, int64_t *bits)
{
	for (size_t i = 0; i < COUNT(PROTECTIONS); i++)
		if (strcmp(text, PROTECTIONS[i]) == 0) {
			*bits |= INT64_C(1) << i;
			return true;
		}
	return false;
}

/* The next item of an array. */
static bool append(const struct key *key, char *value, void *target)
{
	void *field = (char *)target + key->offset;
	int *count = (void *)((char *)target + key->count_offset);
	if (*count >= key->high)
		return false;
	if (key->kind == VOLUMES)
		return parse_volume(value, (struct volume *)field + (*count)++);
	if ((key->kind == PATHS && !is_clean_path(value, strlen(value))) || (key->kind == VIEWS && !is_view(value)))
		return false;
	((const char **)field)[(*count)++] = value;
	return true;
}

static bool store(const struct key *key, char *value, void *target, bool seen)
{
	void *field = (char *)target + key->offset;
	switch (key->kind) {
	case TEXTS: case PATHS: case VIEWS: case VOLUMES:
		return append(key, value, target);
	case WORDS:
		return parse_word(value, field);
	case ENV:
		return *value != '=' && strchr(value, '=');
	case ARG:
		return true;
	case NUMBER:
		return !seen && parse_number(value, key->low, key->high, field);
	case CHOICE:
		return !seen && parse_choice(CHOICES[key->low], value, field);
	case TEXT: case PATH: case FILTER:
		break;
	}
	if (seen || (key->kind == PATH && *value != '/') || (key->kind == FILTER && !filter_parse(value)))
		return false;
	*(const char **)field = value;
	return true;
}

static int refuse(struct report *why, const char *what, const char *name)
{
	char detail[96];
	snprintf(detail, sizeof detail, "%s%.64s", what, name);
	return fail(why, "args", EINVAL, detail);
}

static const struct key *find_key(const struct key *keys, size_t n_keys, const char *name, size_t length)
{
	for (size_t i = 0; i < n_keys; i++)
		if (strlen(keys[i].name) == length && memcmp(keys[i].name, name, length) == 0)
			return &keys[i];
	return NULL;
}

/* Cuts the list into strings in place. `counts` gets how often each key was given. */
static int parse(char *list, size_t size, const char *header, const struct key *keys, size_t n_keys, void *target, size_t *counts,
		 struct report *why)
{
	char *at = list, *end = list + size;
	if (!size || end[-1] != '\0' || strcmp(list, header) != 0)
		return refuse(why, "not a list of ", header);
	for (at += strlen(at) + 1; at < end; at += strlen(at) + 1) {
		char *equals = strchr(at, '=');
		const struct key *key = equals ? find_key(keys, n_keys, at, (size_t)(equals - at)) : NULL;
		if (!key) {
			if (equals)
				*equals = '\0';
			return refuse(why, "unknown key ", at);
		}
		if (!store(key, equals + 1, target, counts[key - keys] > 0))
			return refuse(why, "bad value of ", key->name);
		counts[key - keys]++;
	}
	for (size_t i = 0; i < n_keys; i++)
		if (keys[i].mandatory && !counts[i])
			return refuse(why, "missing ", keys[i].name);
	return 0;
}

/* The arguments and the environment as execve(2) takes them, in memory of their own that is given back as a whole. */
static int make_vectors(struct plan *plan, size_t n_args, size_t n_env, struct report *why)
{
	plan->vectors_size = (n_args + n_env + 2) * sizeof(char *);
	plan->vectors = mmap(NULL, plan->vectors_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (plan->vectors == MAP_FAILED)
		return fail(why, "args", errno, "");
	plan->argv = plan->vectors;
	plan->env = plan->argv + n_args + 1;
	char **arg = plan->argv, **env = plan->env;
	for (char *at = plan->list, *end = at + plan->list_size; at < end; at += strlen(at) + 1) {
		if (strncmp(at, "arg=", 4) == 0)
			*arg++ = at + 4;
		else if (strncmp(at, "env=", 4) == 0)
			*env++ = at + 4;
	}
	return 0;
}

/* Read a launch list to its end, from a file or a pipe, into memory of our own: nobody changes it once it was checked. */
int plan_read(int fd, struct plan *plan, struct report *why)
{
	size_t counts[COUNT(PLAN_KEYS)] = {0}, size = 0;
	char *list = mmap(NULL, MAX_LIST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (list == MAP_FAILED)
		return fail(why, "args", errno, "");
	*plan = (struct plan){.list = list, .timeout_ms = -1, .idle_timeout_ms = -1, .open_files = -1, .processes = -1, .birth_ms = -1,
			      .output_limit = -1, .uid = -1, .gid = -1, .work_size = -1, .tmp_size = -1};
	lseek(fd, 0, SEEK_SET);		/* the writer of a memfd left it at its end; a pipe has no place to go to */
	for (ssize_t n; (n = read(fd, list + size, MAX_LIST - size)) != 0;) {
		if (n < 0 && errno != EINTR)
			return fail(why, "args", errno, "cannot read the list");
		size += n > 0 ? (size_t)n : 0;
		if (size == MAX_LIST)
			return fail(why, "args", E2BIG, "");
	}
	plan->list_size = size;
	if (parse(list, size, "jobrunner-launch=1", PLAN_KEYS, COUNT(PLAN_KEYS), plan, counts, why) != 0)
		return -1;
	if ((plan->uid < 0) != (plan->gid < 0) || (plan->user_namespace && plan->uid < 0))
		return refuse(why, "missing ", plan->uid < 0 ? "uid" : "gid");
	if (!plan->uid_helper != !plan->gid_helper || (plan->uid_helper && !plan->user_namespace))
		return refuse(why, "missing ", !plan->user_namespace ? "user-namespace" : plan->uid_helper ? "gid-helper" : "uid-helper");
	return make_vectors(plan, counts[COUNT(PLAN_KEYS) - 1], counts[COUNT(PLAN_KEYS) - 2], why);
}

/* Give the list's memory back: up to some MiB, with the values of environment variables in it. The numbers stay. */
void plan_free(struct plan *plan)
{
	munmap(plan->list, MAX_LIST);
	munmap(plan->vectors, plan->vectors_size);
	plan->dir = plan->cgroup2_shim = plan->cgroup2_job = plan->oom_control = plan->oom_events = plan->hostname = plan->cwd = NULL;
	plan->root = plan->work = plan->user_name = plan->seccomp = plan->uid_helper = plan->gid_helper = NULL;
	plan->n_cgroup1_shim = plan->n_cgroup1_job = plan->n_counters = plan->n_cpu_quotas = plan->n_io_limits = 0;
	plan->n_show = plan->n_mask = plan->n_cgroup_views = plan->n_volumes = 0;
	plan->argv = plan->env = NULL;
}

/* False if it is no stop list of this version. */
bool stop_parse(char *list, size_t size, struct stop *stop)
{
	size_t counts[COUNT(STOP_KEYS)] = {0};
	struct stop_items items = {0};
	struct report why = {0};
	if (parse(list, size, "jobrunner-stop=1", STOP_KEYS, COUNT(STOP_KEYS), &items, counts, &why) != 0)
		return false;
	bool shutdown = strcmp(items.reason, "shutdown") == 0;
	if (!shutdown && strcmp(items.reason, "stopped") != 0)
		return false;
	*stop = (struct stop){shutdown ? CAUSE_SHUTDOWN : CAUSE_STOPPED, items.signal, items.grace_ms};
	return true;
}
