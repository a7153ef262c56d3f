/* What the SCIF node and libscif.so agree on: shared pages and the messages on the node's socket.
 *
 * An endpoint that is connected has three places in its node's memory: the queue pair page, which the
 * peer may write; the receive ring, likewise; the control page, which only this side ever maps.
 * The first 256 bytes of the queue pair are those of SCIF 3.2, unused parts of its cache lines
 * carry the words with which two programs wake each other without their nodes. */
#ifndef MIC_SCIF_ABI_H
#define MIC_SCIF_ABI_H

#include <stddef.h>
#include <stdint.h>

#include "mic/layout_gen.h"

/* cffi-begin */
struct mic_scif_qpage {
	uint64_t magic;
	uint8_t reserved0[120];
	/* 128: written by the peer with every message it sends */
	uint32_t local_write; /* its write index */
	uint32_t inline_at;   /* read index at which the bytes below begin, MIC_SCIF_NOT_INLINE: none */
	uint32_t inline_len;
	uint8_t inline_data[40]; /* a copy of its last message, if short: it comes with the index */
	uint8_t reserved1[12];
	/* 192: written by the peer whenever it has received */
	uint64_t local_read; /* its read index; above bit 32: bytes beyond it that it waits to take in recv */
	uint64_t remote_qp, local_buf, local_qp, remote_buf; /* ours: bus addresses */
	uint32_t qp_state;
	uint8_t reserved3[20];
	/* 256, 320: our futex words; the peer and our node raise them */
	uint32_t rx_seq;
	uint8_t reserved4[60];
	uint32_t tx_seq;
	uint8_t reserved5[60];
	/* 384: ours, constant while attached */
	uint64_t notify_addr; /* bus address of our node's notify page */
	uint32_t notify_slot; /* our bit in it */
	uint32_t abi;         /* MIC_SCIF_ABI */
	uint8_t reserved6[48];
	/* 448: written by the peer when it waits to receive */
	uint64_t rx_wait;   /* 1 + count of bytes received when it began to wait in recv, 0 = does not */
	uint32_t rx_asleep; /* it sleeps on rx_seq of its own page until there are bytes */
	uint32_t rx_epoch;  /* how often it took the token off its descriptor */
	uint8_t reserved7[48];
	/* 512: written by the peer when it waits to send */
	uint32_t tx_asleep; /* it sleeps on tx_seq of its own page until there is room */
	uint32_t tx_native; /* it wants its descriptor writable again when there is room */
	uint32_t told;      /* 1 + rx_epoch when it last had a token put on our descriptor */
};

/* State word of the control page. */
enum mic_scif_ep_state {
	MIC_SCIF_EP_NONE,
	MIC_SCIF_EP_CONNECTED,
	MIC_SCIF_EP_DISCONNECTED,
};

struct mic_scif_ctl {
	uint64_t sid;         /* whose page this is; another value: it was released */
	uint32_t state;       /* enum mic_scif_ep_state, written by the node */
	uint32_t uncollected; /* a non-blocking connect succeeded and nobody asked yet */
	uint32_t gen;         /* changes whenever a window list changes */
	/* Copies on the node's DMA channels, numbered from 1, modulo 2^30: written by the node. */
	uint32_t issued; /* the last one that it took */
	uint32_t done;   /* this one and all before it have ended */
	uint32_t failed; /* one of them did not complete: marks behind it never will */
	uint8_t reserved0[32];
	/* 64: the sending end, under tx_lock */
	uint64_t tx_lock[5]; /* robust, process-shared pthread mutex */
	uint64_t sent;       /* bytes, ever */
	uint32_t tx_write, tx_read;
	uint32_t notified;  /* rx_epoch of the peer at our last notification, + 1 */
	uint32_t tx_inline; /* the peer's page holds a copy of our last message */
	uint8_t reserved1[64];
	/* 192: the receiving end, under rx_lock */
	uint64_t rx_lock[5];
	uint64_t received;
	uint32_t rx_read, rx_write;
	uint32_t epoch;     /* what we last told the peer as rx_epoch */
	uint32_t streak;    /* blocking receives in a row that had to wait, in a hot loop */
	uint64_t last_recv; /* time stamp counter at the end of the last receive */
	uint32_t promised;  /* upper half of the peer's local_read */
	uint32_t rx_end;    /* 1 + where the bytes end that came before the disconnect, 0: not looked yet */
	uint8_t reserved2[48];
	/* 320: copies in progress, by gen modulo MIC_SCIF_GENS */
	uint32_t busy[16];
	/* 384: the node waits for copies: whoever counts out tells it */
	uint32_t drain;
	uint8_t reserved3[60];
};
#define MIC_SCIF_GENS 16

