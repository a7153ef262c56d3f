/* NBD server over the card's block driver: how Unix tools reach the card's disk.
 *
 * Fixed newstyle negotiation, simple and structured replies. One thread serves all clients; payload
 * goes between socket and GDDR without a copy of its own. */
#ifndef MIC_NBD_H
#define MIC_NBD_H

#include <stdbool.h>
#include <stdint.h>

#include "mic/block.h"

/* cffi-begin */
#define MIC_NBD_CLIENTS     16        /* at once; more wait in the listen queue */
#define MIC_NBD_MAX_PAYLOAD 0x2000000 /* 32 MiB: the largest READ or WRITE */

struct mic_nbd_stats {
	uint64_t clients_ever, requests, bytes_read, bytes_written, bad_clients;
	uint32_t clients_now;
};

struct mic_nbd;

/* listen_fd: a listening stream socket, kept by the caller and set non-blocking here. name: the export (the
 * empty name is always accepted too). read_only: refuse writes. NULL with errno. */
struct mic_nbd *mic_nbd_create(struct mic_blk_drv *drv, int listen_fd, const char *name, bool read_only);
/* The longest spin in microseconds (default MIC_SPIN_US; 0: always sleeps). */
void mic_nbd_spin(struct mic_nbd *nbd, unsigned spin_us);
/* Serve until stop_fd is readable (returns 0), the device is gone (-ESHUTDOWN, -EIO: all clients have
 * been disconnected), a signal (-EINTR: call again) or an errno. May run in any thread, one at a time. */
int mic_nbd_run(struct mic_nbd *nbd, int stop_fd);
/* Disconnects all clients and waits for what the device still holds (unless it is gone). */
void mic_nbd_destroy(struct mic_nbd *nbd);
void mic_nbd_stats(const struct mic_nbd *nbd, struct mic_nbd_stats *out);
/* cffi-end */

#endif
