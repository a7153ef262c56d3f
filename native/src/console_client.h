/* Clients of a card's console: who may come, what they are shown, what they type (console_dev.c is the only
 * user). */
#ifndef MIC_CONSOLE_CLIENT_H
#define MIC_CONSOLE_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "mic/console.h"

#define CON_CLIENTS 8u
#define CON_HISTORY 4096u /* what a new client is shown */
#define CON_INPUT   8192u /* typed bytes that wait for buffers of the card */
#define CON_PIECE   4096u /* of the card's output: the most that is shown at once */
#define CON_STALL   1000u /* ms: a reader that takes nothing for so long is not waited for */

/* Typed bytes, a ring. */
struct con_input {
	uint8_t bytes[CON_INPUT];
	uint32_t first, len;
};

/* Its free space in one piece. */
static inline uint32_t con_input_space(struct con_input *in, uint8_t **at)
{
	uint32_t end = (in->first + in->len) % CON_INPUT, room = CON_INPUT - in->len;

	*at = in->bytes + end;
	return room < CON_INPUT - end ? room : CON_INPUT - end;
}

struct con_client;

struct con_clients {
	int listen_fd, epoll_fd;
	int64_t group; /* whose members are welcome, -1: nobody's */
	struct mic_con_stats *stats;
	struct con_client *client[CON_CLIENTS];
	uint8_t history[CON_HISTORY];
	uint64_t history_end; /* bytes ever shown */
	uint32_t size;        /* of the window, as the last client said: columns << 16 | rows */
	bool resized;         /* it said so since this was cleared */
};

/* Descriptors stay the caller's; new clients are added to epoll_fd. */
void con_clients_init(struct con_clients *cs, int listen_fd, int epoll_fd, struct mic_con_stats *stats);
void con_clients_fini(struct con_clients *cs);
/* Have all clients room for another piece, or are they not waited for? */
bool con_clients_ready(struct con_clients *cs);
/* Show a piece, at most CON_PIECE bytes, to all. */
void con_clients_show(struct con_clients *cs, const uint8_t *from, uint32_t len);
/* A new one, if there is any; send and receive what is possible. Nonzero: something moved. */
int con_clients_accept(struct con_clients *cs);
int con_clients_serve(struct con_clients *cs, struct con_input *in);

/* Add fd, unless it is -1, to an epoll set. 0, or -1 with errno. */
int con_watch(int epoll_fd, int fd, uint32_t events);

#endif
