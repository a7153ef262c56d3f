/* The split ring, both halves (VOP 3, 9.1).
 *
 * mic_vq    device half: runs in a backend process on the host. Descriptors and the available ring
 *           lie in host memory, the used ring and all buffers in the card's GDDR.
 * mic_dq    driver half: runs in the card OS. The same memory seen from the other side.
 *
 * Everything the other side can write is read once into a local, checked, and used from there. A
 * ring that breaks its rules is `broken`: it returns its errno until it is set up again, and no
 * other ring notices. Indices are free running 16-bit numbers; num is a power of two <= 128. */
#ifndef MIC_VRING_H
#define MIC_VRING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "mic/bus.h"
#include "mic/layout_gen.h"

/* cffi-begin */
/* --- spinning --------------------------------------------------------------------------------- */

/* The longest spin unless told otherwise: a peer on the other CPU answers a block request in 3 us,
 * waking a sleeper costs 30. */
#define MIC_SPIN_US 50

/* How long one loop looks before it sleeps. The window grows to the maximum while work keeps coming
 * sooner than that, and shrinks to nothing otherwise; it closes while the CPUs are oversubscribed. */
struct mic_spin {
	uint32_t window_ns;  /* of the next spin */
	uint64_t slept_ns;   /* when the last sleep began, 0 = awake */
	uint64_t closed_ns;  /* no spinning before this time */
	uint32_t penalty_ns; /* how long it closes next time */
	uint64_t preempted;  /* involuntary context switches of this thread at the last check */
	uint32_t spins;      /* since then */
};

/* Spin until this time (mic_now_ns()); 0: do not. max_us: the most that is wanted. */
uint64_t mic_spin_until(struct mic_spin *s, unsigned max_us);
/* After each spin. When this thread was pushed off its CPU in more than a quarter of them, others need
 * it: the window closes for a while. */
void mic_spin_done(struct mic_spin *s, bool hit);
void mic_spin_missed(struct mic_spin *s); /* mic_spin_done(s, false) */
/* Around a sleep: its length tunes the window. */
void mic_spin_sleeping(struct mic_spin *s);
void mic_spin_woke(struct mic_spin *s, unsigned max_us);
/* Should a loop of this process spin at all? False when there are fewer CPUs than runnable threads. */
bool mic_spin_allowed(void);
uint64_t mic_now_ns(void);

/* --- geometry (VOP-3) ------------------------------------------------------------------------- */

/* A legal ring size: a power of two, 1..128. */
bool mic_vring_num_ok(unsigned num);
/* Bytes of descriptors, available ring and placeholder used ring: the offset of mic_vring_info
 * (unrounded, as v4.6-v5.9 have it). */
uint32_t mic_vring_size(unsigned num);
/* The whole block in host memory, in pages. */
uint32_t mic_vring_block_size(unsigned num);

/* --- device half ------------------------------------------------------------------------------ */

struct mic_vq {
	struct mic_bus *bus;
	uint8_t *desc;  /* descriptor table, host memory */
	uint8_t *avail; /* available ring, host memory */
	uint8_t *info;  /* mic_vring_info: the index published for observers */
	uint8_t *used;  /* used ring, GDDR; NULL until the card handed it over */
	uint64_t features;
	uint16_t num;
	uint16_t last_avail; /* next available entry to take */
	uint16_t used_idx;   /* next used entry to write */
	uint16_t signalled;  /* used_idx at the last interrupt (EVENT_IDX) */
	bool broken;
	int error;                                    /* the errno that broke it, positive */
	uint64_t popped, pushed, bytes_in, bytes_out; /* counters; in = from the card */
};

/* One chain: readable segments first (card -> host), then writable ones. */
struct mic_chain {
	uint16_t head;
	unsigned out_num;         /* readable segments: iov[0 .. out_num) */
	unsigned in_num;          /* writable segments: iov[out_num .. out_num + in_num) */
	uint64_t out_len, in_len; /* bytes */
};

/* block_off: offset of the ring block in host memory (VOP-3). used_addr: card physical address of
 * the used ring, 0 = not yet. features: bit numbers as in layout.py, EVENT_IDX and INDIRECT_DESC
 * matter here. Returns 0, -EINVAL (num, alignment), -EFAULT (outside the memories, VOP-47). */
int mic_vq_init(struct mic_vq *vq, struct mic_bus *bus, uint64_t block_off, uint64_t used_addr, uint16_t num,
		uint64_t features);
/* Take the next chain. Zero-length descriptors leave no segment behind (VOP-48). iov holds up to max
 * segments, already translated and bounds-checked. Returns 1, 0 (nothing available), or breaks the ring and
 * returns -EINVAL (head or next out of range, readable after writable, INDIRECT not negotiated or malformed;
 * VOP-45, 48), -ELOOP (VOP-44), -EFAULT (address outside GDDR, VOP-46), -EPROTO (avail.idx jumped by more
 * than num, VOP-49), -ENXIO (work, but no used ring; VOP-47), -ENOSPC (more than max segments). A broken ring
 * returns its errno again. */
