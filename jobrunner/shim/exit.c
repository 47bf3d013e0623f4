/*
 * The exit record (docs/formats.md): allocated and synced while the job is being born, overwritten in place at its end, so that
 * neither a full disk nor a crash in between can lose how a job ended.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

#define MAX_PATH 512

static const char *const NAMES[N_COUNTERS] = {
	[CPU_USER] = "cpu_user_ns", [CPU_SYSTEM] = "cpu_system_ns", [MEMORY_PEAK] = "memory_peak", [PIDS_PEAK] = "pids_peak",
	[READ_BYTES] = "read_bytes", [WRITE_BYTES] = "write_bytes", [READ_OPS] = "read_ops", [WRITE_OPS] = "write_ops",
	[THROTTLED] = "throttled_ns", [OOM_KILLS] = "oom_kills",
};

/* Where a counter is read. Kept apart from the item list, which is gone by then. */
static struct source {
	int field;
	uint64_t scale;
	char key[32];
	char path[MAX_PATH];
} *sources;
static int n_sources;
static int exit_fd = -1;

static uint32_t crc32_of(const void *data, size_t size)
{
	uint32_t crc = 0xffffffff;
	for (const uint8_t *at = data; size--; at++) {
		crc ^= *at;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
	}
	return ~crc;
}

static bool put(struct exit_record *record)
{
	memcpy(record->magic, "JREXIT", sizeof record->magic);
	record->version = 1;
	record->checksum = crc32_of(record, offsetof(struct exit_record, checksum));
	return pwrite(exit_fd, record, sizeof *record, 0) == sizeof *record && fdatasync(exit_fd) == 0;
}

/* 0, or errno. */
int exit_preallocate(int job_dir, struct exit_record *record)
{
	exit_fd = openat(job_dir, "exit", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (exit_fd < 0 || !put(record))
		return errno ? errno : EIO;
	return fsync(job_dir) == 0 ? 0 : errno;
}

void exit_write(struct exit_record *record)
{
	put(record);		/* in place; if even that fails the record says `running`, and the job is told as lost */
}

/* Parse `FIELD SCALE KEY PATH` items into memory of their own. What is not understood leaves its field unknown. */
void counters_keep(const struct plan *plan, struct exit_record *record)
{
	for (int i = 0; i < N_COUNTERS; i++)
		record->counters[i] = UNKNOWN;
	sources = calloc((size_t)plan->n_counters + 1, sizeof *sources);
	for (int i = 0; sources && i < plan->n_counters; i++) {
		struct source *source = &sources[n_sources];
		const char *at = plan->counters[i];
		size_t name = strcspn(at, " ");
		source->field = -1;
		for (int f = 0; f < N_COUNTERS; f++)
			if (strlen(NAMES[f]) == name && strncmp(at, NAMES[f], name) == 0)
				source->field = f;
		at += name + (at[name] == ' ');
		char *end;
		source->scale = strtoull(at, &end, 10);
		at = end + (*end == ' ');
		size_t key = strcspn(at, " ");
		if (source->field < 0 || !source->scale || key >= sizeof source->key || strlen(at) - key >= MAX_PATH || at[key] != ' ')
			continue;
		memcpy(source->key, at, key);
		source->key[key] = '\0';
		strcpy(source->path, at + key + 1);
		n_sources++;
	}
}

static bool is_separator(char c)
{
	return c == ' ' || c == '\t' || c == '\n' || c == '=';
}

static void read_counter(const struct source *source, uint64_t *value)
{
	static char text[16384];
	int fd = open(source->path, O_RDONLY | O_CLOEXEC);
	ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	if (size <= 0)
		return;
	text[size] = '\0';
	bool wanted = strcmp(source->key, "-") == 0, found = false;
	uint64_t sum = 0;
	for (char *word = text, *next; *word; word = next) {
		while (*word && is_separator(*word))
			word++;
		for (next = word; *next && !is_separator(*next); next++)
			;
		if (*next)
			*next++ = '\0';
		if (!*word)
			break;
		if (wanted && *word >= '0' && *word <= '9') {
			sum += strtoull(word, NULL, 10);
			found = true;
		}
		if (strcmp(source->key, "-") == 0)
			break;
		wanted = strcmp(word, source->key) == 0;
	}
	if (found)
		*value = sum * source->scale;
}

void counters_read(struct exit_record *record)
{
	for (int i = 0; i < n_sources; i++)
		read_counter(&sources[i], &record->counters[sources[i].field]);
}