#define MIC_SCIF_NOT_INLINE 0xffffffff
#define MIC_SCIF_SLOTS      15872
struct mic_scif_notify {
	uint32_t seq;  /* futex of the notifier thread */
	uint32_t left; /* a copy that some endpoint's node waits for has ended */
	uint8_t reserved1[56];
	uint64_t rx[248]; /* one bit per slot: bytes for it arrived, put a token on its descriptor */
	uint64_t tx[248]; /* there is room again: make its descriptor writable */
	uint8_t reserved2[64];
};
/* The page behind it, which programs of the node map read-only: what one of them writes by mistake must not
 * tell the others that their node is dead. */
struct mic_scif_life {
	uint64_t alive[5]; /* robust mutex, held by the notifier for as long as the node lives */
};

/* Node side (scif_node.c). 0 or -errno. */
void mic_scif_ctl_init(struct mic_scif_ctl *ctl, uint64_t sid);
void mic_scif_ctl_state(struct mic_scif_ctl *ctl, struct mic_scif_qpage *qp, uint32_t state);
void mic_scif_ctl_copies(struct mic_scif_ctl *ctl, uint32_t issued, uint32_t done, uint32_t failed);
/* A window list has changed. Returns the classes (bits, gen modulo MIC_SCIF_GENS) of the copies in progress
 * that began before. One thread of the node raises. */
uint32_t mic_scif_raise_gen(struct mic_scif_ctl *ctl);
/* Which of `classes` still have copies in progress? Programs tell the node when one of them ends. */
uint32_t mic_scif_busy(struct mic_scif_ctl *ctl, uint32_t classes);
/* Set up a queue pair page: bus addresses of its ring and of itself. The magic comes last. */
void mic_scif_qp_init(struct mic_scif_qpage *qp, uint64_t local_buf, uint64_t local_qp);
/* Wipe a queue pair that nobody uses any more, `bytes` with its ring and control page. */
void mic_scif_qp_wipe(struct mic_scif_qpage *qp, uint64_t bytes);
/* How the peer reaches our notify page, and our bit in it. */
void mic_scif_qp_notify(struct mic_scif_qpage *qp, uint64_t notify_addr, uint32_t slot);
void mic_scif_qp_invalid(struct mic_scif_qpage *qp);
uint64_t mic_scif_qp_magic(const struct mic_scif_qpage *qp);
/* Bytes or room arrived: wake whoever sleeps in this endpoint's recv or send. */
void mic_scif_wake_rx(struct mic_scif_qpage *qp);
void mic_scif_wake_tx(struct mic_scif_qpage *qp);
/* A kernel client is the receiver: it has drained the ring; `peer` is the sender's page. It looks once more
 * before it waits: what came meanwhile may not be announced. */
void mic_scif_kernel_drained(struct mic_scif_qpage *peer);
/* A kernel client is the sender and wants room; `peer` is the receiver's page. The same. */
void mic_scif_kernel_wants_room(struct mic_scif_qpage *peer);

enum { MIC_SCIF_COPY_LEFT = -2 };
struct mic_scif_notifier;
/* A thread that serves a node's notify page and the page behind it. Slots without a descriptor are collected
 * for Python: event_fd becomes readable. NULL with errno. */
struct mic_scif_notifier *mic_scif_notifier_start(struct mic_scif_notify *page, int event_fd);
void mic_scif_notifier_stop(struct mic_scif_notifier *n);
/* The node's end of the descriptor of `slot`; -1: a kernel client. */
void mic_scif_notifier_set(struct mic_scif_notifier *n, uint32_t slot, int fd);
void mic_scif_notifier_clear(struct mic_scif_notifier *n, uint32_t slot);
/* Next kernel client slot that was notified, -1: none, MIC_SCIF_COPY_LEFT: a copy has ended. */
int mic_scif_notifier_next(struct mic_scif_notifier *n);
/* What the notifier does for a slot, at once: token on, or unfill. */
void mic_scif_token(int fd);
void mic_scif_unfill(int fd);
/* Set a bit of a (possibly other) node's notify page and wake its notifier. */
void mic_scif_notify_rx(struct mic_scif_notify *page, uint32_t slot);
void mic_scif_notify_tx(struct mic_scif_notify *page, uint32_t slot);
/* cffi-end */

