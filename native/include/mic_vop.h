/* Your own virtio device in C: the host half of a device, as a program of ring 3 (VOP 5, 6).
 *
 * mic_vop_open() opens `micN/vop.sock` of the card's run directory, which takes the place of
 * /dev/vop_virtioN. One open file has at most one device, and the device goes with the file, however the
 * program ends. Work on chains (mic_vop_add, _pop, _push), or as programs for the real character device
 * do (mic_vop_ioctl).
 *
 * A file belongs to one thread at a time. It answers the card's hand-shakes inside mic_vop_wait() and
 * mic_vop_ioctl(): a program that calls neither for ten seconds lets the card give up.
 * Build: cc prog.c $(micemu vop --cflags --libs) */
#ifndef MIC_VOP_H
#define MIC_VOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include <mic/layout_gen.h> /* struct mic_device_desc, mic_vqconfig, mic_copy_desc; MIC_VIRTIO_... */

#ifdef __cplusplus
extern "C" {
#endif

struct mic_vop;

/* What to announce. The ring bits (EVENT_IDX, INDIRECT_DESC, VERSION_1) are added to `features`. */
struct mic_vop_device {
	unsigned type;      /* virtio device id, 1..127 */
	unsigned num_vq;    /* rings, 1..4 */
	unsigned num;       /* entries of each: a power of two up to 128 */
	uint64_t features;  /* the device's own bits */
	const void *config; /* configuration space; NULL with config_len 0 */
	unsigned config_len;
};

#define MIC_VOP_SEGMENTS 256

/* One request of the card's driver. The segments are card memory: checked to lie inside it, but their
 * bytes may change while they are read. Valid until it is pushed or the card resets the device. */
struct mic_vop_chain {
	unsigned ring;
	uint16_t head;
	unsigned generation;
	unsigned out_num;         /* iov[0 .. out_num): what the driver sent */
	unsigned in_num;          /* iov[out_num .. out_num + in_num): room for the answer */
	uint64_t out_len, in_len; /* bytes */
	struct iovec iov[MIC_VOP_SEGMENTS];
};

/* Results of mic_vop_wait(), or-ed. */
enum {
	MIC_VOP_WORK = 1,   /* the card rang: pop every ring until it is empty */
	MIC_VOP_RESET = 2,  /* the card has reset the device: chains that were popped are void */
	MIC_VOP_OTHER = 4,  /* `fd` of the call is readable */
	MIC_VOP_DRIVER = 8, /* the card's driver has started or stopped: mic_vop_driver_ok() */
};

/* Every call returns -1 with errno set, or NULL, when it fails. ENODEV: the device is removed, the card
 * was stopped, or the emulator has gone. EINVAL: no device yet. */

/* path: `micN/vop.sock`. ENOENT: the card is not up. */
struct mic_vop *mic_vop_open(const char *path);
/* Removes the device from the card, and returns when it has left it; NULL is allowed. */
void mic_vop_close(struct mic_vop *f);

/* ADD_DEVICE. EBUSY: this file has a device. EINVAL: see VOP 6.3. */
int mic_vop_add(struct mic_vop *f, const struct mic_vop_device *device);
/* What the card's driver has accepted; 0 until it did. */
uint64_t mic_vop_features(struct mic_vop *f);
/* Does the card's driver run (DRIVER_OK)? */
bool mic_vop_driver_ok(struct mic_vop *f);

/* Sleep until there is something to do, at most timeout_ms (-1: for ever), or `fd` is readable (-1:
 * none). 0: time-out. */
int mic_vop_wait(struct mic_vop *f, int timeout_ms, int fd);
/* Readable when mic_vop_wait(f, 0, -1) has something to say: for an event loop of your own. */
int mic_vop_fd(struct mic_vop *f);

/* The next chain of a ring: 1, or 0 when there is none. A chain that breaks the rules (VOP-44 to 49)
 * breaks the ring until the card resets the device: EINVAL, ELOOP, EFAULT, EPROTO, ENXIO, again each time.
 * The card is told (NEEDS_RESET). */
int mic_vop_pop(struct mic_vop *f, unsigned ring, struct mic_vop_chain *chain);
/* Complete it with `written` bytes of answer; interrupts the card when it wants that. ESTALE: the card has
 * reset the device since. */
int mic_vop_push(struct mic_vop *f, const struct mic_vop_chain *chain, uint32_t written);
/* Copy what the driver sent, from byte `at`; and an answer, from byte `at`. Return the bytes copied. */
size_t mic_vop_read(const struct mic_vop_chain *chain, size_t at, void *to, size_t len);
size_t mic_vop_write(const struct mic_vop_chain *chain, size_t at, const void *from, size_t len);

/* New configuration space, config_len bytes. 1: the card has taken note; 0: it did not within ten seconds. */
int mic_vop_set_config(struct mic_vop *f, const void *config);

/* Before the device is added: COPY_DESC uses the host's DMA channel 0 where the alignment rules let it (VOP
 * 7), as the real driver does; not for speed. When the host has no channel to give, the CPU copies, as it
 * does without this call. */
void mic_vop_dma(struct mic_vop *f, bool on);

/* The calls of the character device, with its structures: MIC_VIRTIO_ADD_DEVICE (a mic_device_desc block),
 * MIC_VIRTIO_COPY_DESC (a mic_copy_desc), MIC_VIRTIO_CONFIG_CHANGE. Results as VOP 6. ENOTTY: another one. */
int mic_vop_ioctl(struct mic_vop *f, unsigned long command, void *arg);

#ifdef __cplusplus
}
#endif

#endif
