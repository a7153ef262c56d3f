/* The 22 calls of libscif for the Python API, which has the library compiled in: a call costs what the C
 * call costs. Types as in scif.h, which must not be included beside this. */
#ifndef MIC_SCIF_USER_H
#define MIC_SCIF_USER_H

#include <stddef.h>
#include <stdint.h>

/* cffi-begin */
struct scif_portID {
	uint16_t node;
	uint16_t port;
};
struct scif_pollepd {
	int epd;
	short events;
	short revents;
};
int scif_open(void);
int scif_close(int epd);
int scif_bind(int epd, uint16_t pn);
int scif_listen(int epd, int backlog);
int scif_connect(int epd, struct scif_portID *dst);
int scif_accept(int epd, struct scif_portID *peer, int *newepd, int flags);
int scif_send(int epd, void *msg, int len, int flags);
int scif_recv(int epd, void *msg, int len, int flags);
int64_t scif_register(int epd, void *addr, size_t len, int64_t offset, int prot_flags, int map_flags);
int scif_unregister(int epd, int64_t offset, size_t len);
void *scif_mmap(void *addr, size_t len, int prot_flags, int map_flags, int epd, int64_t offset);
int scif_munmap(void *addr, size_t len);
int scif_readfrom(int epd, int64_t loffset, size_t len, int64_t roffset, int rma_flags);
int scif_writeto(int epd, int64_t loffset, size_t len, int64_t roffset, int rma_flags);
int scif_vreadfrom(int epd, void *addr, size_t len, int64_t offset, int rma_flags);
int scif_vwriteto(int epd, void *addr, size_t len, int64_t offset, int rma_flags);
int scif_fence_mark(int epd, int flags, int *mark);
int scif_fence_wait(int epd, int mark);
int scif_fence_signal(int epd, int64_t loff, uint64_t lval, int64_t roff, uint64_t rval, int flags);
int scif_get_nodeIDs(uint16_t *nodes, int len, uint16_t *self);
int scif_poll(struct scif_pollepd *epds, unsigned int nepds, long timeout);
/* cffi-end */

#endif
