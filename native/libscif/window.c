/* register and unregister (SCIF 2.10, 2.11). */
#include "memory.h"

#include <stdlib.h>
#include <string.h>

static pthread_mutex_t register_lock = PTHREAD_MUTEX_INITIALIZER;

int check_connected(struct ep *ep)
{
	int rc = ep_attach(ep);

	if (rc < 0)
		return rc;
	return mic_load_acquire(&ep->ctl->state) == MIC_SCIF_EP_CONNECTED ? 0 : -ECONNRESET;
}

/* Rows 1-5 of SCIF 2.10. */
static int check_args(uintptr_t addr, size_t len, off_t offset, int prot, int flags)
{
	if (flags & ~SCIF_MAP_FIXED)
		return -EINVAL;
	if ((flags & SCIF_MAP_FIXED) && (offset < 0 || offset % (off_t)PAGE || (uint64_t)offset + len < len ||
					 (uint64_t)offset + len > (uint64_t)INT64_MAX + 1))
		return -EINVAL;
	if (prot & ~(SCIF_PROT_READ | SCIF_PROT_WRITE))
		return -EINVAL;
	if (!len || len % PAGE || addr % PAGE)
		return -EINVAL;
	return 0;
}

void window_after_fork_child(void)
{
	pthread_mutex_init(&register_lock, NULL); /* another thread of the parent may have held it */
}

/* Tell the node about memory that the program has freed since, now or when it is time to look. True: some. */
static bool give_back(struct ep *ep, bool now)
{
	const uint32_t at_once = (MIC_SCIF_PACKET - 256) / sizeof(struct mic_scif_seg);
	struct seglist gone = {0};

	pieces_gone(ep->mem_dev, ep->mem_ino, now, &gone);
	for (uint32_t i = 0; i < gone.n; i += at_once) {
		uint32_t n = gone.n - i < at_once ? gone.n - i : at_once;
		const struct mic_scif_request rq = {
			.op = MIC_SCIF_DROP, .sid = ep->sid, .ndata = (uint32_t)(n * sizeof *gone.seg)};
		struct answer ans = {0};

		node_call(&rq, gone.seg + i, &ans, false);
		answer_close(&ans);
	}
	free(gone.seg);
	return gone.n;
}

static int commit(struct ep *ep, uint64_t ticket, const struct seglist *segs, uint64_t *offset)
{
	const struct mic_scif_request rq = {.op = MIC_SCIF_REG_COMMIT,
					    .sid = ep->sid,
					    .a = {ticket},
					    .ndata = (uint32_t)(segs->n * sizeof *segs->seg)};
	struct answer ans = {0};
	int rc = segs->n * sizeof *segs->seg > MIC_SCIF_PACKET - 256 ? -ENOMEM
								     : node_call(&rq, segs->seg, &ans, false);

	answer_close(&ans);
	*offset = ans.head.v[0];
	return rc;
}

static int do_register(struct ep *ep, uintptr_t addr, size_t len, off_t offset, int prot, int flags,
		       uint64_t *out)
{
	int64_t bytes = move_plan(addr, len, ep->mem_dev, ep->mem_ino, prot);
	const struct mic_scif_request rq = {
		.op = MIC_SCIF_REG_BEGIN,
		.sid = ep->sid,
		.a = {(uint64_t)offset, len, (uint64_t)prot, flags & SCIF_MAP_FIXED,
		      bytes > 0 ? (uint64_t)bytes : 0},
	};
	struct answer ans = {0};
	struct seglist segs = {0};
	bool moved = false;
	int rc = node_call(&rq, NULL, &ans, false);

	if (rc == -ENOMEM && give_back(ep, true))
		rc = node_call(&rq, NULL, &ans, false);
	if (rc < 0)
		return rc; /* the place in the address space is checked before the memory */
	const struct mic_scif_seg room = {ans.head.v[1], bytes > 0 ? (uint64_t)bytes : 0};

	rc = bytes < 0 ? (int)bytes : answer_has(&ans, 1);
	if (rc == 0)
		rc = move_range(addr, len, ans.fds[0], ep->mem_dev, ep->mem_ino, &room, &segs, &moved);
	if (rc == 0)
		rc = commit(ep, ans.head.v[0], &segs, out);
	else
		node_ask(MIC_SCIF_REG_ABORT, ep->sid, ans.head.v[0], moved, NULL);
	answer_close(&ans);
	free(segs.seg);
	return rc;
}

API off_t scif_register(scif_epd_t epd, void *addr, size_t len, off_t offset, int prot_flags, int map_flags)
{
	uint64_t at = 0;
	struct ep *ep;
	int saved = errno, rc = ep_get(epd, &ep);

	if (rc < 0)
		return fail(rc);
	rc = check_args((uintptr_t)addr, len, offset, prot_flags, map_flags);
	if (rc == 0)
		rc = check_connected(ep);
	if (rc == 0) {
		pthread_mutex_lock(&register_lock);
		give_back(ep, false);
		rc = do_register(ep, (uintptr_t)addr, len, offset, prot_flags, map_flags, &at);
		pthread_mutex_unlock(&register_lock);
	}
	ep_put(ep);
	if (rc < 0)
		return fail(rc);
	errno = saved;
	return (off_t)at;
}

API int scif_unregister(scif_epd_t epd, off_t offset, size_t len)
{
	struct ep *ep;
	int rc = ep_get(epd, &ep);

	if (rc < 0)
		return fail(rc);
	if (!len || len % PAGE || offset < 0 || offset % (off_t)PAGE ||
	    (uint64_t)offset + len > (uint64_t)INT64_MAX + 1 || (uint64_t)offset + len < len)
		rc = -EINVAL;
	if (rc == 0)
		rc = check_connected(ep);
	if (rc == 0)
		rc = node_ask(MIC_SCIF_UNREGISTER, ep->sid, (uint64_t)offset, len, NULL);
	ep_put(ep);
	return rc < 0 ? fail(rc) : 0;
}
