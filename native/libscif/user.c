/* Buffers of the caller: EFAULT instead of a signal (SCIF-67).
 *
 * The kernel would find out while it copies. Here the pages are populated first, which fails for
 * exactly the same ones; pages that were fine are remembered, so that a program that uses the same
 * buffers again pays nothing. */
#include "internal.h"

#include <sys/mman.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

#define SEEN 64
#define USER_END 0x7ffffffff000ull

static uintptr_t seen_read[SEEN], seen_write[SEEN];

/* Before Linux 5.14 there is no such advice; there a bad buffer is a signal. */
static bool can_populate(void)
{
	static uint32_t known; /* 1 no, 2 yes */
	uint32_t k = mic_load_relaxed(&known);

	if (!k) {
		uintptr_t here = (uintptr_t)&known & ~(PAGE - 1);

		k = madvise((void *)here, PAGE, MADV_POPULATE_READ) == 0 ? 2 : 1;
		mic_store_relaxed(&known, k);
	}
	return k == 2;
}

static int populate(uintptr_t first, uintptr_t end, int advice)
{
	int saved = errno, rc = 0;

	if (can_populate() && madvise((void *)first, end - first, advice) < 0)
		rc = -EFAULT;
	errno = saved;
	return rc;
}

static int check(const void *p, size_t len, uintptr_t *seen, int advice)
{
	uintptr_t first = (uintptr_t)p & ~(PAGE - 1);
	uintptr_t last = ((uintptr_t)p + len - 1) & ~(PAGE - 1);

	if ((uintptr_t)p + len < (uintptr_t)p || last >= USER_END || first < PAGE)
		return -EFAULT;
	if (last - first < 2 * PAGE) {
		bool known = true;

		for (uintptr_t a = first; a <= last; a += PAGE)
			known &= mic_load_relaxed(&seen[(a / PAGE) % SEEN]) == a;
		if (known)
			return 0;
	}
	int rc = populate(first, last + PAGE, advice);

	if (!rc && last - first < 2 * PAGE)
		for (uintptr_t a = first; a <= last; a += PAGE)
			mic_store_relaxed(&seen[(a / PAGE) % SEEN], a);
	return rc;
}

int user_readable(const void *p, size_t len)
{
	return check(p, len, seen_read, MADV_POPULATE_READ);
}

int user_writable(void *p, size_t len)
{
	return check(p, len, seen_write, MADV_POPULATE_WRITE);
}
