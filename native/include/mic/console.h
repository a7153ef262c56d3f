/* virtio-console, both halves (VOP 8.6, 9.3). Queue 0 = to the card, queue 1 = from the card.
 *
 * device  backend process: a pty of the host, a log file, and clients over a Unix socket.
 * driver  card OS: the rings <-> a pty master of the card.
 *
 * A client (the CLI) reads the card's bytes as they are, and writes messages: type u8, length u16
 * (little endian), then `length` bytes. Type 1 = input for the card, type 2 = window size (cols u16,
 * rows u16). Any other type ends the connection. */
#ifndef MIC_CONSOLE_H
#define MIC_CONSOLE_H

#include <stdint.h>

#include "mic/vring.h"

/* cffi-begin */
enum mic_con_run {
	MIC_RUN_RESIZE = 5 /* a client sent a window size: mic_con_dev_size() */
};

enum mic_con_msg { MIC_CON_MSG_INPUT = 1, MIC_CON_MSG_SIZE = 2 };

struct mic_con_stats {
	uint64_t to_card_bytes, from_card_bytes;
	uint64_t log_errors;  /* failed writes; last_log_errno says why */
	uint64_t pty_lost;    /* bytes that no reader of the pty took in time */
	uint64_t client_lost; /* bytes that slow clients missed */
	uint64_t clients_seen, clients_refused;
	uint32_t clients;
	int last_log_errno;
};

struct mic_con_dev;

/* pty_fd: non-blocking master whose slave was opened once and closed again (so that the absence of a
 * reader shows), or -1. log_fd: file opened for appending, or -1. listen_fd: non-blocking listening
 * Unix socket, or -1. All stay the caller's. NULL with errno set on failure. */
struct mic_con_dev *mic_con_dev_create(struct mic_vdev *dev, int pty_fd, int log_fd, int listen_fd);
/* Clients of this group are welcome, too. */
void mic_con_dev_admit(struct mic_con_dev *cd, uint32_t group);
void mic_con_dev_destroy(struct mic_con_dev *cd);
/* Serve until something needs a decision: enum mic_run or MIC_RUN_RESIZE. */
int mic_con_dev_run(struct mic_con_dev *cd);
/* Window size that the last client sent: columns << 16 | rows. */
uint32_t mic_con_dev_size(const struct mic_con_dev *cd);
void mic_con_dev_stats(const struct mic_con_dev *cd, struct mic_con_stats *out);

struct mic_con_drv;

/* local_fd: non-blocking pty master (or socket) of the card. area: card physical address of `len`
 * bytes of GDDR for buffers, 4 KiB each, at least two per direction.
 * NULL with errno: EINVAL, EFAULT, ENOSPC, ENOMEM. */
struct mic_con_drv *mic_con_drv_create(struct mic_vdrv *drv, int local_fd, uint64_t area, uint64_t len);
void mic_con_drv_destroy(struct mic_con_drv *cd);
/* Run until stop_fd is readable (MIC_RUN_CONTROL), the local end is closed (MIC_RUN_LOCAL) or the
 * device breaks a ring (-EIO). A pty that nobody has open is not the end. */
int mic_con_drv_run(struct mic_con_drv *cd);
void mic_con_drv_stats(const struct mic_con_drv *cd, struct mic_con_stats *out);
/* cffi-end */

#endif