int mic_vq_pop(struct mic_vq *vq, struct mic_chain *chain, struct iovec *iov, unsigned max);
/* Complete a chain; len = bytes written into its writable part. Publishes used.idx. */
void mic_vq_push(struct mic_vq *vq, uint16_t head, uint32_t len);
/* The same in two steps, for a batch that must appear at once (mergeable receive buffers). */
void mic_vq_fill(struct mic_vq *vq, uint16_t head, uint32_t len);
void mic_vq_publish(struct mic_vq *vq);
/* True when the driver wants an interrupt for what was pushed since the last call. */
bool mic_vq_should_interrupt(struct mic_vq *vq);
/* Ask for kicks, then look once more: true when work arrived meanwhile (do not sleep). */
bool mic_vq_enable_kick(struct mic_vq *vq);
/* No kicks, please: the device is polling. */
void mic_vq_disable_kick(struct mic_vq *vq);
/* Is there something to pop? (cheap, no validation) */
bool mic_vq_has_work(const struct mic_vq *vq);

/* A device as its backend process sees it: slot in the device page, rings, lines. */
struct mic_vdev {
	struct mic_bus *bus;
	uint8_t *desc;  /* mic_device_desc in the device page */
	uint8_t *ctrl;  /* mic_device_ctrl in the device page */
	int kick_fd;    /* eventfd of this device's MSI-X vector, perhaps shared with other devices */
	int line_fd;    /* private edge-triggered view of kick_fd: readable = rung since the last sleep */
	int control_fd; /* socket to the host process; readable = leave the loop */
	unsigned num_vq;
	struct mic_vq vq[4];
	uint8_t status; /* as last seen by mic_vdev_handshake() */
	uint64_t wakeups, interrupts;
	uint32_t fault_target; /* what fault filters know it by: its offset in the device page */
	unsigned spin_us;      /* the longest look before sleeping; 0 = never spin */
	struct mic_spin spin;
};

/* What a device loop returns to Python. */
enum mic_run {
	MIC_RUN_CONTROL = 1,   /* control_fd is readable */
	MIC_RUN_HANDSHAKE = 2, /* mic_vdev_handshake() */
	MIC_RUN_SIGNAL = 3,    /* EINTR: let Python run its signal handlers, then call again */
	MIC_RUN_LOCAL = 4,     /* the local end (tap, pty) is gone */
};

/* slot_off, ctrl_off: offsets of device_desc and device_ctrl in host memory. Returns 0, -EFAULT,
 * -EINVAL (num_vq), -errno of epoll. mic_vdev_fini() closes what init opened. */
int mic_vdev_init(struct mic_vdev *dev, struct mic_bus *bus, uint64_t slot_off, uint64_t ctrl_off,
		  int kick_fd, int control_fd, unsigned num_vq);
void mic_vdev_fini(struct mic_vdev *dev);
/* The card wants its host half to act: vdev_reset, used_address_updated or guest_ack is set, or the
 * status byte differs from dev->status. A change of status is reported once (dev->status follows),
 * the bytes for as long as they are set. */
bool mic_vdev_handshake(struct mic_vdev *dev);
bool mic_vdev_driver_ok(const struct mic_vdev *dev);
/* Interrupt the card through h2c_vdev_db; out of range numbers are ignored (VOP-28, VOP-52). */
void mic_vdev_interrupt(struct mic_vdev *dev);
/* Interrupt if any of vq's pushes wants it. */
void mic_vdev_complete(struct mic_vdev *dev, struct mic_vq *vq);
/* A ring broke: NEEDS_RESET in the status byte, and one interrupt (VOP 11). */
void mic_vdev_broken(struct mic_vdev *dev, struct mic_vq *vq);

/* A device loop: drain its rings with kicks disabled; mic_vdev_spin() true: drain again; else
 * mic_vq_enable_kick() on each ring, true: drain again; else mic_vdev_sleep(). */

/* Look at all rings and hand-shake bytes for as long as it pays; true when there is something. */
bool mic_vdev_spin(struct mic_vdev *dev);
/* Sleep until the kick line rings, or control_fd or one of the extra descriptors (n <= 5) is
 * readable. Rings of the line since the last sleep wake it at once; lines shared by several processes
 * lose nothing (nobody reads the eventfd). Returns a mask (bit 0 kick, 1 control, 2.. extra), 0 on
 * time-out, -errno (-EINTR). */
int mic_vdev_sleep(struct mic_vdev *dev, const int *extra, unsigned n, int timeout_ms);

