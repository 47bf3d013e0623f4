/*
 * What the files of the helper share; main.c has the theory of operation.
 *
 * Times are nanoseconds of CLOCK_BOOTTIME, which runs on while the host sleeps, unless a name says `real`. Functions that can make
 * a start fail return 0, or -1 with the step and its errno in a struct report; the first failure is the one that is told.
 */
#ifndef JOBRUNNER_H
#define JOBRUNNER_H

#include <limits.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#define MAX_CGROUPS 16
#define MAX_COUNTERS 32
#define MAX_QUOTAS 4
#define MAX_PATHS 128
#define MAX_VOLUMES 64
#define MAX_LIST (4u << 20)
#define MS INT64_C(1000000)
#define NEVER INT64_MAX
#define SCRATCH_SIZE (64u << 10)

/* ---- items.c: item lists */

/* The bits of `protect`. */
enum { PROTECT_CAPABILITIES = 1, PROTECT_NO_NEW_PRIVS = 2, PROTECT_KEYRING = 4, PROTECT_PROC = 8 };

/* A directory of the host's at `target`; `uid` and `gid` -1 if it keeps its owners. */
struct volume {
	bool read_only;
	int target_length;
	int64_t uid, gid;
	const char *target, *source;
};

/* A launch list. Strings point into the list; -1 is a number that was not given. */
struct plan {
	const char *dir, *cgroup2_shim, *cgroup2_job, *oom_control, *oom_events, *hostname, *cwd;
	const char *cgroup1_shim[MAX_CGROUPS], *cgroup1_job[MAX_CGROUPS], *counters[MAX_COUNTERS], *cpu_quotas[MAX_QUOTAS];
	const char *io_limits[MAX_CGROUPS];
	int n_cgroup1_shim, n_cgroup1_job, n_counters, n_cpu_quotas, n_io_limits;
	int64_t merge, stop_signal, grace_ms, timeout_ms, idle_timeout_ms, segment_bytes, open_files, processes;
	int64_t network_host;		/* 1: the host's network instead of one with loopback alone */
	int64_t output_limit, limit_stops, error_stops;	/* the last two: 1 if that ends the job */
	const char *root, *work, *user_name, *seccomp, *uid_helper, *gid_helper;
	const char *show[MAX_PATHS], *mask[MAX_PATHS], *cgroup_views[MAX_CGROUPS];
	int n_show, n_mask, n_cgroup_views, n_volumes;
	struct volume volumes[MAX_VOLUMES];
	int64_t uid, gid, work_size, tmp_size, writable, protect, birth_ms;
	int64_t user_namespace;		/* 1: a user namespace, in which uid and gid are the server's own, or with the helpers themselves */
	char **argv, **env;
	void *list, *vectors;		/* the memory behind all of it: */
	size_t list_size, vectors_size;
};

enum cause {
	CAUSE_NONE, CAUSE_OWN_END, CAUSE_STOPPED, CAUSE_DEADLINE, CAUSE_IDLE_TIMEOUT, CAUSE_OUTPUT_LIMIT, CAUSE_SHUTDOWN,
	CAUSE_OOM_KILLED, CAUSE_LOST, CAUSE_LOG_ERROR
};

struct stop {
	enum cause cause;
	int64_t signal, grace_ms;
};

struct report;
int plan_read(int fd, struct plan *plan, struct report *why);
void plan_free(struct plan *plan);
bool stop_parse(char *list, size_t size, struct stop *stop);

/* ---- util.c */

enum report_kind { REPORT_NONE, REPORT_READY, REPORT_STARTED, REPORT_FAILED };

/* What init and the command tell the shim, and the shim the launcher. Shorter than PIPE_BUF, so a pipe keeps it whole (pipe(7)). */
struct report {
	uint32_t kind;
	int32_t error;		/* errno(3), 0 if no system call failed */
	char step[16];
	char detail[232];
};

extern char scratch[SCRATCH_SIZE];	/* for whoever fills and empties it within one call */

