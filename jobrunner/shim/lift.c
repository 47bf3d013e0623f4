/*
 * Limits that a job no longer has when it is to die, because they would hold its death up. Dying takes CPU time, and hundreds of
 * processes under a small CPU limit would take minutes to die. A process that waits for the disk takes no signal, SIGKILL neither, and
 * what a small limit of the disk's holds back may take days.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "jobrunner.h"

#define NO_V1_LIMIT "0"
#define NO_V2_LIMIT "rbps=max wbps=max riops=max wiops=max"

/* One line for each device that has a limit: `MAJOR:MINOR NUMBER` in v1's files, `MAJOR:MINOR rbps=NUMBER ...` in io.max. */
static void lift_io(int file)
{
	char order[128];
	if (!read_text(file))
		return;
	for (char *line = scratch, *end; (end = strchr(line, '\n')); line = end + 1) {
		*end = '\0';
		int length = snprintf(order, sizeof order, "%.*s %s", (int)strcspn(line, " "), line,
				      strchr(line, '=') ? NO_V2_LIMIT : NO_V1_LIMIT);
		if (length < (int)sizeof order)
			write_all(file, order, (size_t)length);
	}
}

void lift_limits(const struct places *places)
{
	for (int i = 0; i < places->n_cpu_quotas; i++)
		write_all(places->cpu_quotas[i], places->no_quota, strlen(places->no_quota));
	for (int i = 0; i < places->n_io_limits; i++)
		lift_io(places->io_limits[i]);
}