/* --- driver half ------------------------------------------------------------------------------ */

/* Descriptors in one indirect table of mic_dq. */
#define MIC_DQ_TABLE 16

struct mic_dq {
	struct mic_bus *bus;
	uint8_t *desc; /* host memory through the SMPT */
	uint8_t *avail;
	uint8_t *used; /* GDDR */
	uint64_t features;
	uint16_t num;
	uint16_t free_head, free_num;
	uint16_t avail_idx, last_used;
	uint16_t kicked; /* avail_idx at the last kick (EVENT_IDX) */
	bool broken;
	uint64_t token[128];       /* by head */
	uint32_t in_len[128];      /* writable bytes of the chain, the most that used.len can mean */
	uint16_t chain_len[128];   /* ring descriptors of the chain; 0 = this head is not in flight */
	uint16_t shadow_next[128]; /* the free list and chain links, never read back from the ring */
	uint64_t indirect;         /* GDDR address of num tables of MIC_DQ_TABLE descriptors, 0 = none */
};

/* A buffer in GDDR. */
struct mic_seg {
	uint64_t addr; /* card physical */
	uint32_t len;
};

/* desc_addr: card address of the ring block (an SMPT address). used_addr: card physical.
 * indirect_addr: GDDR area for indirect tables (num tables of MIC_DQ_TABLE descriptors), 0 = never
 * use them. Zeroes the ring block up to its info (VOP 3.2) and the used ring; call it before
 * used_address is handed over. Returns 0, -EINVAL, -EFAULT. */
int mic_dq_init(struct mic_dq *dq, struct mic_bus *bus, uint64_t desc_addr, uint64_t used_addr, uint16_t num,
		uint64_t features, uint64_t indirect_addr);
/* Make out_num readable then in_num writable segments available as one chain.
 * Returns 0, -ENOSPC (ring full), -EINVAL (no segments), -EIO (broken). token comes back from get. */
int mic_dq_add(struct mic_dq *dq, const struct mic_seg *seg, unsigned out_num, unsigned in_num,
	       uint64_t token);
/* The same in two steps, to make several chains available with one store. */
int mic_dq_stage(struct mic_dq *dq, const struct mic_seg *seg, unsigned out_num, unsigned in_num,
		 uint64_t token);
void mic_dq_publish(struct mic_dq *dq);
/* True when the device wants a kick for what was added since the last call. */
bool mic_dq_should_kick(struct mic_dq *dq);
/* Next completion: 1 (fills token and len), 0 none, -EIO the device broke the ring. */
int mic_dq_get(struct mic_dq *dq, uint64_t *token, uint32_t *len);
/* Ask for interrupts, then look once more: true when a completion arrived meanwhile. */
bool mic_dq_enable_interrupt(struct mic_dq *dq);
void mic_dq_disable_interrupt(struct mic_dq *dq);
bool mic_dq_has_completion(const struct mic_dq *dq);

/* A device as its card driver sees it. */
struct mic_vdrv {
	struct mic_bus *bus;
	int irq_fd;  /* eventfd of the card interrupt line of this device, perhaps shared */
	int line_fd; /* private edge-triggered view of irq_fd */
	int stop_fd; /* eventfd; readable = leave the loop */
	int c2h_db;  /* host doorbell to kick */
	unsigned num_vq;
	struct mic_dq dq[4];
	uint64_t kicks, wakeups;
	uint32_t fault_target; /* as in mic_vdev */
	unsigned spin_us;
	struct mic_spin spin;
};

/* Returns 0, -EINVAL (num_vq), -errno of epoll. */
int mic_vdrv_init(struct mic_vdrv *drv, struct mic_bus *bus, int irq_fd, int stop_fd, int c2h_db,
		  unsigned num_vq);
void mic_vdrv_fini(struct mic_vdrv *drv);
/* Kick if what was added wants it. */
void mic_vdrv_kick(struct mic_vdrv *drv, struct mic_dq *dq);
/* As mic_vdev_sleep(), for completions: bit 0 interrupt, 1 stop_fd, 2.. extra. */
int mic_vdrv_sleep(struct mic_vdrv *drv, const int *extra, unsigned n, int timeout_ms);

/* An edge-triggered view of an eventfd line: a descriptor that is readable when the line was rung
 * since mic_line_take(). Several views of one line do not take rings from each other.
 * Returns a descriptor or -errno. */
int mic_line_open(int fd);
void mic_line_take(int line_fd);
/* Block in poll(2) on fds[0..n), n <= 8, for at most timeout_ms (-1 = for ever). Returns a bit mask
 * of the ready descriptors, 0 on time-out, -errno. */
int mic_wait_fds(const int *fds, unsigned n, int timeout_ms);
/* cffi-end */

#endif