int64_t now_ns(clockid_t clock);
int poll_until(struct pollfd *fds, nfds_t count, int64_t until);
int fail(struct report *why, const char *step, int error, const char *detail);
bool say(int fd, const struct report *report);
bool hear(int fd, struct report *report);
bool write_all(int fd, const void *data, size_t size);
bool read_text(int fd);
bool copy_all(int from, int to);
uint32_t crc32_of(const void *data, size_t size);
pid_t spawn(uint64_t flags, int cgroup2, int *pidfd);
int spawn_failed(int cgroup2, const char *path, const char *what, struct report *why);
int enter_cgroups(const int *tasks, char const *const *paths, int count, struct report *why);
int send_signal(int pidfd, int signal);
void close_from(unsigned int first);
void forget_birth(void);

/* ---- mounts.c */

struct mount_option {
	const char *key, *value;
};

int mount_new(const char *type, const struct mount_option *options, unsigned int attributes);
int mount_clone(int dir, const char *path, uint64_t attributes, bool recursive);
int mount_directory(const char *path, uint64_t attributes);
int mount_change(int mount, uint64_t set, unsigned int flags);
int mount_put(int mount, int target);
int open_in_root(int root, const char *path, uint64_t flags);
int open_inside(int root, const char *path);
int make_directory(int root, const char *path);
int make_file(int root, const char *path);

/* ---- exit.c: the exit record, docs/formats.md. Every field is naturally aligned, so this is its layout. */

enum exit_state { STATE_RUNNING = 1, STATE_ENDED, STATE_FAILED };
enum counter {
	CPU_USER, CPU_SYSTEM, MEMORY_PEAK, PIDS_PEAK, READ_BYTES, WRITE_BYTES, READ_OPS, WRITE_OPS, THROTTLED, OOM_KILLS, N_COUNTERS
};
#define UNKNOWN UINT64_MAX

struct exit_record {
	char magic[6];
	uint16_t version;
	uint32_t state, cause;
	int32_t wait_status, error;
	char step[16];
	int64_t started_real_ns, ended_real_ns;
	uint64_t wall_ns, log_end, lost;
	uint64_t counters[N_COUNTERS];
	uint8_t zero[348];
	uint32_t checksum;
};
_Static_assert(sizeof(struct exit_record) == 512 && offsetof(struct exit_record, counters) == 80, "docs/formats.md, Exit record");

int exit_prepare(int dir, struct exit_record *record, struct report *why);
void exit_finish(int dir, struct exit_record *record);

/* ---- counters.c */

int counters_parse(const struct plan *plan, struct report *why);
void counters_open(void);
void counters_read(uint64_t counters[N_COUNTERS]);
uint64_t counter_in(int fd, const char *key);

/* ---- log.c: the log as it is written */

enum stream { STREAM_STDOUT = 1, STREAM_STDERR };

int log_open(int dir, const struct plan *plan, struct report *why);
void log_write(enum stream stream, const char *data, size_t size, int64_t real_ns);
enum cause log_cause(void);
void log_sync(void);
void log_end(int64_t real_ns);
uint64_t log_offset(void);
uint64_t log_lost(void);

/* ---- retention.c: how much of it is kept */

#define SEGMENT_NAME 24		/* 16 digits, `.idx`, NUL */

struct index_record {
	uint64_t end;
	int64_t real_ns;
	uint32_t kind, stream;
	union {
		uint64_t lost;				/* of a gap */
		struct { uint32_t size, checksum; };	/* of all others */
	};
};
_Static_assert(sizeof(struct index_record) == 32, "docs/formats.md, Log");

void segment_names(uint64_t base, char data[SEGMENT_NAME], char index[SEGMENT_NAME]);
void retention_open(int dir, int64_t limit, bool stops);
size_t retention_room(size_t size, size_t records);
void retention_begin(uint64_t base);
void retention_grow(size_t size);

/* ---- the processes */

/* What is opened by path, -1: none. First what a birth needs, then what only the shim has. */
struct places {
	int dir, log, null;
	int cgroup2_shim, cgroup2_job, cgroup1_shim[MAX_CGROUPS], cgroup1_job[MAX_CGROUPS];
	int oom_control, event_control, oom_events;
	int cpu_quotas[MAX_QUOTAS], n_cpu_quotas, io_limits[MAX_CGROUPS], n_io_limits;
	const char *no_quota;		/* what lifts the CPU limit when it is written to each of them */
};