_Static_assert(offsetof(struct mic_scif_qpage, local_write) == 128, "qpage");
_Static_assert(offsetof(struct mic_scif_qpage, local_read) == 192, "qpage");
_Static_assert(offsetof(struct mic_scif_qpage, qp_state) == 232, "qpage");
_Static_assert(offsetof(struct mic_scif_qpage, rx_seq) == 256, "qpage");
_Static_assert(offsetof(struct mic_scif_qpage, rx_wait) == 448, "qpage");
_Static_assert(offsetof(struct mic_scif_qpage, tx_asleep) == 512, "qpage");
_Static_assert(offsetof(struct mic_scif_qpage, notify_addr) == 384, "qpage");
_Static_assert(offsetof(struct mic_scif_ctl, tx_lock) == 64, "ctl");
_Static_assert(offsetof(struct mic_scif_ctl, rx_lock) == 192, "ctl");
_Static_assert(offsetof(struct mic_scif_ctl, busy) == 320, "ctl");
_Static_assert(offsetof(struct mic_scif_ctl, drain) == 384, "ctl");
_Static_assert(MIC_SCIF_GENS == sizeof((struct mic_scif_ctl){0}.busy) / sizeof(uint32_t), "ctl");
_Static_assert(sizeof(struct mic_scif_notify) == 4096, "notify");

/* --- messages on the node's socket (SOCK_SEQPACKET) --------------------------------------------
 *
 * An endpoint's descriptor is a connection of its own: OPEN is the only message on it. Everything
 * else travels on control connections, one request at a time; the answer has the same order. */
/* cffi-begin */
enum mic_scif_op {
	MIC_SCIF_OPEN = 1, /* a0 cookie of the socket, a1 sid, drawn by the program; no answer */
	MIC_SCIF_HELLO,    /* a0 unique number of the process */
	MIC_SCIF_MEMORY,   /* from the host's node to a card's: a0 node, a1 size; descriptor: its memory */
	MIC_SCIF_BIND,     /* a0 port -> v0 port */
	MIC_SCIF_LISTEN,   /* a0 backlog */
	MIC_SCIF_CONNECT,  /* a0 node, a1 port, a2 non-blocking -> v0 port */
	MIC_SCIF_ACCEPT, /* a0 sid of the new descriptor, a1 wait -> v0 node, v1 port, v2 take a token off */
	MIC_SCIF_ATTACH, /* -> enum mic_scif_attach; descriptors: own memory, peer's memory */
	MIC_SCIF_FLUSH,  /* this process closes one of its descriptors */
	MIC_SCIF_SYNC,   /* it has closed it: answer when the release, if any, is over */
	MIC_SCIF_FIND,   /* a0 cookie -> v0 sid */
	MIC_SCIF_NODES,  /* -> v0 count, v1 self; data: u16 ids */
	MIC_SCIF_MASK,   /* -> v0 poll mask of an endpoint that is not attached, v1 a connect is
			  * pending, v2 take a token off the descriptor */
	MIC_SCIF_CANCEL, /* end the request in progress on this connection; no answer of its own */
	MIC_SCIF_REG_BEGIN,    /* a0 offset, a1 length, a2 prot, a3 flags, a4 bytes to allocate -> v0 ticket,
				* v1 place in node memory; descriptor: own memory */
	MIC_SCIF_REG_COMMIT,   /* a0 ticket; data: struct mic_scif_seg -> v0 offset */
	MIC_SCIF_REG_ABORT,    /* a0 ticket */
	MIC_SCIF_UNREGISTER,   /* a0 offset, a1 length */
	MIC_SCIF_WINDOWS,      /* -> v0 gen, v1 own count, v2 peer count; data: struct mic_scif_win + segs;
				* descriptors: own memory, peer's memory */
	MIC_SCIF_MMAP,         /* a0 offset, a1 length, a2 prot; data as WINDOWS for the peer's; descriptor */
	MIC_SCIF_MUNMAP,       /* a0 offset, a1 length */
	MIC_SCIF_DROP,         /* data: struct mic_scif_seg: pages that this process no longer maps */
	MIC_SCIF_FENCE_MARK,   /* peer's mark -> v0 */
	MIC_SCIF_FENCE_WAIT,   /* a0 mark, own or peer's */
	MIC_SCIF_TABLES,       /* -> a file: JSON of endpoints and windows, for people */
	MIC_SCIF_FENCE_SIGNAL, /* a0 loff, a1 lval, a2 roff, a3 rval, a4 flags */
	MIC_SCIF_COPY,         /* a DMA channel copies window to window: a0 loff, a1 roff, a2 length (all
				* multiples of 64), a3 enum mic_scif_copy. -EOPNOTSUPP: none reaches that
				* peer; any other error: not now. Then the caller copies itself */
};

