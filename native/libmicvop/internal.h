/* libmicvop inside: messages of the host process (wire.c), the device and its hand-shakes (file.c).
 *
 * Functions of this header return a count or 0, or -errno; only the public ones touch errno. */
#ifndef LIBMICVOP_INTERNAL_H
#define LIBMICVOP_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "mic/bus.h"
#include "mic/vring.h"
#include "mic_vop.h"

#define API      __attribute__((visibility("default")))
#define LINE_MAX 4096  /* the host's longest answer has some hundred bytes */
#define REPLY_MS 30000 /* the host's own limits are shorter */
#define MAX_FDS  64

/* One message: a JSON line, and the descriptors that came with it. */
struct vop_line {
	char text[LINE_MAX];
	int fds[MAX_FDS];
	unsigned nfds;
};

struct vop_wire {
	int sock;
	char in[LINE_MAX];
	size_t have;
	int fds[MAX_FDS];
	unsigned nfds;
};

int vop_wire_connect(struct vop_wire *w, const char *path);
void vop_wire_close(struct vop_wire *w);
/* As the real close: back when the device has left the card, so that what it held is free (VOP 4.7). The host
 * answers the card's hand-shakes meanwhile. */
void vop_wire_goodbye(struct vop_wire *w);
/* 1: `line` is filled, its descriptors are the caller's; 0: not complete yet. -ENODEV: the host has gone. */
int vop_wire_recv(struct vop_wire *w, struct vop_line *line);
int vop_wire_send(struct vop_wire *w, const char *text, size_t len);

/* Values of a JSON line by key. The host writes it; its texts cannot hold an unescaped quote. */
bool vop_number(const char *text, const char *key, uint64_t *value);
unsigned vop_numbers(const char *text, const char *key, uint64_t *values, unsigned max);
bool vop_word(const char *text, const char *key, const char *word);

#endif