/* One job as its shim sees it. */
struct job {
	struct plan *plan;
	struct places *places;
	struct exit_record record;
	int ctl, ctl_keeper, init, channel, oom;	/* FIFO and our own writing end of it, pidfd, socket, what tells OOM; -1: none */
	int output[2];				/* reading ends of stdout and stderr; -1: none, they are merged */
	int64_t started;
	_Atomic int64_t last_output;
	_Atomic enum cause log_cause;		/* why the copier says that the job should end */
	int log_bell;				/* eventfd that it rings with that */
	int64_t deadline, idle_ns, kill_at, oom_until;
	int unread;				/* bytes of output that had not been read when the supervisor looked last */
	enum cause stop_cause;			/* asked for; whether it is why the job ended is decided at the end */
	bool delivered, killed, exited, oom_kill;
	int wait_status;			/* if `exited` */
};

/* What init needs of the shim's. */
struct birth {
	struct plan *plan;
	const struct places *places;
	int channel, report;			/* the socket to the shim; where failures and READY are written */
	int output[2];				/* writing ends, both the same pipe if merged */
};

/* Between shim and init, over `channel`. */
struct message {
	uint32_t kind;
	int32_t value;
};
enum { SAY_GO = 1, SAY_SIGNAL, SAY_DELIVERED, SAY_EXITED, SAY_MAPPED };

int open_places(const struct plan *plan, struct places *places, struct report *why);		/* places.c */
int open_watched(const struct plan *plan, struct places *places, struct report *why);
_Noreturn void shim_main(struct plan *plan, struct places *places, int answer);		/* shim.c */
void supervise(struct job *job);							/* supervise.c */
void decide(struct job *job);
void kill_init(struct job *job);
bool take_messages(struct job *job);
void lift_limits(const struct places *places);						/* lift.c */
int copy_begin(struct job *job, struct report *why);					/* copy.c */
enum cause copy_cause(struct job *job);
void copy_go_on(struct job *job);
int copy_unread(const struct job *job, bool *full);
void copy_end(void);
int ctl_claim(struct job *job, struct report *why);					/* ctl.c */
bool ctl_heard_stop(struct job *job);
bool ctl_stop_file(const struct job *job, bool asked, struct stop *stop);
_Noreturn void init_main(const struct birth *birth);					/* init.c */
void wait_to_be_told(int channel, uint32_t kind);
uint64_t user_namespace(const struct plan *plan);					/* userns.c */
int open_own(const struct plan *plan, const char *path);
bool has_own_ids(const struct plan *plan);
int map_for(const struct plan *plan, pid_t init, struct report *why);
int map_ids(const struct plan *plan, struct report *why);
void share_limits(void);
int isolate(const struct birth *birth, struct report *why);				/* isolate.c */
int private_mounts(struct report *why);
int fresh_proc(struct report *why);
int private_root(const struct plan *plan, struct report *why);				/* root.c */
bool plan_has_root(const struct plan *plan);
int show_sealed(int root, const char *path, int at, const char *source, bool directory, struct report *why);
int enter_root(int root, struct report *why);
int overlay_begin(const struct plan *plan, struct report *why);				/* overlay.c */
int overlay_show(int root, const struct plan *plan, const char *path, const char *source, struct report *why);
int overlay_end(int root, const struct plan *plan, struct report *why);
int mount_dev(int root, const struct plan *plan, struct report *why);			/* dev.c */
int mount_tmpfs(int64_t bytes, const char *mode, int64_t uid, int64_t gid);
int mount_proc(int root, bool make, struct report *why);				/* procfs.c */
int mount_sys(int root, const struct plan *plan, struct report *why);
int mask_all(int root, const struct plan *plan, struct report *why);
int mount_work(int root, const struct plan *plan, struct report *why);			/* volume.c */
int mount_volumes(int root, const struct plan *plan, struct report *why);
int idmap_prepare(const struct plan *plan, struct report *why);				/* idmap.c */
int idmap_volume(int i, int mount);
int name_user(int root, const struct plan *plan, struct report *why);			/* identity.c */
int own_output(const struct birth *birth, struct report *why);
int become_the_job(const struct plan *plan, struct report *why);
bool filter_parse(const char *text);							/* seccomp.c */
int filter_calls(const char *text, struct report *why);
int bring_up_loopback(struct report *why);
_Noreturn void command_main(const struct birth *birth);					/* command.c */
void probe_all(void);									/* probe.c */
int tell_server(const struct report *why);							/* main.c */

#endif
