/* The split ring, driver half (VOP 3, 9.1): used by the drivers of the card OS.
 *
 * The host may write every byte of the ring block and of the used ring, so the free list, the
 * links and the lengths are private copies; from the ring only used.idx and the used elements are
 * read, once each, and checked. */
#include "mic/vring.h"

#include <errno.h>
#include <string.h>

#include "mic/barrier.h"

#define FEATURE(bit) (1ull << (bit))
#define NO_CHAIN     0 /* chain_len of a head that is not in flight */

static uint16_t *u16_at(uint8_t *base, uint32_t off)
{
	return (uint16_t *)(void *)(base + off);
}

int mic_dq_init(struct mic_dq *dq, struct mic_bus *bus, uint64_t desc_addr, uint64_t used_addr, uint16_t num,
		uint64_t features, uint64_t indirect_addr)
{
	memset(dq, 0, sizeof *dq);
	dq->broken = true; /* until it is complete, nobody can use it */
	if (!mic_vring_num_ok(num) || desc_addr % MIC_VRING_ALIGN || used_addr % 4 || indirect_addr % 16)
		return -EINVAL;
	uint8_t *block = mic_card_at(bus, desc_addr, mic_vring_block_size(num));
	uint8_t *used = mic_gddr_at(bus, used_addr, 6 + 8ull * num);

	if (!block || !used)
		return -EFAULT;
	if (indirect_addr && !mic_gddr_at(bus, indirect_addr, 16ull * MIC_DQ_TABLE * num))
		return -EFAULT;
	/* VOP 3.2: the card clears exactly the ring, not the info behind it. */
	memset(block, 0, mic_vring_size(num));
	memset(used, 0, 6 + 8ull * num);
	dq->bus = bus;
	dq->desc = block;
	dq->avail = block + 16 * num;
	dq->used = used;
	dq->num = num;
	dq->features = features;
	dq->indirect = features & FEATURE(MIC_VIRTIO_F_INDIRECT_DESC) ? indirect_addr : 0;
	dq->free_num = num;
	for (uint16_t i = 0; i < num; i++)
		dq->shadow_next[i] = (uint16_t)(i + 1);
	dq->broken = false;
	return 0;
}

static void write_desc(uint8_t *table, unsigned i, const struct mic_seg *seg, uint16_t flags, uint16_t next)
{
	struct mic_vring_desc d = {.addr = seg->addr, .len = seg->len, .flags = flags, .next = next};

	memcpy(table + 16 * i, &d, sizeof d);
}

static uint16_t seg_flags(unsigned i, unsigned n, unsigned out_num)
{
	uint16_t flags = i + 1 < n ? MIC_VRING_DESC_F_NEXT : 0;

	return (uint16_t)(i < out_num ? flags : flags | MIC_VRING_DESC_F_WRITE);
}

/* Descriptors straight in the ring; returns the index behind the last one. */
static uint16_t add_direct(struct mic_dq *dq, const struct mic_seg *seg, unsigned n, unsigned out_num)
{
	uint16_t at = dq->free_head;

	for (unsigned i = 0; i < n; i++) {
		uint16_t next = dq->shadow_next[at];

		write_desc(dq->desc, at, &seg[i], seg_flags(i, n, out_num), next);
		at = next;
	}
	dq->chain_len[dq->free_head] = (uint16_t)n;
	return at;
}

static uint16_t add_indirect(struct mic_dq *dq, const struct mic_seg *seg, unsigned n, unsigned out_num)
{
	uint16_t head = dq->free_head;
	uint64_t addr = dq->indirect + 16ull * MIC_DQ_TABLE * head;
	uint8_t *table = mic_gddr_at(dq->bus, addr, 16ull * n);
	const struct mic_seg self = {.addr = addr, .len = 16 * n};

	for (unsigned i = 0; i < n; i++)
		write_desc(table, i, &seg[i], seg_flags(i, n, out_num), (uint16_t)(i + 1));
	write_desc(dq->desc, head, &self, MIC_VRING_DESC_F_INDIRECT, 0);
	dq->chain_len[head] = 1;
	return dq->shadow_next[head];
}

int mic_dq_stage(struct mic_dq *dq, const struct mic_seg *seg, unsigned out_num, unsigned in_num,
		 uint64_t token)
{
	unsigned n = out_num + in_num;
	bool indirect = dq->indirect && n > 1 && n <= MIC_DQ_TABLE;
	uint16_t head = dq->free_head;
	uint64_t in_len = 0;

	if (dq->broken)
		return -EIO;
	if (!n || (!indirect && n > dq->num))
		return -EINVAL;
	if (dq->free_num < (indirect ? 1 : n))
		return -ENOSPC;
	for (unsigned i = out_num; i < n; i++)
		in_len += seg[i].len;
	dq->free_head = indirect ? add_indirect(dq, seg, n, out_num) : add_direct(dq, seg, n, out_num);
	dq->free_num = (uint16_t)(dq->free_num - dq->chain_len[head]);
	dq->token[head] = token;
	dq->in_len[head] = in_len > UINT32_MAX ? UINT32_MAX : (uint32_t)in_len;
	mic_store_relaxed(u16_at(dq->avail, 4 + 2u * (dq->avail_idx & (dq->num - 1u))), head);
	dq->avail_idx++;
	return 0;
}

