/* Buffers of the caller: EFAULT instead of a signal (SCIF-67).
 *
 * The kernel would find out while it copies. Here the pages are populated first, which fails for
 * exactly the same ones; pages that were fine are remembered, so that a program that uses the same
 * buffers again pays nothing. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ  22
#define MADV_POPULATE_WRITE 23
#endif

#define SEEN      64
#define MAX_PAGES (PAGE - 1) /* of a remembered range: the count lives in the low bits of its address */
#define USER_END  0x7ffffffff000ull

static uintptr_t seen_read[SEEN], seen_write[SEEN]; /* address of the first page | pages */

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
	uintptr_t *slot = &seen[(first / PAGE) % SEEN], known = mic_load_relaxed(slot);
	size_t n = (last - first) / PAGE + 1;

	if ((known & ~(PAGE - 1)) == first && (known & (PAGE - 1)) >= n)
		return 0;
	int rc = populate(first, last + PAGE, advice);

	if (!rc && n <= MAX_PAGES)
		mic_store_relaxed(slot, first | n);
	return rc;
}

/* memcheck takes msync for an access, and what lies beside a small buffer in its page for a mistake. */
static bool under_valgrind(void)
{
	static uint32_t known; /* 1 no, 2 yes */
	uint32_t k = mic_load_relaxed(&known);

	if (!k) {
		const char *preload = getenv("LD_PRELOAD");

		k = preload && strstr(preload, "/vgpreload_") ? 2 : 1;
		mic_store_relaxed(&known, k);
	}
	return k == 2;
}

static bool resident(uintptr_t first, uintptr_t end)
{
	unsigned char pages[256];

	for (size_t n; first < end; first += n) {
		n = end - first < sizeof pages * PAGE ? end - first : sizeof pages * PAGE;
		if (mincore((void *)first, n, pages) < 0)
			return false;
	}
	return true;
}

/* Asks for write-back of memory that has none: all that it does is to look for holes, in a tenth of a
 * microsecond whatever the length. */
int user_mapped(const void *p, size_t len)
{
	uintptr_t first = (uintptr_t)p & ~(PAGE - 1), end = ((uintptr_t)p + len + PAGE - 1) & ~(PAGE - 1);
	int saved = errno, rc = 0;

	if (under_valgrind() ? !resident(first, end) : msync((void *)first, end - first, MS_ASYNC) < 0)
		rc = -EFAULT;
	errno = saved;
	return rc;
}

int user_present(const void *p, size_t len)
{
	return populate((uintptr_t)p & ~(PAGE - 1), ((uintptr_t)p + len + PAGE - 1) & ~(PAGE - 1),
			MADV_POPULATE_READ);
}

int user_readable(const void *p, size_t len)
{
	return check(p, len, seen_read, MADV_POPULATE_READ);
}

int user_writable(void *p, size_t len)
{
	return check(p, len, seen_write, MADV_POPULATE_WRITE);
}
