/*
 * How much of the log is kept (docs/formats.md, Retention): data and index of all segments together never exceed the limit.
 *
 * A segment is taken away whole, the oldest first, and never the one that is written to: nothing is renamed and no offset changes.
 * Where each begins and how large it is stands in a ring of fixed size. A segment and what is written at once are an eighth of the
 * limit at most (log.c), so taking away is always enough. The server makes them no smaller than a 64th, so the ring is long enough;
 * if failed writes have ended many of them early it is not, and then the oldest goes before its time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include "jobrunner.h"

#define RING 128
#define RECORD sizeof(struct index_record)
#define TAIL (2 * RECORD)	/* kept free for the gap and the end that the last segment may have to tell */

static struct {
	int dir;
	bool stops;
	uint64_t limit, kept;		/* bytes; a limit of 0 is none */
	unsigned int first, count;
	struct { uint64_t base, size; } ring[RING];
} all;

void segment_names(uint64_t base, char data[SEGMENT_NAME], char index[SEGMENT_NAME])
{
	snprintf(data, SEGMENT_NAME, "%016llx", (unsigned long long)base);
	snprintf(index, SEGMENT_NAME, "%016llx.idx", (unsigned long long)base);
}

void retention_open(int dir, int64_t limit, bool stops)
{
	all.dir = dir;
	all.limit = limit > 0 ? (uint64_t)limit : 0;
	all.stops = stops;
}

/* Order: the index first, because a segment is there for readers if its index is. False if it cannot be taken away. */
static bool drop_oldest(void)
{
	char data[SEGMENT_NAME], index[SEGMENT_NAME];
	segment_names(all.ring[all.first].base, data, index);
	if ((unlinkat(all.dir, index, 0) != 0 && errno != ENOENT) || (unlinkat(all.dir, data, 0) != 0 && errno != ENOENT))
		return false;
	all.kept -= all.ring[all.first].size;
	all.first = (all.first + 1) % RING;
	all.count--;
	return true;
}

/*
 * How many of `size` bytes may be written now, with this many records about them. Fewer than all, and then told as past the limit,
 * only where the job is to be stopped at the limit. Otherwise 0 means that what should go cannot be taken away.
 */
size_t retention_room(size_t size, size_t records)
{
	if (!all.limit)
		return size;
	uint64_t more = records * RECORD + TAIL;
	if (all.stops) {
		uint64_t room = all.kept + more < all.limit ? all.limit - all.kept - more : 0;
		return size < room ? size : (size_t)room;
	}
	while (all.kept + more + size > all.limit)
		if (all.count < 2 || !drop_oldest())
			return 0;
	return size;
}

/* A new segment is there, and empty. */
void retention_begin(uint64_t base)
{
	if (!all.limit || all.stops)
		return;		/* nothing is ever taken away, the sum is enough */
	if (all.count == RING && !drop_oldest()) {
		/* It stays on the disk, and counted: the next ones go in its place. */
		all.first = (all.first + 1) % RING;
		all.count--;
	}
	unsigned int last = (all.first + all.count++) % RING;
	all.ring[last].base = base;
	all.ring[last].size = 0;
}

/* So many bytes were written to the newest segment. */
void retention_grow(size_t size)
{
	all.kept += size;
	if (all.count)
		all.ring[(all.first + all.count - 1) % RING].size += size;
}
