/* Inside the NBD server: clients, jobs and pieces. One thread owns all of it.
 *
 * A job is one NBD request. Its data is split into pieces; a piece is one virtio request and its GDDR
 * pages. Jobs of a client are answered in the order they came: the disk works in that order anyway, and
 * a job can then never wait for memory that a later one holds. */
#ifndef MIC_NBD_INTERNAL_H
#define MIC_NBD_INTERNAL_H

#include "mic/nbd.h"
#include "nbd_proto.h"

#define NBD_INBUF    16384u
#define NBD_OUTBUF   4096u
#define NBD_MAX_JOBS 256u        /* per client */
#define NBD_PIECE    (1u << 20)  /* the largest piece */
#define NBD_SHARE    (64u << 10) /* bytes of the pool that every connected client can count on */

struct nbd_client;

struct nbd_piece {
	struct mic_blk_req req;
	struct nbd_client *client;
	struct nbd_job *job;
	struct nbd_piece *next;   /* in the job's or the client's list */
	struct nbd_piece *queued; /* in the server's queue */
	uint64_t offset;          /* in the export */
	uint32_t len;             /* payload bytes */
	uint32_t filled;          /* WRITE: received so far */
	uint32_t room;            /* bytes of the pool it holds */
	bool done;
	uint8_t head_len; /* reply header, then data_len bytes at req.addr */
	uint8_t head[28];
	uint32_t data_len;
};

struct nbd_job {
	struct nbd_job *next;
	uint64_t cookie, offset;
	uint32_t length, next_off; /* bytes; next_off: not yet given to the disk */
	uint16_t type, flags;
	int error;                       /* errno of the first piece that failed */
	unsigned outstanding;            /* pieces at the disk or in its queue */
	bool begun;                      /* the reply header has been queued */
	bool flushing;                   /* FUA: the flush after the data was started */
	struct nbd_piece *first, **tail; /* READ: pieces whose reply is not queued yet */
};

enum nbd_phase { NBD_GREETING, NBD_OPTIONS, NBD_TRANSMISSION };

struct nbd_client {
	int fd;
	struct mic_nbd *nbd;
	enum nbd_phase phase;
	bool no_zeroes, structured;
	bool closing;             /* disconnect when the output is sent */
	bool broken;              /* disconnect at the next safe point */
	bool dead;                /* socket closed; waits for its pieces to come back */
	bool stalled;             /* waits for pool pages */
	bool dirty;               /* something came back since the last pump */
	uint32_t events;          /* epoll interest now */
	uint64_t skip;            /* input bytes to drop */
	uint32_t skipped_option;  /* answer TOO_BIG after the skip; 0 = none */
	uint32_t in_at, in_len;   /* unread bytes of inbuf: [in_at, in_len) */
	uint32_t out_at, out_len; /* negotiation output */
	uint32_t held;            /* bytes of the pool in use */
	unsigned inflight;        /* pieces at the disk or in its queue */
	unsigned jobs;
	struct nbd_job *first_job, **last_job, *current; /* current: not all of it given to the disk */
	struct nbd_piece *filling;                       /* WRITE: being received */
	struct nbd_piece *out, **out_tail;
	uint32_t out_sent; /* bytes of the first piece in `out` already sent */
	uint8_t inbuf[NBD_INBUF];
	uint8_t outbuf[NBD_OUTBUF];
};

struct mic_nbd {
	struct mic_blk_drv *drv;
	struct mic_blk_user *user;
	int listen_fd, ep, line_fd;
	bool line_watched;
	bool read_only, listening;
	bool no_fds; /* accept(2) found no descriptor: not listening for a moment */
	bool freed;  /* pool pages came back since the last round */
	unsigned spin_us;
	bool roomy; /* more CPUs than client, server and backend */
	bool kick;  /* something was submitted since the last kick */
	char name[NBD_MAX_NAME + 1];
	struct nbd_client *client[MIC_NBD_CLIENTS];
	unsigned clients;                      /* connected ones */
	unsigned inflight;                     /* pieces of all clients, dead ones included */
	struct nbd_piece *queue, **queue_tail; /* pieces that found the ring full */
	struct mic_spin spin;
	struct mic_nbd_stats stats;
	uint32_t share;
};

/* nbd_option.c */
uint16_t nbd_transmission_flags(const struct mic_nbd *nbd);
void nbd_greet(struct nbd_client *c);
/* Consume negotiation bytes: true when something was consumed (call again), false: more input needed. */
bool nbd_negotiate(struct nbd_client *c);

/* nbd_job.c */
/* Consume transmission bytes, as above. */
bool nbd_transmit(struct nbd_client *c);
/* Go on with the current job as far as memory allows. */
void nbd_feed(struct nbd_client *c);
/* A piece came back from the disk. */
void nbd_piece_done(struct nbd_piece *p);
/* A piece with `room` bytes of the pool (0: none needed); NULL when there is no memory now. */
struct nbd_piece *nbd_new_piece(struct nbd_client *c, struct nbd_job *job, uint32_t room);
void nbd_free_piece(struct nbd_piece *p);
/* Start a job's flush; false when there is no memory now. */
bool nbd_feed_flush(struct nbd_client *c, struct nbd_job *j);
/* Forget the first job, or all of them. */
void nbd_drop_job(struct nbd_client *c, struct nbd_job *j);
void nbd_drop_jobs(struct nbd_client *c);

/* nbd_reply.c */
/* Queue the replies of finished jobs, in order. */
void nbd_collect_replies(struct nbd_client *c);

/* nbd_client.c */
/* Move a client forward as far as it goes. */
void nbd_pump(struct nbd_client *c, bool readable);
/* Close the socket and free all but what the disk still holds; the last piece frees the rest. */
void nbd_disconnect(struct nbd_client *c);
/* Protocol violation: disconnect without further ado. */
void nbd_bad_client(struct nbd_client *c);

/* nbd_server.c */
void nbd_submit(struct nbd_piece *p);
/* Bytes of the pool that every client can count on. */
uint32_t nbd_share(const struct mic_nbd *nbd);
/* Room for `len` bytes for this client: how many it may have now (0: none, wait). */
uint32_t nbd_grant(struct nbd_client *c, uint32_t len);

#endif