enum mic_scif_copy {
	MIC_SCIF_COPY_WRITE = 1,   /* towards the peer */
	MIC_SCIF_COPY_ORDERED = 2, /* the last 64 bytes after all others */
};

#define MIC_SCIF_COPY_MASK 0x3fffffff /* of the numbers of copies */

struct mic_scif_request {
	uint32_t op;
	uint32_t ndata; /* bytes that follow */
	uint64_t sid;
	uint64_t a[5];
	uint64_t cpu; /* 1 + the one that its caller runs on, 0: not known */
};

struct mic_scif_reply {
	int32_t status; /* 0 or -errno */
	uint32_t ndata; /* bytes that follow */
	uint64_t v[8];
};

enum mic_scif_attach { /* indices into v of ATTACH: offsets in the memories that come with it */
		       MIC_SCIF_V_OWN_QP,  /* own memory: queue pair, ring, control page, one after the other
					    */
		       MIC_SCIF_V_PEER_QP, /* peer's memory */
		       MIC_SCIF_V_PEER_RING,  /* peer's memory */
		       MIC_SCIF_V_OWN_NOTIFY, /* own memory */
		       MIC_SCIF_V_PEER_NOTIFY,
		       MIC_SCIF_V_PEER_SLOT,
		       MIC_SCIF_V_NODES, /* own node | peer node << 16 | port << 32 | peer port << 48 */
};

struct mic_scif_seg { /* a run of node memory */
	uint64_t off, len;
};

struct mic_scif_win { /* a window, followed by its segments */
	uint64_t id, offset, len;
	uint32_t prot, nsegs;
};

/* Largest message, bytes, and the descriptors that come with one. An answer with more than MIC_SCIF_INLINE
 * bytes of data has them in a file, its last descriptor. */
#define MIC_SCIF_PACKET  131072
#define MIC_SCIF_INLINE  130816
#define MIC_SCIF_MAX_FDS 4

/* Where a node's requests come from (scif_steer.c). */
struct mic_scif_steer {
	uint64_t cpu;  /* of the last request, as there */
	uint64_t row;  /* so many in a row came from there while the node was elsewhere */
	uint64_t when; /* it followed them last, CLOCK_MONOTONIC, ns */
};
/* The CPU to which the node, which runs on `here`, goes before it serves a request from `cpu`; -1: it stays.
 */
int mic_scif_steer(struct mic_scif_steer *s, uint64_t cpu, int here, uint64_t now);
/* Put the calling thread onto one of the CPUs that it may run on; it may go on to another at any time.
 * -EINVAL: it may not run there. */
int mic_scif_go_to(int cpu);

/* The node's end of these connections (scif_socket.c). Counts, descriptors or -errno. */
struct mic_scif_caller {
	int32_t pid;
	uint32_t uid;
};
/* A new connection, non-blocking. */
int mic_scif_accept(int listener, struct mic_scif_caller *who);
/* The first packet on one; 0: the end, or not a bare request. `passed`: a descriptor that came along, or -1;
 * it is the caller's. */
int mic_scif_first(int fd, struct mic_scif_request *rq, int *passed);
/* A packet; what it says of its caller's CPU is taken down in `s`. */
int mic_scif_receive(int fd, void *packet, size_t max, struct mic_scif_steer *s);
/* Answer with head->ndata bytes of data. Descriptors stay the caller's. */
int mic_scif_answer(int fd, const struct mic_scif_reply *head, const void *data, const int *fds,
		    uint32_t nfds);
/* The peer of an endpoint is gone: POLLHUP on its descriptor. An error: the program has closed it. The last
 * token stays unread, by it we notice the close. */
int mic_scif_hang_up(int fd);
/* After that: has the program closed it? */
int mic_scif_gone(int fd);
/* cffi-end */

#endif