void mic_dq_publish(struct mic_dq *dq)
{
	/* Pairs with the acquire load in load_avail_idx() of the device. */
	mic_store_release(u16_at(dq->avail, 2), dq->avail_idx);
}

int mic_dq_add(struct mic_dq *dq, const struct mic_seg *seg, unsigned out_num, unsigned in_num,
	       uint64_t token)
{
	int rc = mic_dq_stage(dq, seg, out_num, in_num, token);

	if (!rc)
		mic_dq_publish(dq);
	return rc;
}

bool mic_dq_should_kick(struct mic_dq *dq)
{
	uint16_t old = dq->kicked, now = dq->avail_idx;

	if (dq->broken || now == old)
		return false;
	dq->kicked = now;
	/* avail.idx before the question: pairs with the fence in mic_vq_enable_kick(). */
	mic_full_fence();
	if (!(dq->features & FEATURE(MIC_VIRTIO_F_EVENT_IDX)))
		return !(mic_load_relaxed(u16_at(dq->used, 0)) & MIC_VRING_USED_F_NO_NOTIFY);
	uint16_t event = mic_load_relaxed(u16_at(dq->used, 4 + 8u * dq->num));

	return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

static uint16_t load_used_idx(const struct mic_dq *dq)
{
	/* Pairs with the release store in mic_vq_publish(). */
	return mic_load_acquire(u16_at(dq->used, 2));
}

static void free_chain(struct mic_dq *dq, uint16_t head)
{
	uint16_t last = head;

	for (unsigned i = 1; i < dq->chain_len[head]; i++)
		last = dq->shadow_next[last];
	dq->shadow_next[last] = dq->free_head;
	dq->free_head = head;
	dq->free_num = (uint16_t)(dq->free_num + dq->chain_len[head]);
	dq->chain_len[head] = NO_CHAIN;
}

int mic_dq_get(struct mic_dq *dq, uint64_t *token, uint32_t *len)
{
	if (dq->broken)
		return -EIO;
	uint16_t idx = load_used_idx(dq);

	if (idx == dq->last_used)
		return 0;
	const uint32_t *elem =
		(const uint32_t *)(void *)(dq->used + 4 + 8u * (dq->last_used & (dq->num - 1u)));
	uint32_t id = mic_load_relaxed(&elem[0]), got = mic_load_relaxed(&elem[1]);

	if ((uint16_t)(idx - dq->last_used) > dq->num || id >= dq->num || dq->chain_len[id] == NO_CHAIN) {
		mic_store_relaxed(&dq->broken, true);
		return -EIO;
	}
	*token = dq->token[id];
	/* A compat device counts readable bytes as well (VOP-25): never more than there is room for. */
	*len = got < dq->in_len[id] ? got : dq->in_len[id];
	free_chain(dq, (uint16_t)id);
	/* Relaxed: other threads look at it without the driver's lock, as a hint. */
	mic_store_relaxed(&dq->last_used, (uint16_t)(dq->last_used + 1));
	return 1;
}

bool mic_dq_enable_interrupt(struct mic_dq *dq)
{
	if (dq->broken)
		return false;
	if (dq->features & FEATURE(MIC_VIRTIO_F_EVENT_IDX))
		mic_store_relaxed(u16_at(dq->avail, 4 + 2u * dq->num), dq->last_used);
	else
		mic_store_relaxed(u16_at(dq->avail, 0), 0);
	/* The wish before the last look: pairs with the fence in mic_vq_should_interrupt(). */
	mic_full_fence();
	return load_used_idx(dq) != dq->last_used;
}

void mic_dq_disable_interrupt(struct mic_dq *dq)
{
	/* With EVENT_IDX the old event lies behind the device's index: it is silent already. */
	if (!dq->broken && !(dq->features & FEATURE(MIC_VIRTIO_F_EVENT_IDX)))
		mic_store_relaxed(u16_at(dq->avail, 0), MIC_VRING_AVAIL_F_NO_INTERRUPT);
}

bool mic_dq_has_completion(const struct mic_dq *dq)
{
	return !mic_load_relaxed(&dq->broken) && load_used_idx(dq) != mic_load_relaxed(&dq->last_used);
}
