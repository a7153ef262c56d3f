/* scif_mmap and scif_munmap: the peer's pages in this process (SCIF 2.12).
 *
 * Each mapping keeps a descriptor of its endpoint, so the endpoint stays open as long as it exists
 * (SCIF-101), and is counted at the node, so the pages stay too (SCIF-91). */
#include "memory.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HIGH_FD 512

struct mapping {
	uintptr_t addr;
	size_t len;
	uint64_t sid;
	off_t offset;
	int fd; /* shared by the parts of one scif_mmap: closed with the last */
	uint64_t
		cookie; /* the socket behind it: a program that closes what it does not know closes it, too */
	struct mapping *next;
};

static struct mapping *mappings;
static pthread_mutex_t map_lock = PTHREAD_MUTEX_INITIALIZER;

/* Close the descriptor of a mapping that is no longer in the list, unless others share it. */
static void close_fd(const struct mapping *gone)
{
	uint64_t cookie;

	for (const struct mapping *m = mappings; m; m = m->next)
		if (m->fd == gone->fd && m->cookie == gone->cookie)
			return;
	if (socket_cookie(gone->fd, &cookie) == 0 && cookie == gone->cookie)
		close(gone->fd);
}

static struct mapping *split(struct mapping *m, uintptr_t at)
{
	struct mapping *tail = malloc(sizeof *tail);

	if (!tail)
		return NULL;
	*tail = *m;
	m->len = at - m->addr;
	tail->addr = at;
	tail->len -= m->len;
	tail->offset += (off_t)m->len;
	m->next = tail;
	return tail;
}

/* Forget mappings in [addr, end) and tell the node. The caller unmaps or has mapped something else. */
static void drop(uintptr_t addr, uintptr_t end)
{
	struct mapping **link = &mappings;

	while (*link) {
		struct mapping *m = *link;

		if (m->addr + m->len <= addr || m->addr >= end) {
			link = &m->next;
			continue;
		}
		if (m->addr < addr) {
			if (!split(m, addr))
				return;
			link = &m->next;
			continue;
		}
		if (m->addr + m->len > end && !split(m, end))
			return;
		*link = m->next;
		node_ask(MIC_SCIF_MUNMAP, m->sid, (uint64_t)m->offset, m->len, NULL);
		close_fd(m);
		free(m);
	}
}

static void *map_segments(uintptr_t addr, size_t len, int prot, int flags, const struct answer *ans)
{
	const struct mic_scif_seg *seg = ans->data;
	uint8_t *base = (uint8_t *)addr;
	size_t at = 0;

	if (!(flags & MAP_FIXED))
		base = mmap((void *)addr, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return NULL;
	for (uint64_t i = 0; i < ans->head.v[0] && at < len; at += seg[i++].len)
		if (mmap(base + at, seg[i].len, prot, MAP_SHARED | MAP_FIXED, ans->fds[0],
			 (off_t)seg[i].off) == MAP_FAILED) {
			munmap(base, len);
			return NULL;
		}
	madvise(base, len, MADV_DONTFORK); /* SCIF-100 */
	madvise(base, len, MADV_DONTDUMP);
	return base;
}

static int record(const void *addr, size_t len, int epd, const struct ep *ep, off_t offset)
{
	struct mapping *m = malloc(sizeof *m);

	if (!m)
		return -ENOMEM;
	*m = (struct mapping){(uintptr_t)addr, len,     ep->sid, offset, fcntl(epd, F_DUPFD_CLOEXEC, HIGH_FD),
			      ep->cookie,      mappings};
	if (m->fd < 0)
		m->fd = fcntl(epd, F_DUPFD_CLOEXEC, 0);
	if (m->fd < 0) {
		int rc = -errno;

		free(m);
		return rc;
	}
	mappings = m;
	return 0;
}

static int do_mmap(struct ep *ep, int epd, void **addr, size_t len, int prot, int flags, off_t offset)
{
	const struct mic_scif_request rq = {
		.op = MIC_SCIF_MMAP, .sid = ep->sid, .a = {(uint64_t)offset, len, (uint64_t)prot}};
	struct answer ans = {.max = MIC_SCIF_PACKET, .data = malloc(MIC_SCIF_PACKET)};
	void *p = NULL;
	int rc = ans.data ? node_call(&rq, NULL, &ans, false) : -ENOMEM;

	if (rc == 0) {
		if ((flags & MAP_FIXED))
			drop((uintptr_t)*addr, (uintptr_t)*addr + len);
		rc = answer_has(&ans, 1);
		p = rc == 0 ? map_segments((uintptr_t)*addr, len, prot, flags, &ans) : NULL;
		if (rc == 0)
			rc = p ? record(p, len, epd, ep, offset) : -ENOMEM;
		if (rc < 0) {
			if (p)
				munmap(p, len);
			node_ask(MIC_SCIF_MUNMAP, ep->sid, (uint64_t)offset, len, NULL);
		}
	}
	answer_close(&ans);
	free(ans.data);
	*addr = p;
	return rc;
}

API void *scif_mmap(void *addr, size_t len, int prot_flags, int map_flags, scif_epd_t epd, off_t offset)
{
	struct ep *ep;
	int saved = errno, rc = ep_get(epd, &ep);

	if (rc == -ENOTTY) /* some other file: what mmap does */
		return mmap(addr, len, prot_flags, map_flags | MAP_SHARED, epd, offset);
	if (rc < 0) {
		errno = -rc;
		return SCIF_MMAP_FAILED;
	}
	if (!len || page_up(len) < len || offset % (off_t)PAGE ||
	    (map_flags & ~(MAP_FIXED | MAP_POPULATE | MAP_SHARED)) ||
	    ((map_flags & MAP_FIXED) && (uintptr_t)addr % PAGE))
		rc = -EINVAL;
	if (rc == 0)
		rc = check_connected(ep);
	if (rc == 0) {
		pthread_mutex_lock(&map_lock);
		rc = do_mmap(ep, epd, &addr, page_up(len), prot_flags, map_flags, offset);
		pthread_mutex_unlock(&map_lock);
	}
	ep_put(ep);
	errno = rc < 0 ? -rc : saved;
	return rc < 0 ? SCIF_MMAP_FAILED : addr;
}

API int scif_munmap(void *addr, size_t len)
{
	int saved = errno;

	if ((uintptr_t)addr % PAGE || !len || page_up(len) < len)
		return fail(-EINVAL);
	pthread_mutex_lock(&map_lock);
	if (munmap(addr, page_up(len)) < 0) {
		pthread_mutex_unlock(&map_lock);
		return -1;
	}
	drop((uintptr_t)addr, (uintptr_t)addr + page_up(len));
	pthread_mutex_unlock(&map_lock);
	errno = saved;
	return 0;
}

void map_after_fork_child(void)
{
	pthread_mutex_init(&map_lock, NULL);
	while (mappings) { /* the pages are not here, so neither are the references */
		struct mapping *m = mappings;

		mappings = m->next;
		close_fd(m);
		free(m);
	}
}
