/* What the files of the helper share. main.c holds the theory of operation. */
#ifndef JOBRUNNER_SHIM_H
#define JOBRUNNER_SHIM_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MAX_CGROUPS 16
#define MAX_COUNTERS 16
#define STEP_SIZE 16

/* What the server asked for, parsed from the item list; strings point into it. */
struct plan {
	const char *dir;
	const char *cgroup2_shim, *cgroup2_job;
	const char *cgroup1_shim[MAX_CGROUPS], *cgroup1_job[MAX_CGROUPS];
	int n_cgroup1_shim, n_cgroup1_job;
	const char *oom_control;
	const char *counters[MAX_COUNTERS];
	int n_counters;
	const char *hostname, *cwd;
	bool merge;
	int stop_signal;
	int64_t grace_ms, timeout_ms, idle_timeout_ms;	/* -1: none */
	uint64_t segment_bytes;
	int64_t open_files;				/* -1: as it is */
	char **argv, **envp;				/* NULL-terminated, in one mapping: */
	size_t vectors_size;
};

struct stop_request {
	int cause;		/* CAUSE_STOPPED or CAUSE_SHUTDOWN */
	int signal;
	int64_t grace_ms;
};

/* File descriptors that are opened before anything is born. */
struct places {
	int dir;				/* the job's directory */
	int cgroup2_shim, cgroup2_job;		/* -1: none */
	int cgroup1_shim[MAX_CGROUPS], cgroup1_job[MAX_CGROUPS];
};

/* Why and where a start failed. */
struct failure {
	char step[STEP_SIZE];
	int error;		/* errno(3), 0 if no system call failed */
	char detail[128];
};

enum cause {
	CAUSE_NONE, CAUSE_OWN, CAUSE_STOPPED, CAUSE_DEADLINE, CAUSE_IDLE, CAUSE_OUTPUT_LIMIT, CAUSE_SHUTDOWN, CAUSE_OOM, CAUSE_LOST
};

enum state { STATE_RUNNING = 1, STATE_ENDED, STATE_FAILED };

enum counter { CPU_USER, CPU_SYSTEM, MEMORY_PEAK, PIDS_PEAK, READ_BYTES, WRITE_BYTES, READ_OPS, WRITE_OPS, THROTTLED, OOM_KILLS, N_COUNTERS };
#define UNKNOWN UINT64_MAX

/* The exit record, docs/formats.md; written in this layout, so every field is naturally aligned. */
struct exit_record {
	char magic[6];
	uint16_t version;
	uint32_t state, cause;
	int32_t wait_status, error;
	char step[STEP_SIZE];
	int64_t started_ns, ended_ns;
	uint64_t wall_ns, log_end, lost;
	uint64_t counters[N_COUNTERS];
	uint8_t zero[348];
	uint32_t checksum;
};
_Static_assert(sizeof(struct exit_record) == 512, "the exit record is 512 bytes");
_Static_assert(offsetof(struct exit_record, counters) == 80, "as docs/formats.md says");

/* items.c: item lists */
int parse_plan(char *list, size_t size, struct plan *plan, struct failure *failure);
int parse_stop(char *list, size_t size, struct stop_request *request);

/* log.c: the log, written by one process */
void log_open(int job_dir, uint64_t segment_bytes, struct failure *failure);
bool log_write(int stream, const char *data, size_t size, int64_t now_ns);
void log_sync(void);
void log_end_record(void);
uint64_t log_offset(void);
uint64_t log_lost(void);
enum { KIND_DATA = 1, KIND_GAP, KIND_END };

/* exit.c: the exit record and its counters */
int exit_preallocate(int job_dir, struct exit_record *record);
void exit_write(struct exit_record *record);
void counters_keep(const struct plan *plan, struct exit_record *record);
void counters_read(struct exit_record *record);

/* shim.c: the supervisor; never returns */
_Noreturn void shim_main(struct plan *plan, const struct places *places, int report, void *list, size_t list_size);

/* init.c: pid 1 of the job; never returns. `channel` is its end of the socket pair with the shim. */
_Noreturn void init_main(const struct plan *plan, const struct places *places, int channel, int birth, const int output[2]);

/* Messages on the channel between shim and init. */
struct message {
	uint32_t kind;
	int32_t value;
};
enum { SAY_SIGNAL = 1, SAY_DELIVERED, SAY_EXITED };

/* util.c */
bool fail(struct failure *failure, const char *step, int error, const char *detail);
bool write_all(int fd, const void *data, size_t size);
int64_t now_ns(int clock);
pid_t birth_of(uint64_t flags, int cgroup, int *pidfd);
int enter_cgroups(const int *tasks, int count);
_Noreturn void report_failure(int fd, const char *step, int error, const char *detail);
void say_failure(int fd, const struct failure *failure);
void close_above(unsigned int first);
void forget_birth(void);

#endif
