/* One open file: the card's memory, the device, the descriptors to sleep on. */
#ifndef LIBMICVOP_FILE_H
#define LIBMICVOP_FILE_H

#include "internal.h"
#include "mic/copy_desc.h"

struct mic_vop {
	struct vop_wire wire;
	struct mic_bus *bus;
	int card_fds[MIC_FD_COUNT];
	unsigned card_nfds;
	int epoll;
	bool compat;
	uint64_t page; /* offset of the device page in host memory */

	bool added, removed, driver_ok; /* the last: as mic_vop_wait() told it last */
	struct mic_device_desc shape;   /* our own copy: the card may rewrite the page (VOP-50) */
	unsigned num;
	uint64_t offered, accepted;
	uint64_t blocks[MIC_MAX_VRINGS];
	int kick_fd;
	bool wants_dma;
	int owner_fd; /* asks the host for copies by DMA; -1: the CPU copies */
	struct mic_vdev vdev;
	struct mic_copy *copy[MIC_MAX_VRINGS];
	unsigned generation; /* resets so far */
	unsigned news;       /* MIC_VOP_ flags that the next wait returns */
};

/* Ask the host, answering the card meanwhile. 0 and the answer, or -errno: the host's own, too. */
int vop_ask(struct mic_vop *f, const char *text, size_t len, struct vop_line *answer);
/* Everything that is there already: the host's messages, the card's hand-shakes. */
int vop_serve(struct mic_vop *f, struct vop_line *answer);
/* The device's hand-shakes (VOP 4.3 step 11, 4.5, 4.6). */
void vop_handshake(struct mic_vop *f);
int vop_add_block(struct mic_vop *f, const void *block);
/* Sleep on the file and perhaps `fd`; 1 when there is something, 0 on time-out, 2: only fd. */
int vop_sleep(struct mic_vop *f, int timeout_ms, int fd);
/* Send what COPY_DESC has moved. */
void vop_tell_counters(struct mic_vop *f);

#endif
