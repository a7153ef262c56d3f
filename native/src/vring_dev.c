/* The split ring, device half (VOP 3, 6.5, 9.1): used by backends on the host. */
#include "mic/vring.h"

#include <errno.h>
#include <string.h>

#include "mic/barrier.h"

#define FEATURE(bit) (1ull << (bit))
#define PAGE_SIZE    4096u

/* Offsets inside the ring block and the used ring (VOP-3). */
static uint32_t avail_off(unsigned num)
{
	return 16 * num;
}

uint32_t mic_vring_size(unsigned num)
{
	uint32_t used = (avail_off(num) + 2 * (3 + num) + MIC_VRING_ALIGN - 1) & ~(MIC_VRING_ALIGN - 1);

	return used + 6 + 8 * num;
}

uint32_t mic_vring_block_size(unsigned num)
{
	uint32_t end = mic_vring_size(num) + (uint32_t)sizeof(struct mic_vring_info);

	return (end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
}

bool mic_vring_num_ok(unsigned num)
{
	return num && num <= MIC_MAX_VRING_ENTRIES && !(num & (num - 1));
}

static uint16_t *u16_at(uint8_t *base, uint32_t off)
{
	return (uint16_t *)(void *)(base + off);
}

static uint16_t load_avail_idx(const struct mic_vq *vq)
{
	/* Pairs with the release store in mic_dq_publish(): entries and descriptors are visible. */
	return mic_load_acquire(u16_at(vq->avail, 2));
}

static int break_ring(struct mic_vq *vq, int error)
{
	vq->broken = true;
	vq->error = error;
	return -error;
}

int mic_vq_init(struct mic_vq *vq, struct mic_bus *bus, uint64_t block_off, uint64_t used_addr, uint16_t num,
		uint64_t features)
{
	uint64_t host_size = mic_bus_host_size(bus);

	memset(vq, 0, sizeof *vq);
	vq->broken = true; /* until it is complete, nobody can use it */
	vq->error = ENXIO;
	if (!mic_vring_num_ok(num) || block_off % MIC_VRING_ALIGN)
		return -EINVAL;
	if (block_off > host_size || mic_vring_block_size(num) > host_size - block_off)
		return -EFAULT;
	vq->bus = bus;
	vq->num = num;
	vq->features = features;
	vq->desc = mic_bus_host(bus) + block_off;
	vq->avail = vq->desc + avail_off(num);
	vq->info = vq->desc + mic_vring_size(num);
	mic_store_release(u16_at(vq->info, offsetof(struct mic_vring_info, avail_idx)), 0);
	if (used_addr) {
		if (used_addr % 4)
			return -EINVAL;
		vq->used = mic_gddr_at(bus, used_addr, 6 + 8ull * num);
		if (!vq->used)
			return -EFAULT;
	}
	vq->broken = false;
	vq->error = 0;
	return 0;
}

/* One copy of a descriptor: two single loads, so that no field is fetched twice (VOP-51). */
static struct mic_vring_desc read_desc(const uint8_t *table, unsigned i)
{
	const uint64_t *p = (const uint64_t *)(const void *)(table + 16 * i);
	uint64_t word[2] = {mic_load_relaxed(&p[0]), mic_load_relaxed(&p[1])};
	struct mic_vring_desc d;

	memcpy(&d, word, sizeof d);
	return d;
}

/* Where a chain being walked ends up. */
struct walk {
	struct mic_chain *chain;
	struct iovec *iov;
	unsigned n, max;
};

/* Append one data descriptor. 0 or the positive errno that breaks the ring. */
static int add_segment(struct mic_vq *vq, struct walk *w, const struct mic_vring_desc *d)
{
	bool writable = d->flags & MIC_VRING_DESC_F_WRITE;
	struct mic_chain *c = w->chain;

	if (!d->len)
		return 0; /* tolerated, and touches nothing (VOP-48) */
	if (!writable && c->in_num)
		return EINVAL;
	void *p = mic_gddr_at(vq->bus, d->addr, d->len);

	if (!p)
		return EFAULT;
	if (w->n == w->max)
		return ENOSPC;
	w->iov[w->n++] = (struct iovec){.iov_base = p, .iov_len = d->len};
	if (writable) {
		c->in_num++;
		c->in_len += d->len;
	} else {
		c->out_num++;
		c->out_len += d->len;
	}
	return 0;
}

/* Walk the table that descriptor d names. It is copied whole before anything in it is used. */
static int walk_indirect(struct mic_vq *vq, struct walk *w, const struct mic_vring_desc *d)
{
	uint8_t table[16 * MIC_MAX_VRING_ENTRIES] __attribute__((aligned(8)));
	unsigned entries = d->len / 16, i = 0;

	if (!(vq->features & FEATURE(MIC_VIRTIO_F_INDIRECT_DESC)) ||
	    d->flags & (MIC_VRING_DESC_F_NEXT | MIC_VRING_DESC_F_WRITE))
		return EINVAL;
	if (!d->len || d->len % 16 || d->len > sizeof table)
		return EINVAL;
	const uint8_t *src = mic_gddr_at(vq->bus, d->addr, d->len);

	if (!src)
		return EFAULT;
	mic_copy_once(table, src, d->len);
	for (unsigned seen = 0;; seen++) {
		if (i >= entries)
			return EINVAL;
		if (seen >= entries)
			return ELOOP;
		struct mic_vring_desc e = read_desc(table, i);

		if (e.flags & MIC_VRING_DESC_F_INDIRECT)
			return EINVAL; /* one level only */
		int err = add_segment(vq, w, &e);

		if (err)
			return err;
		if (!(e.flags & MIC_VRING_DESC_F_NEXT))
			return 0;
		i = e.next;
	}
}

static int walk_chain(struct mic_vq *vq, struct walk *w, uint16_t head)
{
	uint16_t i = head;

	for (unsigned seen = 0;; seen++) {
		if (i >= vq->num)
			return EINVAL; /* VOP-45 */
		if (seen >= vq->num)
			return ELOOP; /* VOP-44 */
		struct mic_vring_desc d = read_desc(vq->desc, i);

		if (d.flags & MIC_VRING_DESC_F_INDIRECT)
			return walk_indirect(vq, w, &d);
		int err = add_segment(vq, w, &d);

		if (err)
			return err;
		if (!(d.flags & MIC_VRING_DESC_F_NEXT))
			return 0;
		i = d.next;
	}
}

int mic_vq_pop(struct mic_vq *vq, struct mic_chain *chain, struct iovec *iov, unsigned max)
{
	if (vq->broken)
		return -vq->error;
	uint16_t idx = load_avail_idx(vq);

	if (idx == vq->last_avail)
		return 0;
	if (!vq->used)
		return break_ring(vq, ENXIO); /* work without a used ring to answer in (VOP-47) */
	if ((uint16_t)(idx - vq->last_avail) > vq->num)
		return break_ring(vq, EPROTO);
	uint16_t head = mic_load_relaxed(u16_at(vq->avail, 4 + 2u * (vq->last_avail & (vq->num - 1u))));
	struct walk w = {.chain = chain, .iov = iov, .max = max};

	*chain = (struct mic_chain){.head = head};
	int err = walk_chain(vq, &w, head);

	if (err)
		return break_ring(vq, err);
	vq->last_avail++;
	vq->popped++;
	return 1;
}

void mic_vq_fill(struct mic_vq *vq, uint16_t head, uint32_t len)
{
	if (!vq->used)
		return;
	uint32_t *elem = (uint32_t *)(void *)(vq->used + 4 + 8u * (vq->used_idx & (vq->num - 1u)));

	mic_store_relaxed(&elem[0], head);
	mic_store_relaxed(&elem[1], len);
	vq->used_idx++;
	vq->pushed++;
}

void mic_vq_publish(struct mic_vq *vq)
{
	if (!vq->used)
		return;
	/* Pairs with the acquire load in mic_dq_get(): elements and buffers are visible. */
	mic_store_release(u16_at(vq->used, 2), vq->used_idx);
	mic_store_release(u16_at(vq->info, offsetof(struct mic_vring_info, avail_idx)), vq->last_avail);
}

void mic_vq_push(struct mic_vq *vq, uint16_t head, uint32_t len)
{
	mic_vq_fill(vq, head, len);
	mic_vq_publish(vq);
}

bool mic_vq_should_interrupt(struct mic_vq *vq)
{
	uint16_t old = vq->signalled, now = vq->used_idx;

	if (vq->broken || now == old)
		return false;
	vq->signalled = now;
	/* used.idx before the question: pairs with the fence in mic_dq_enable_interrupt(). */
	mic_full_fence();
	if (!(vq->features & FEATURE(MIC_VIRTIO_F_EVENT_IDX)))
		return !(mic_load_relaxed(u16_at(vq->avail, 0)) & MIC_VRING_AVAIL_F_NO_INTERRUPT);
	uint16_t event = mic_load_relaxed(u16_at(vq->avail, 4 + 2u * vq->num));

	return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

bool mic_vq_enable_kick(struct mic_vq *vq)
{
	if (vq->broken || !vq->used)
		return false;
	if (vq->features & FEATURE(MIC_VIRTIO_F_EVENT_IDX))
		mic_store_relaxed(u16_at(vq->used, 4 + 8u * vq->num), vq->last_avail);
	else
		mic_store_relaxed(u16_at(vq->used, 0), 0);
	/* The wish before the last look: pairs with the fence in mic_dq_should_kick(). */
	mic_full_fence();
	return load_avail_idx(vq) != vq->last_avail;
}

void mic_vq_disable_kick(struct mic_vq *vq)
{
	if (vq->broken || !vq->used)
		return;
	/* With EVENT_IDX the old event lies behind the driver's index: it is silent already. */
	if (!(vq->features & FEATURE(MIC_VIRTIO_F_EVENT_IDX)))
		mic_store_relaxed(u16_at(vq->used, 0), MIC_VRING_USED_F_NO_NOTIFY);
}

bool mic_vq_has_work(const struct mic_vq *vq)
{
	return !vq->broken && load_avail_idx(vq) != vq->last_avail;
}
